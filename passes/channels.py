"""Which channels of which values are the same thing: the graph, run on labels.

Every channel of every layer's output is given a number, an atom. The graph is then interpreted
once with the example inputs; beside the real tensors, three facts are carried along:

1. **Channel-producing layers** (convolution, linear) read the channels of their input and make
   new atoms.
2. **Channelwise operators** (norms, pooling, depthwise convolution) and **elementwise** ones pass
   atoms on; atoms that meet in an elementwise operator are coupled, by union-find.
3. **Data movement** is executed for real, on a tensor that numbers the elements of its inputs.
   What comes out says which element went where; where whole channels moved, the operator is a
   gather of channels or works on every channel alike, whatever its name.
4. **Anything else** is opaque: it gets its inputs at full width and makes new atoms.

Whether a zero channel stays zero is found by running the operator on zeros.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node, map_arg

from dspfx.filters import TRANSPOSED, filters_first, structural_groups
from dspfx.gates import LAYERS, ChannelGate, GatedLayer
from dspfx.inputs import Call, fresh, samples_of
from dspfx.kept import is_altered
from dspfx.parametrised import is_computed, why_computed
from dspfx.passes import operators
from dspfx.passes.agreement import SizeFacts
from dspfx.passes.coupling import Coupling
from dspfx.passes.fixed import fixed
from dspfx.passes.movement import PADDED_VALUE, PADDED_ZERO, ElementIds, Move
from dspfx.passes.positions import Positions, operands_of
from dspfx.passes.products import Products
from dspfx.passes.randomness import drawn_by_torch
from dspfx.passes.values import (
    BoolArray,
    ChannelAnalysis,
    Channelwise,
    Constant,
    Declined,
    Elementwise,
    Gate,
    Gather,
    IntArray,
    Merge,
    Mix,
    Op,
    Query,
    Restored,
    Source,
    Value,
    used,
)
from dspfx.trees import is_construction, leaves
from dspfx.weighted import is_weighted


def analyse(
    root: fx.GraphModule,
    inputs: tuple[Any, ...],
    frozen: frozenset[str] = frozenset(),
    rules: Mapping[operators.Key, operators.Rule] | None = None,
    facts: SizeFacts | None = None,
    whole: nn.Module | None = None,
    samples: float | None = None,
) -> ChannelAnalysis:
    """Analyse the graph of `root`, which must be in evaluation mode, on example `inputs`.

    Args:
        root: only run, never changed.
        inputs: positional inputs; a batch of two or more tells batch and channels apart.
        frozen: names of the layers that keep all their filters and input channels.
        rules: what is known of further operators; takes precedence.
        facts: what is known of the same graph on inputs of other sizes.
        whole: the module whose parameters are counted, if that has more than `root`.
        samples: how many of the user's samples `inputs` are, which costs are divided by; see
            `samples_of`, which is asked if it is None.
    """
    samples = samples or samples_of(Call(inputs))
    analyser = _Analyser(root, frozen, rules or {}, facts or SizeFacts(), samples)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        analyser.run(*inputs)
    found = analyser.result()
    return replace(found, fixed=fixed(root, whole or root, found, analyser.macs))


class _Analyser(fx.Interpreter):
    def __init__(
        self,
        root: fx.GraphModule,
        frozen: frozenset[str],
        rules: Mapping[operators.Key, operators.Rule],
        facts: SizeFacts,
        samples: float,
    ) -> None:
        super().__init__(root)
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

    def result(self) -> ChannelAnalysis:
        classes = self.coupling.classes()
        losable = np.ones(len(classes), bool)
        losable[np.concatenate([np.zeros(0, np.int64), *self.born_whole])] = False
        losable = np.isin(classes, classes[losable])
        read = used(self.ops)
        declined: list[Declined] = []
        for node, op in self.ops.items():
            if node in read and isinstance(op, Restored) and op.reason:
                values = [self.values[o] for o in op.operands if o in self.values]
                if any(losable[value.atoms].any() for value in values):
                    declined.append(Declined(node.name, op.reason))
        return ChannelAnalysis(self.ops, self.values, classes, tuple(declined))

    def run_node(self, n: Node) -> Any:
        before = drawn_by_torch()
        with Products() as counted:
            result = super().run_node(n)
        self.macs[n] = int(counted.macs / self.samples)
        self.draws = drawn_by_torch() != before
        op = self._classify(n, result)
        if op is not None and n in self.values and self._holds_positions(n):
            del self.values[n]
            op = op if isinstance(op, Source) else Restored(operands_of(n, self.ops), _BY_SIZE)
        if op is not None:
            self.ops[n] = op
            if isinstance(result, Tensor) and n not in self.values:
                self._new_atoms(n, result, self._likely_dim(n, op.operands, result))
                self.born_whole.append(self.values[n].atoms)
        return result

    def _holds_positions(self, node: Node) -> bool:
        """Whether the channels of a value were sought along a dimension whose size varies."""
        return self.facts.are_positions(node, self.values[node].dim)

    def _classify(self, node: Node, result: Any) -> Op | None:
        if self._is_input(node):
            if isinstance(result, Tensor):
                return Source(())
            self.containers.add(node)
            return None
        if node.op == "get_attr":
            return self._constant(node, result)
        operands = operands_of(node, self.ops)
        if self._is_constant(node, result):
            return self._constant(node, result)
        if node.op == "output":
            return Restored(operands, "")
        if not operands:
            return self._size_or_nothing(node, result)
        if node.name in self.facts.dependent:
            return Restored(operands, _BY_SIZE)
        if self.draws:
            return Restored(operands, _DRAWS)
        if not isinstance(result, Tensor):
            of_inputs = self._of_inputs(operands, result)
            return of_inputs or self._size(node, operands) or self._parts(node, operands)
        if self._has_another_forward(node, result):
            why = f"a hook, or a 'forward' of its own, changes what '{node.target}' computes"
            return Restored(operands, why)
        if operators.writes_input(node):
            return Restored(operands, "it is written into an input of the model", effect=True)
        rule = self._rule(node)
        found = None if rule is None else rule(self, node, operands, result)
        return found or self._opaque(node, operands)

    def _rule(self, node: Node) -> "_Rule | None":
        key = operators.key(node, self.root)
        if key in self.rules:
            return _TAUGHT.get(self.rules[key])
        return next((rule for keys, rule in _RULES if key in keys), None)

    def _is_input(self, node: Node) -> bool:
        """Whether a node is an input of the model, or an item of a container that is."""
        if node.target in (operator.getitem, getattr, "get"):
            return isinstance(node.args[0], Node) and node.args[0] in self.containers
        return node.op == "placeholder"

    def _likely_dim(self, node: Node, operands: tuple[Node, ...], result: Tensor) -> int | None:
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

    def _new_atoms(self, node: Node, result: Tensor, dim: int | None) -> None:
        count = 0 if dim is None else result.shape[dim]
        self.values[node] = Value(tuple(result.shape), dim, self.coupling.new(count))

    def _pass_atoms(self, node: Node, result: Tensor, dim: int, atoms: IntArray) -> None:
        self.values[node] = Value(tuple(result.shape), dim, atoms)

    def _opaque(self, node: Node, operands: tuple[Node, ...]) -> Restored:
        name = _readable(operators.key(node, self.root))
        why = f"{name} is not known to keep channels apart"
        if node.op == "call_module":
            why = why_computed(self.root.get_submodule(str(node.target))) or why
        return Restored(operands, why)

    def _has_another_forward(self, node: Node, result: Tensor) -> bool:
        """Whether a module that stays as it is gives something else than its class would."""
        module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if module is None or isinstance(module, GatedLayer | torch.jit.ScriptModule):
            return False
        if not is_altered(module):
            return False
        args, kwargs = fresh(self.fetch_args_kwargs_from_env(node))
        return not torch.equal(type(module).forward(module, *args, **kwargs), result)

    def _is_constant(self, node: Node, result: Any) -> bool:
        """Whether a node rearranges or reckons with parameters and buffers alone."""
        known = operators.key(node, self.root) in operators.OF_CONSTANTS
        inputs = node.all_input_nodes
        reads_constants = all(isinstance(self.ops.get(n), Constant) for n in inputs)
        return known and bool(inputs) and reads_constants and isinstance(result, Tensor)

    def _constant(self, node: Node, result: Any) -> Op | None:
        if not isinstance(result, Tensor):
            return None
        self.values[node] = Value(tuple(result.shape), None, np.zeros(0, np.int64))
        return Constant(())

    # -- sizes -------------------------------------------------------------------------------

    def _of_inputs(self, operands: tuple[Node, ...], result: Any) -> Op | None:
        """What is asked of inputs alone, whose channels are not the graph's to count."""
        inputs = all(isinstance(self.ops[n], Source) for n in operands)
        asked = inputs and not any(isinstance(leaf, Tensor) for leaf in leaves(result))
        return Query(operands, None) if asked else None

    def _size(self, node: Node, operands: tuple[Node, ...]) -> Op | None:
        """A size of a tensor; a channel count becomes the constant that it always was."""
        key = operators.key(node, self.root)
        is_shape = key is getattr and node.args[1] in ("shape", "device", "dtype", "ndim")
        if not (is_shape or key in operators.SIZES or key in ("get_device", "is_floating_point")):
            return None
        value = self.values.get(operands[0])
        if value is None:
            return Restored(operands, "")
        asked = node.args[1] if key == "size" and len(node.args) > 1 else node.kwargs.get("dim")
        if isinstance(asked, int) and value.shape:
            on_channels = asked % len(value.shape) == value.dim
            return Query(operands, value.shape[asked] if on_channels else None)
        if key == "numel":
            return Restored(operands, "")
        if key == "size" or (key is getattr and node.args[1] == "shape"):
            return self._whole_shape(node, operands, value)
        return Query(operands, None)

    def _whole_shape(self, node: Node, operands: tuple[Node, ...], value: Value) -> Op:
        """A whole `size()` is fine as long as it is only taken apart, away from the channels.

        Or if a transposed convolution is asked for it, which reads of it no channels.
        """
        for user in node.users:
            if user.op == "call_module" and user.args[0] is not node:
                layer = self.root.get_submodule(str(user.target))
                if operators.output_size(user, layer) is node:
                    continue
            taken = user.args[1] if user.target is operator.getitem else None
            if isinstance(taken, int):
                continue
            dims = range(len(value.shape))[taken] if isinstance(taken, slice) else None
            if dims is None or value.dim in dims:
                return Restored(operands, "")
        return Query(operands, None)

    def _size_or_nothing(self, node: Node, result: Any) -> Op | None:
        """An item of a `size()`: a constant where it counts channels."""
        whole = node.args[0] if node.target is operator.getitem else None
        query = self.ops.get(whole) if isinstance(whole, Node) else None
        if isinstance(query, Query) and isinstance(node.args[1], int):
            value, asked = self.values[query.operands[0]], self.ops[query.operands[0]]
            if node.args[1] % len(value.shape) == value.dim and not isinstance(asked, Source):
                return Query(query.operands, int(result))
            return None
        if isinstance(result, Tensor):
            self.values[node] = Value(tuple(result.shape), None, np.zeros(0, np.int64))
            return Restored((), "")
        return None

    # -- operators ---------------------------------------------------------------------------

    def _mix(self, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
        name = str(node.target)
        layer: Any = self.root.get_submodule(name)
        value = self.values.get(operands[0])
        weighted = is_weighted(layer)
        if weighted and len(operands) == 2 and isinstance(self.ops[operands[1]], Constant):
            operands = operands[:1]
        asked = (
            isinstance(layer, TRANSPOSED) and len(node.args) + ("output_size" in node.kwargs) > 1
        )
        takes_one_tensor = len(node.args) + len(node.kwargs) - weighted - asked == 1
        takes_one_tensor &= len(operands) == 1
        has_weight = is_computed(layer) or type(layer.weight) is nn.Parameter
        if not takes_one_tensor or not has_weight:
            return None
        if value is None or len(value.shape) != result.dim():
            return None
        if not isinstance(layer, nn.Linear) and result.dim() != layer.weight.dim():
            return None  # one image, without a batch
        dim = result.dim() - 1 if isinstance(layer, nn.Linear) else 1
        weight, groups = filters_first(layer), structural_groups(layer)
        filters, width = weight.shape[:2]
        taps = weight[0, 0].numel()
        # every filter is applied at each position of the output, or of the input if transposed
        swept = self.env[operands[0]] if isinstance(layer, TRANSPOSED) else result
        positions = max(1, int(swept.numel() // swept.shape[dim] / self.samples))
        if groups == filters == value.channels > 1 and value.dim == dim and not weighted:
            return self._depthwise(node, operands, result, taps * positions)
        self._new_atoms(node, result, dim)
        gated = isinstance(layer, GatedLayer)
        bias = np.zeros(filters, bool)
        if layer.bias is not None:
            bias = _numpy(layer.bias.detach() != 0) | gated
        frozen = name in self.frozen
        return Mix(
            *(operands, name, filters, width * groups, groups, taps, positions),
            *(bias, layer.bias is not None, gated),
            restored=value.dim != dim or frozen,
            frozen=frozen,
        )

    def _depthwise(
        self, node: Node, operands: tuple[Node, ...], result: Tensor, macs: int
    ) -> Op | None:
        layer = self.root.get_submodule(str(node.target))
        if str(node.target) in self.frozen:
            return Restored(operands, "the layer is to be ignored")
        parameters = sum(p[0].numel() for p in layer.parameters(recurse=False))
        self._pass_atoms(node, result, 1, self.values[operands[0]].atoms)
        zeros, shifts = self._on_zeros(node, operands, result, 1), layer.bias is not None
        return Channelwise(operands, 1, zeros, macs, parameters, shifts, str(node.target))

    def _channelwise(self, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
        value = self.values.get(operands[0])
        if len(operands) != 1 or value is None or value.dim != 1 or result.dim() < 2:
            return None
        if result.shape[1] != value.channels:
            return None
        rank = operators.rank_with_batch(operators.key(node, self.root))
        if rank is not None and len(value.shape) != rank:
            return None  # torch takes the batch for the channels, and the channels for positions
        self._pass_atoms(node, result, 1, value.atoms)
        zeros = self._on_zeros(node, operands, result, 1)
        parameters = 0
        if node.op == "call_module":
            own = self.root.get_submodule(str(node.target)).parameters(recurse=False)
            parameters = sum(p.numel() for p in own if p.numel() == value.channels)
            parameters //= value.channels
        norm = operators.key(node, self.root) in operators.NORMS
        return Channelwise(operands, 1, zeros, 0, parameters, norm)

    def _gate(self, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
        norm = self.ops[operands[0]]
        value = self.values[operands[0]]
        assert value.dim is not None
        self._pass_atoms(node, result, value.dim, value.atoms)
        normalised = norm.operands[0] if isinstance(norm, Channelwise) else operands[0]
        return Gate(operands, str(node.target), normalised)

    def _reduction(self, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
        """A mean or the like over positions; over channels it mixes them."""
        value = self.values.get(operands[0])
        if len(operands) != 1 or value is None or value.dim is None:
            return None
        rank = len(value.shape)
        reduced = operators.reduced(node, rank)
        if reduced is None or value.dim in reduced or 0 in reduced:
            return None
        kept = result.dim() == rank
        dim = value.dim if kept else value.dim - sum(d < value.dim for d in reduced)
        self._pass_atoms(node, result, dim, value.atoms)
        return Channelwise(operands, 1, self._on_zeros(node, operands, result, dim))

    def _merge(self, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
        """Several channels become one, where there are fewer along the dimension of channels."""
        value = self.values.get(operands[0])
        shuffles = operators.key(node, self.root) in operators.PIXEL_SHUFFLES
        sizes = zip((() if value is None else value.shape), result.shape, strict=False)
        fewer = [dim for dim, (before, after) in enumerate(sizes) if after < before]
        if len(operands) != 1 or value is None or fewer != [value.dim]:
            return self._move(node, operands, result) if shuffles else None
        (dim,) = fewer
        count = result.shape[dim]
        op = Merge(
            operands, value.channels // count, shuffles, self._is_absorbing(node, operands[0], dim)
        )
        atoms = value.atoms[op.read_by(np.arange(count), count)]
        for others in atoms[1:]:
            self.coupling.unite(atoms[0], others)
        self._pass_atoms(node, result, dim, atoms[0])
        return op

    def _elementwise(self, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
        key = operators.key(node, self.root)
        if key == "to" and len(operands) > 1:
            return None
        dims = {self._aligned_dim(self.values.get(n), result) for n in operands} - {None}
        if len(dims) != 1:
            return None
        (dim,) = dims
        assert dim is not None
        spans = [self._spans(operand, result, dim) for operand in operands]
        if None in spans:
            return None
        spanning = [n for n, span in zip(operands, spans, strict=True) if span]
        self._pass_atoms(node, result, dim, self._couple(spanning, result.shape[dim]))
        # a term may be left out if it is never broadcast, so if all or none follow the image
        alike = len({self.positions.are_fixed(operand) for operand in operands}) == 1
        plain = not node.kwargs and len(node.args) == len(operands) == 2 and alike
        skips: tuple[bool, ...] = (False,) * len(operands)
        if plain:
            left, right = (self._is_whole(operand, result, dim) for operand in operands)
            skips_left = right and key in operators.ADDITIONS
            skips_right = left and key in operators.ADDITIONS | operators.SUBTRACTIONS
            skips = skips_left, skips_right
        return Elementwise(
            operands,
            tuple(bool(span) for span in spans),
            self._zero_of_zeros(node),
            key in operators.MULTIPLICATIONS,
            skips,
        )

    def _is_whole(self, operand: Node, result: Tensor, dim: int) -> bool:
        """Whether an operand has the shape and type of the result by itself, at every size."""
        real = self.env[operand]
        if not isinstance(real, Tensor) or isinstance(self.ops[operand], Constant):
            return False
        alike = real.shape == result.shape and real.dtype == result.dtype
        return alike and all(size > 1 for d, size in enumerate(real.shape) if d != dim)

    def _aligned_dim(self, value: Value | None, result: Tensor) -> int | None:
        """The dimension of the result that the channels of an operand lie along."""
        if value is None or value.dim is None:
            return None
        return value.dim + result.dim() - len(value.shape)

    def _spans(self, operand: Node, result: Tensor, dim: int) -> bool | None:
        """Whether an operand has the result's channels; None if they cannot be told apart."""
        value = self.values.get(operand)
        if value is None:
            return None
        own = dim - result.dim() + len(value.shape)
        if own < 0 or value.shape[own] != result.shape[dim]:
            return False
        if value.dim == own or isinstance(self.ops[operand], Constant):
            return True
        return False if value.shape[own] == 1 else None

    def _couple(self, operands: list[Node], channels: int) -> IntArray:
        met = [self.values[n].atoms for n in operands if not isinstance(self.ops[n], Constant)]
        if not met:
            return self.coupling.new(channels)
        for other in met[1:]:
            self.coupling.unite(met[0], other)
        return met[0]

    def _move(self, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
        if operators.left_by(node):
            return None  # it depends on both
        moved = self._run_on_ids(node, operands)
        if not isinstance(moved, Tensor) or moved.shape != result.shape:
            return None
        move, why = self.ids.move(moved), "its result does not keep whole channels together"
        if move.dim is not None and move.roots:
            source_dims = {self.values[root].dim for root in move.roots}
            only_channels = source_dims == {move.dim} and move.whole_channels
            if self._runs_on_fewer(node, operands, move):
                if not self.positions.are_for_one_size(node, operands[0], result, move):
                    return self._rearranged(node, result, move, move.dim)
                why = "how many positions a channel has may vary"
            elif only_channels and self.positions.are_left_alone(node, move.dim):
                return self._gathered(node, result, move, move.dim)
        self.ids.keep(node, moved)
        self.values[node] = Value(tuple(result.shape), None, np.zeros(0, np.int64))
        return Restored(operands, why)

    def _relayout(self, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
        """A copy in another memory layout: elementwise, or one more step of moving data."""
        elementwise = self._elementwise(node, operands, result)
        if elementwise is not None or node.target in ("detach", torch.detach):
            return elementwise  # no gradient goes back to what it has moved
        return self._move(node, operands, result)

    def _gathered(self, node: Node, result: Tensor, move: Move, dim: int) -> Op:
        atoms = np.zeros(len(move.index), np.int64)
        for k, root in enumerate(move.roots):
            here = move.source == k
            atoms[here] = self.values[root].atoms[move.index[here]]
        padding = move.source < 0
        atoms[padding] = self.coupling.new(int(padding.sum()))
        self._pass_atoms(node, result, dim, atoms)
        return Gather(move.roots, move.source, move.index)

    def _runs_on_fewer(self, node: Node, operands: tuple[Node, ...], move: Move) -> bool:
        """Whether the operator, sizes rewritten, does on some channels what it does on all."""
        if operands != move.roots or len(move.roots) != 1 or move.repeat is None:
            return False
        key = operators.key(node, self.root)
        if key in operators.SIZED:
            return len(operators.sizes(node)) == move.rank
        if key is operator.getitem:
            items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            return all(i is None or i is ... or isinstance(i, int | slice) for i in items)
        return key in operators.SIZE_FREE or key in operators.SQUEEZES

    def _rearranged(self, node: Node, result: Tensor, move: Move, dim: int) -> Op:
        (root,), repeat = move.roots, move.repeat
        assert repeat is not None
        self._pass_atoms(node, result, dim, np.repeat(self.values[root].atoms, repeat))
        zeros = move.pads_zeros_only and not _pads_others(node)
        return Channelwise((root,), repeat, np.full(result.shape[dim], zeros))

    def _parts(self, node: Node, operands: tuple[Node, ...]) -> Op:
        """A split or chunk: its parts are found by the `getitem` that takes them."""
        key = operators.key(node, self.root)
        if key in operators.MOVEMENT:
            parts = self._run_on_ids(node, operands)
            if isinstance(parts, tuple | list):
                self.ids.keep(node, tuple(parts))
                return Restored(operands, "its parts are used whole")
        if is_construction(node.target):
            return Restored(operands, "")  # the reasons are those of whoever reads it
        return self._opaque(node, operands)

    def _run_on_ids(self, node: Node, operands: tuple[Node, ...]) -> Any:
        """The node, executed on the numbered elements of its tensors; None if it refuses."""
        moving = [n for n in operands if not self._is_index(n)]
        if not moving or not self.ids.knows(moving):
            return None
        args = map_arg(node.args, lambda n: self.ids.of(n) if n in moving else self.env[n])
        kwargs = map_arg(node.kwargs, lambda n: self.ids.of(n) if n in moving else self.env[n])
        if operators.key(node, self.root) is torch.nn.functional.pad:
            args, kwargs = _pad_with_ids(args, kwargs)
        try:
            return getattr(self, node.op)(node.target, args, kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            return None

    def _is_index(self, node: Node) -> bool:
        real = self.env[node]
        constant = isinstance(self.ops.get(node), Constant)
        return constant and isinstance(real, Tensor) and not real.is_floating_point()

    # -- zeros -------------------------------------------------------------------------------

    def _on_zeros(
        self, node: Node, operands: tuple[Node, ...], result: Tensor, dim: int
    ) -> BoolArray:
        """Bool `[C]`: the channels of `result` that are zero where the operand is."""
        zeros = torch.zeros_like(self.env[operands[0]])
        zero = (self._run_on(node, operands[0], zeros) == 0).movedim(dim, 0)
        return _numpy(zero.reshape(len(zero), -1).all(1))

    def _is_absorbing(self, node: Node, operand: Node, dim: int) -> bool:
        """Whether zeros in the first half of its channels are enough for it to give zero."""
        half = torch.ones_like(self.env[operand])
        half.narrow(dim, 0, half.shape[dim] // 2).zero_()
        return bool((self._run_on(node, operand, half) == 0).all())

    def _run_on(self, node: Node, operand: Node, x: Tensor) -> Tensor:
        """What `node` makes of `x` in place of `operand`."""
        args = map_arg(node.args, lambda n: x if n is operand else self.env[n])
        kwargs = map_arg(node.kwargs, lambda n: x if n is operand else self.env[n])
        result: Tensor = getattr(self, node.op)(node.target, args, kwargs)
        return result

    def _zero_of_zeros(self, node: Node) -> bool:
        """Whether an elementwise operator gives zero where all its tensors are zero."""

        def zero(n: Node) -> Any:
            real = self.env[n]
            if not isinstance(real, Tensor):
                return real
            return torch.zeros_like(real[(slice(1),) * real.dim()])  # a layout may need the rank

        args, kwargs = map_arg(node.args, zero), map_arg(node.kwargs, zero)
        return bool((getattr(self, node.op)(node.target, args, kwargs) == 0).all())


_DRAWS = "it draws random numbers in evaluation mode, one for every element"
_BY_SIZE = "what it does to channels depends on the size of the inputs"

_Rule = Callable[[_Analyser, Node, tuple[Node, ...], Tensor], Op | None]
_RULES: tuple[tuple[frozenset[Any], _Rule], ...] = (
    (LAYERS, _Analyser._mix),
    (frozenset((ChannelGate,)), _Analyser._gate),
    (operators.CHANNELWISE, _Analyser._channelwise),
    (operators.REDUCTIONS, _Analyser._reduction),
    (operators.PIXEL_SHUFFLES | operators.GLUS, _Analyser._merge),
    (operators.RELAYOUTS, _Analyser._relayout),
    (operators.ELEMENTWISE, _Analyser._elementwise),
    (operators.MOVEMENT, _Analyser._move),
)

_TAUGHT: dict[operators.Rule, _Rule] = {
    "elementwise": _Analyser._elementwise,
    "channelwise": _Analyser._channelwise,
    "movement": _Analyser._move,
}


def _numpy(tensor: Tensor) -> BoolArray:
    array: BoolArray = tensor.cpu().numpy()
    return array


def _pads_others(node: Node) -> bool:
    """Whether it pads anything but zero, where it pads."""
    if node.target is not torch.nn.functional.pad:
        return False
    return bool(node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None))


def _pad_with_ids(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """`F.pad`'s arguments, padding with the number that stands for the padded value."""
    value = kwargs.get("value", args[3] if len(args) > 3 else None)
    number = PADDED_ZERO if not value else PADDED_VALUE
    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
    pad = kwargs.get("pad", args[1] if len(args) > 1 else None)
    return (args[0], pad, mode, number if mode == "constant" else None), {}


def _readable(key: operators.Key) -> str:
    return key if isinstance(key, str) else getattr(key, "__name__", str(key))
