"""What is known so far while a graph is analysed: operations, values, coupling."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx
from torch.fx.node import Node

from dspfx.passes.analysis import operators
from dspfx.passes.analysis.agreement import SizeFacts
from dspfx.passes.analysis.channel_ops import Constant, Op, Value
from dspfx.passes.analysis.coupling import Coupling
from dspfx.passes.analysis.movement import ElementIds
from dspfx.passes.analysis.positions import Positions
from dspfx.utils.arrays import IntArray


class State:
    """Of one run of a graph on an example, node by node.

    Args:
        interpreter: runs the graph; its `env` holds the tensors of the nodes.
        root: the module whose graph it is.
        frozen: names of the layers that keep all their filters and input channels.
        rules: what is known of further operators.
        facts: what is known of the same graph on inputs of other sizes.
    """

    def __init__(
        self,
        interpreter: fx.Interpreter,
        root: fx.GraphModule,
        frozen: frozenset[str],
        rules: Mapping[operators.Key, operators.Rule],
        facts: SizeFacts,
        samples: float,
    ) -> None:
        self.interpreter = interpreter
        self.samples = samples
        self.root = root
        self.facts = facts
        self.frozen = frozen
        self.rules = {operators.named(key): rule for key, rule in rules.items()}
        self.ops: dict[Node, Op] = {}
        self.values: dict[Node, Value] = {}
        self.coupling = Coupling()
        self.ids = ElementIds(self.values)
        self.containers: set[Node] = set()  # inputs that are no tensors but hold some
        self.positions = Positions(root, self.ops, self.values)
        self.draws = False  # whether the present node has drawn random numbers
        self.born_whole: list[IntArray] = []  # atoms that exist whatever is pruned
        self.macs: dict[Node, int] = {}  # for one sample, as counted

    @property
    def env(self) -> dict[Node, Any]:
        """What every node has computed."""
        return self.interpreter.env

    def call(self, node: Node, args: Any, kwargs: Any) -> Any:
        """Run `node` again, on other arguments."""
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)

    def holds_positions(self, node: Node) -> bool:
        """Whether the channels of a value were sought along a dimension whose size varies."""
        return self.facts.are_positions(node, self.values[node].dim)

    def likely_dim(self, node: Node, operands: tuple[Node, ...], result: Tensor) -> int | None:
        """Where the channels of an opaque operator's result lie: as in an operand, or second.

        Or in the first dimension after that whose size does not vary.
        """
        fixed = [d for d in range(1, result.dim()) if not self.facts.are_positions(node, d)]
        for value in (self.values[o] for o in operands if o in self.values):
            dim = value.dim
            if dim is None or len(value.shape) != result.dim():
                continue
            same = value.shape[dim] == result.shape[dim]
            if same and not self.facts.are_positions(node, dim):
                return dim
        return fixed[0] if fixed else None

    def new_atoms(self, node: Node, result: Tensor, dim: int | None) -> None:
        """Give the tensor of `node` channels along `dim` that are like no others."""
        count = 0 if dim is None else result.shape[dim]
        self.values[node] = Value(tuple(result.shape), dim, self.coupling.new(count))

    def pass_atoms(self, node: Node, result: Tensor, dim: int, atoms: IntArray) -> None:
        """Give the tensor of `node` channels along `dim` that are those of `atoms`."""
        self.values[node] = Value(tuple(result.shape), dim, atoms)

    def is_index(self, node: Node) -> bool:
        """Whether a node is a constant that holds indices."""
        real = self.env[node]
        constant = isinstance(self.ops.get(node), Constant)
        return constant and isinstance(real, Tensor) and not real.is_floating_point()
