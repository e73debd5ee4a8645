"""The state of a running channel analysis: operations, values and coupling found so far."""

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node

from dspfx.passes.analysis import operators
from dspfx.passes.analysis.agreement import SizeFacts
from dspfx.passes.analysis.channel_ops import Constant, Op, Value
from dspfx.passes.analysis.coupling import Coupling
from dspfx.passes.analysis.movement import ElementIds
from dspfx.passes.analysis.positions import Positions
from dspfx.utils.arrays import IntArray


class Findings:
    """What an analysis has found out from the values of parameters and buffers.

    These change while a model is trained; an analysis holds as long as all would be found again.
    """

    def __init__(self) -> None:
        self._found: list[tuple[Callable[[], Any], Any]] = []

    def find(self, ask: Callable[[], Any]) -> Any:
        """What `ask` returns, a tensor or what can be compared by `==`; it can be asked again."""
        found = ask()
        self._found.append((ask, found))
        return found

    def hold(self) -> bool:
        """Whether all is as it was found."""
        with torch.no_grad():
            return all(_is_same(ask(), found) for ask, found in self._found)


class _Never:
    """Found another each time."""


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


class State:
    """The state of one run of a graph on an example, node by node.

    Args:
        interpreter: goes through the graph; its `env` holds what the nodes gave, but for constants
            tensors without values.
        root: the module whose graph it is.
        frozen: names of the layers that keep all their filters and input channels.
        rules: what is known of further operators.
        facts: what is known of the same graph on inputs of other sizes.
        samples: how many the example is of.
        findings: what is found out by values is added.
    """

    def __init__(
        self,
        interpreter: fx.Interpreter,
        root: fx.GraphModule,
        frozen: frozenset[str],
        rules: Mapping[operators.Key, operators.Rule],
        facts: SizeFacts,
        samples: float,
        findings: Findings,
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
        self.containers: set[Node] = set()  # inputs that are containers of tensors
        self.positions = Positions(root, self.ops, self.values)
        self.findings = findings
        self.born_whole: list[IntArray] = []  # atoms that are never pruned
        self.macs: dict[Node, int] = {}  # for one sample, as counted

    @property
    def env(self) -> dict[Node, Any]:
        """What every node has computed."""
        return self.interpreter.env

    def call(self, node: Node, args: Any, kwargs: Any) -> Any:
        """Run `node` again, on other arguments."""
        return getattr(self.interpreter, node.op)(node.target, args, kwargs)

    def read_constant(self, node: Node, value: Tensor) -> None:
        """Note that the analysis may depend on the values of a constant, such as an index.

        Of parameters, which training changes, it depends on by what is computed from them alone.
        """
        if node.op == "get_attr" and isinstance(value, nn.Parameter):
            self.findings.find(lambda: id(self._constant(node)))
        elif node.op == "get_attr":
            self.findings.find(lambda: self._constant(node).clone())
        elif not value.is_floating_point():
            self.findings.find(_Never)

    def _constant(self, node: Node) -> Tensor:
        found: Tensor = attrgetter(str(node.target))(self.root)
        return found

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
        """Give the tensor of `node` channels along `dim` that are new."""
        count = 0 if dim is None else result.shape[dim]
        self.values[node] = Value(tuple(result.shape), dim, self.coupling.new(count))

    def pass_atoms(self, node: Node, result: Tensor, dim: int, atoms: IntArray) -> None:
        """Give the tensor of `node` the channels `atoms` along `dim`."""
        self.values[node] = Value(tuple(result.shape), dim, atoms)

    def is_index(self, node: Node) -> bool:
        """Whether a node is a constant that holds indices."""
        real = self.env[node]
        constant = isinstance(self.ops.get(node), Constant)
        return constant and isinstance(real, Tensor) and not real.is_floating_point()
