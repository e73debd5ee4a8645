"""The compaction pass: emits the graph that a `CompactionPlan` describes.

1. Values hold only the channels the plan gives them; operands are aligned to what is wanted by a
   slice or by padding where the channels lie side by side, else by one `index_select`; missing
   channels are zero.
2. Layers are rebuilt from their masked weights, one layer for each part of the lowering, batch
   norms folded in. Nothing is shared with the prepared model.
3. Channelwise modules are cut to their channels; gates disappear where nothing is dead.
4. Sizes that count channels become constants, and the sizes of reshapes follow the width.
5. Every other operator is copied, out of place.
6. Calls of one module that are planned alike call one module again.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import Node, map_arg

from dspfx.layers.computed_weight import is_weighted
from dspfx.layers.gates import ChannelGate
from dspfx.passes.analysis import operators
from dspfx.passes.analysis.channel_ops import (
    ChannelAnalysis,
    Channelwise,
    Constant,
    Elementwise,
    FullWidth,
    Gate,
    Gather,
    Mix,
    Op,
    Query,
    Statistics,
    Value,
)
from dspfx.passes.lowering.emit import emit
from dspfx.passes.sandbox.unwritten import UnwrittenModule
from dspfx.passes.transforms.compacted import Compacted
from dspfx.passes.transforms.cutting import (
    bytes_of,
    constant_dim,
    device_of,
    folded_weight,
    is_whole,
    narrow_call,
    private_copy,
    remove_unused,
)
from dspfx.passes.transforms.plan import CompactionPlan, Order
from dspfx.utils.arrays import IntArray, is_run

_MOVES = operators.RELAYOUTS | operators.MOVEMENT


def compact(source: fx.GraphModule, analysis: ChannelAnalysis, plan: CompactionPlan) -> Compacted:
    """Emit the compact graph of `source`, which is only read."""
    emitter = _Emitter(source, analysis, plan)
    for node in source.graph.nodes:
        emitter.emit(node)
    return emitter.finish()


class _Emitter:
    def __init__(
        self, source: fx.GraphModule, analysis: ChannelAnalysis, plan: CompactionPlan
    ) -> None:
        self.source = source
        self.analysis = analysis
        self.plan = plan
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.env: dict[Node, Any] = {}
        self.aligned: dict[tuple[Node, bytes], Node] = {}
        self.taken: dict[str, int] = defaultdict(int)  # the last number given to a name
        self.emitted: dict[tuple[object, ...], str] = {}  # modules, by original module and plan
        self.constants: dict[Node, Tensor] = {}
        self.copies: dict[tuple[Node, Node], Node] = {}  # of values, by the call that overwrites
        self.computed: set[Node] = set()
        self.computed_buffers: dict[str, Node] = {}
        self.interpreter = fx.Interpreter(source)
        self.device = device_of(source)

    def finish(self) -> Compacted:
        UnwrittenModule(self.root, self.graph)  # fx looks up purity of calls in the owning module
        remove_unused(self.graph, self.root)
        self.graph.lint()
        alive = set(self.graph.nodes)
        folded = {old for old, layer in self.plan.layers.items() if layer.norm is not None}
        nodes = {o: n for o, n in self.env.items() if n in alive and o not in folded}
        return Compacted(self.root.eval(), self.graph, nodes, self.computed_buffers)

    def emit(self, node: Node) -> None:
        op = self.analysis.ops.get(node)
        if op is not None and not isinstance(op, Query) and node not in self.plan.order:
            return  # dead code
        match op:
            case Query(constant=int(size)):
                self.env[node] = size
            case Mix():
                self.env[node] = self._layer(node, op)
            case Channelwise():
                self.env[node] = self._channelwise(node, op)
            case Gate():
                self.env[node] = self._gate(node, op)
            case Elementwise():
                self.env[node] = self._elementwise(node, op)
            case Gather():
                self.env[node] = self._gather(node, op)
            case Constant():
                self.constants[node] = self._constant(node)
                name = str(node.target) if node.op == "get_attr" else f"_{node.name}"
                self.env[node] = self._constant_buffer(node, name, self.constants[node])
            case _:
                if all(n in self.env for n in node.all_input_nodes):
                    self.env[node] = self._copy(node, self._operands(node, op))

    def _operands(self, node: Node, op: Op | None) -> dict[Node, Node]:
        """The operands of `node`, aligned to what it wants."""
        if op is None or isinstance(op, Query):
            return {}
        wants = self.plan.wants[node]
        left_out = self.plan.left_out.get(node, (False,) * len(wants))
        aligned = {
            operand: self._align(operand, wanted)
            for operand, wanted, out in zip(op.operands, wants, left_out, strict=True)
            if not out
        }
        return aligned | self._own_copies(node, aligned)

    def _own_copies(self, node: Node, operands: dict[Node, Node]) -> dict[Node, Node]:
        """Copies of operands that `node` overwrites in place: their memory may be shared here.

        Also for `as_left_by(x, call)`, which is `x` as that call has left it.
        """
        read = operators.left_by(node)
        if read in self.copies:
            return {read[0]: self.copies[read]}
        own = {found for user in node.users if (found := operators.left_by(user))}
        for value, call in own:
            if call is node and value in self.analysis.values:  # a tensor
                copied = self.graph.call_method("clone", (operands[value],))
                self.copies[value, call] = copied
        return {value: new for (value, call), new in self.copies.items() if call is node}

    def _align(self, node: Node, wanted: Order) -> Node:
        """The tensor of `node` with exactly the channels `wanted`, -1 giving a zero channel."""
        value = self.analysis.values.get(node)
        if isinstance(self.analysis.ops[node], Constant):
            return self._cut_constant(node, wanted)
        if value is None or value.dim is None:
            return self.env[node]  # type: ignore[no-any-return]
        everything = np.arange(value.channels)
        wanted = everything if wanted is None else wanted
        held = self.plan.order[node]
        held = everything if held is None else held
        if np.array_equal(held, wanted):
            return self.env[node]  # type: ignore[no-any-return]
        key = (node, wanted.tobytes())
        if key not in self.aligned:
            place = np.full(value.channels + 1, len(held))  # the last one is for -1
            place[held] = np.arange(len(held))
            self.aligned[key] = self._select(self.env[node], value, place[wanted], len(held))
        return self.aligned[key]

    def _select(self, x: Node, value: Value, positions: IntArray, held: int) -> Node:
        """Channels of `x` by position; position `held`, one past the end, is a zero channel."""
        call = self.graph.call_function
        count, dim = len(positions), value.dim
        assert dim is not None
        if np.array_equal(positions, np.arange(held)):
            return x
        if is_run(positions) and positions[-1] < held:
            return call(torch.narrow, (x, dim, int(positions[0]), count))
        real = np.flatnonzero(positions < held)
        if len(real) < count and len(real) and is_run(real) and is_run(positions[real]):
            x = self._select(x, value, positions[real], held)
            other_dims = [0, 0] * (len(value.shape) - 1 - dim)
            return call(F.pad, (x, (*other_dims, int(real[0]), count - 1 - int(real[-1]))))
        if len(real) < count:
            zero = call(torch.zeros_like, (call(torch.narrow, (x, dim, 0, 1)),))
            x = call(torch.cat, ([x, zero], dim))
        index = torch.from_numpy(positions).to(self.device)
        return call(torch.index_select, (x, dim, self._buffer("channels", index)))

    def _cut_constant(self, node: Node, wanted: Order) -> Node:
        """A constant, cut along the dimension that its reader finds the channels in."""
        if wanted is None:
            return self.env[node]  # type: ignore[no-any-return]
        whole = self.constants[node]
        dim = constant_dim(self.analysis, self.plan, node, whole)
        cut = whole.index_select(dim, torch.from_numpy(wanted).to(whole.device))
        return self._constant_buffer(node, f"_{node.name}", cut)

    def _constant_buffer(self, node: Node, name: str, value: Tensor) -> Node:
        """The buffer that replaces a `Constant` node."""
        target = self._put(name, value)
        if node in self.computed:
            self.computed_buffers[target] = node
        return self.graph.get_attr(target)

    def _constant(self, node: Node) -> Tensor:
        """What a `Constant` node holds, computed again from the parameters of the source."""
        ahead = [node]
        while ahead:
            missing = [n for n in ahead[-1].all_input_nodes if n not in self.constants]
            if missing:
                ahead += missing
            elif (ready := ahead.pop()) not in self.constants:
                self.constants[ready] = self._compute(ready)
        return self.constants[node]

    def _compute(self, node: Node) -> Tensor:
        """The same, where what it is computed from is known."""
        args, kwargs = map_arg((node.args, node.kwargs), self.constants.__getitem__)
        whole = node.op == "get_attr" or operators.key(node, self.source) in _MOVES
        if not whole or self.computed.intersection(node.all_input_nodes):
            self.computed.add(node)
        with torch.no_grad():
            value: Tensor = getattr(self.interpreter, node.op)(node.target, args, kwargs)
        return value.detach()

    def _copy(
        self, node: Node, operands: dict[Node, Node], wanted: Order = None, channels: int = 0
    ) -> Node:
        """The same call on other operands, out of place, its module private to the new graph.

        Of the `channels` of the module only those `wanted` are kept.
        """
        new = self.graph.node_copy(node, lambda n: operands.get(n, self.env[n]))
        op = self.analysis.ops.get(node)
        if isinstance(op, FullWidth) and op.effect:
            return new
        operators.out_of_place(new)
        operators.tolerate_strides(new)
        if node.op == "call_module":
            name = str(node.target)
            kept = None if wanted is None or is_whole(wanted, channels) else wanted
            module = self.source.get_submodule(name)
            key = module, None if kept is None else kept.tobytes()
            new.target = self._module(name, key, lambda: private_copy(module, kept, channels))
        return new

    def _layer(self, node: Node, op: Mix) -> Node:
        (x,) = self._operands(node, op).values()
        layer: Any = self.source.get_submodule(op.layer)
        plan = self.plan.layers[node]
        computed = self._constant(node.args[1]) if is_weighted(layer) else None  # type: ignore[arg-type]

        def make() -> nn.Module:
            weight, bias = folded_weight(self.source, layer, plan, computed)
            stored = plan.lowering, plan.filters, plan.inputs
            return emit(layer, weight, bias, *stored, op.structural_groups)

        key = layer, plan.key, None if computed is None else bytes_of(computed)
        size = operators.output_size(node, layer)
        sizes = () if size is None else (map_arg(size, self.env.__getitem__),)
        return self.graph.call_module(self._module(op.layer, key, make), (x, *sizes))

    def _channelwise(self, node: Node, op: Channelwise) -> Node:
        if node in self.plan.folded:
            return self.env[op.operands[0]]  # type: ignore[no-any-return]
        wanted = self.plan.wants[node][0]
        assert wanted is not None
        channels = self.analysis.values[op.operands[0]].channels
        new = self._copy(node, self._operands(node, op), wanted, channels)
        if isinstance(op, Statistics) and node.op == "call_function" and len(wanted) < channels:
            narrow_call(new, channels)
        self._resize(new, node)
        squeezes = operators.key(node, self.source) in operators.SQUEEZES
        if squeezes and len(node.args) == 1 and not node.kwargs:
            before = self.analysis.values[op.operands[0]]
            ones = [d for d, n in enumerate(before.shape) if n == 1 and d != before.dim]
            new.args = (new.args[0], tuple(ones))
        return new

    def _gate(self, node: Node, op: Gate) -> Node:
        gate = self.source.get_submodule(op.gate)
        assert isinstance(gate, ChannelGate)
        (x,) = self._operands(node, op).values()
        (wanted,) = self.plan.wants[node]
        assert wanted is not None
        alive = gate.alive.cpu()[torch.from_numpy(wanted)]
        if alive.all():
            return x
        shape = [1] * len(self.analysis.values[node].shape)
        shape[gate.dim] = -1
        mask = self._buffer("alive", alive.reshape(shape).to(gate.alive.device))
        return self.graph.call_function(torch.where, (mask, x, 0.0))

    def _elementwise(self, node: Node, op: Elementwise) -> Node:
        operands = self._operands(node, op)
        if len(operands) < len(op.operands):
            (term,) = operands.values()
            return term
        new = self._copy(node, operands)
        self._resize(new, node)
        return new

    def _resize(self, new: Node, node: Node) -> None:
        """Where the sizes of a result are named, name that of the channels that it has."""
        order, dim = self.plan.order[node], self.analysis.values[node].dim
        if operators.key(node, self.source) in operators.SIZED:
            assert order is not None
            assert dim is not None
            sizes = [self.env[s] if isinstance(s, Node) else s for s in operators.sizes(node)]
            sizes[dim] = len(order)
            new.args, new.kwargs = (new.args[0], tuple(sizes)), {}

    def _gather(self, node: Node, op: Gather) -> Node:
        dim = self.analysis.values[node].dim
        pieces = [
            self._align(operand, wanted)
            for operand, wanted in zip(op.operands, self.plan.wants[node], strict=True)
            if wanted is not None and len(wanted)
        ]
        return pieces[0] if len(pieces) == 1 else self.graph.call_function(torch.cat, (pieces, dim))

    def _module(self, name: str, key: tuple[object, ...], make: Callable[[], nn.Module]) -> str:
        """The path of the module for `key`, which is made, under `name`, on its first use."""
        if key not in self.emitted:
            self.emitted[key] = self._put(name, make())
        return self.emitted[key]

    def _put(self, name: str, value: nn.Module | Tensor) -> str:
        """Register a module or tensor under `name`, or that with a number where it is taken."""
        *path, leaf = name.split(".")
        parent = self.root
        for part in path:
            if not isinstance(getattr(parent, part, None), nn.Module):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        free, number = leaf, self.taken[name]
        while hasattr(parent, free):
            number += 1
            free = f"{leaf}_{number}"
        self.taken[name] = number
        if isinstance(value, nn.Module):
            parent.add_module(free, value)
        else:
            parent.register_buffer(free, value.detach().clone())
        return ".".join((*path, free))

    def _buffer(self, name: str, value: Tensor) -> Node:
        return self.graph.get_attr(self._put(f"_{name}", value))
