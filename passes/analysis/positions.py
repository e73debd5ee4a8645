"""Positions (pixels, tokens) of values: whether they stay at every size, and how many there are.

The channel analysis sees one example. A crop or a pad that does nothing to it may do something to
another image, and positions that become channels may be more.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from dspfx.layers.gated import LAYERS
from dspfx.layers.gates import ChannelGate
from dspfx.passes.analysis import operators
from dspfx.passes.analysis.channel_ops import Constant, Op, Query, Value
from dspfx.passes.analysis.movement import Move

# work on each element, or each channel, of what has no positions
_PASSING = operators.ELEMENTWISE | operators.RELAYOUTS | operators.BATCH_NORMS | {ChannelGate}


class Positions:
    """The positions of the values of one graph, as far as it has been analysed.

    Args:
        root: the module whose graph it is.
        ops, values: of its nodes; they grow.
    """

    def __init__(
        self, root: fx.GraphModule, ops: Mapping[Node, Op], values: Mapping[Node, Value]
    ) -> None:
        self._root = root
        self._ops = ops
        self._values = values
        self._fixed: dict[Node, bool] = {}

    def are_left_alone(self, node: Node, dim: int) -> bool:
        """Whether an operator that moves whole channels, along `dim`, would at every size.

        A crop or a pad that happens to do nothing to the example must not be left out.
        """
        first = operands_of(node, self._ops)[0]
        if node.target is operator.getitem and self._key(first) in operators.SPLITS:
            node, first = first, operands_of(first, self._ops)[0]
        if first not in self._values:
            return True  # a concatenation
        key, shape = self._key(node), self._values[first].shape
        others = [d for d in range(len(shape)) if d != dim]
        if key is operator.getitem:
            index: Any = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            items = _without_ellipsis(index, len(shape))
            return all(_is_all(items[d]) for d in range(len(items)) if d != dim)
        if key is torch.nn.functional.pad:
            pads: Any = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
            own = len(shape) - 1 - dim  # pads are given from the last dimension on
            return all(type(p) is int and (p == 0 or i // 2 == own) for i, p in enumerate(pads))
        if key in operators.ALONG_ONE:
            along = operators.along(node)
            return isinstance(along, int) and along % len(shape) == dim
        if key in operators.REPEATS:
            times = operators.sizes(node)
            return len(times) == len(shape) and all(times[d] == 1 for d in others)
        if key in ("expand_as", "repeat_interleave", torch.repeat_interleave):
            return all(shape[d] > 1 for d in others)
        return True

    def are_for_one_size(self, node: Node, operand: Node, result: Tensor, move: Move) -> bool:
        """Whether what is made of a channel's positions could not be cut for another image.

        Positions that become channels, as in `flatten(1)`, are as many as the image has. A linear
        layer after them has a weight for each, and so fixes their number; others do not.
        """
        if self._key(node) not in operators.FLATTENS | operators.SIZED:
            return False
        fewer = result.dim() < len(self._values[operand].shape)
        merged = fewer and (result.dim() == 2 or (move.repeat or 1) > 1)
        return merged and not self.are_fixed(operand) and not self._linear_reads(node)

    def are_fixed(self, node: Node) -> bool:
        """Whether the number of positions is the same for every image, as after a global pool."""
        for earlier in node.graph.nodes:  # each after what it reads
            if earlier not in self._fixed:
                self._fixed[earlier] = self._fixes_them(earlier)
            if earlier is node:
                break
        return self._fixed[node]

    def _fixes_them(self, node: Node) -> bool:
        of_all_sizes = node.target is getattr and node.args[1] in ("dtype", "device", "layout")
        if of_all_sizes or isinstance(self._ops.get(node), Constant):
            return True
        key = self._key(node)
        if key in operators.FIXED_POOLS:
            size: Any = (
                self._root.get_submodule(str(node.target)).output_size
                if node.op == "call_module"
                else node.kwargs.get("output_size", node.args[1] if len(node.args) > 1 else None)
            )
            return all(type(n) is int for n in (size if isinstance(size, tuple | list) else [size]))
        read = [n for n in node.all_input_nodes if not isinstance(self._ops.get(n), Constant)]
        if key in operators.REDUCTIONS and len(read) == 1 and read[0] in self._values:
            rank = len(self._values[read[0]].shape)
            if rank > 2 and set(range(2, rank)) <= (operators.reduced(node, rank) or set()):
                return True
        return bool(node.all_input_nodes) and all(self._fixed[n] for n in read)

    def _linear_reads(self, node: Node) -> bool:
        """Whether only linear layers read `node`, directly or through elementwise operators."""
        ahead = [*node.users]
        while ahead:
            user = ahead.pop()
            key = self._key(user)
            if len(user.all_input_nodes) > 1 or key not in LAYERS | _PASSING:
                return False
            ahead += user.users if key not in LAYERS else ()
        return True

    def _key(self, node: Node) -> Any:
        return operators.key(node, self._root) if node.op.startswith("call") else None


def operands_of(node: Node, ops: Mapping[Node, Op]) -> tuple[Node, ...]:
    """The inputs of `node` that carry tensors, each once."""
    return tuple(n for n in node.all_input_nodes if n in ops and not isinstance(ops[n], Query))


def _is_all(item: Any) -> bool:
    return isinstance(item, slice) and item == slice(None)


def _without_ellipsis(items: tuple[Any, ...], rank: int) -> list[Any]:
    """The items of an index, one for each of `rank` dimensions that it consumes."""
    full = [slice(None)] * (rank - sum(i is not ... and i is not None for i in items))
    at = next((n for n, item in enumerate(items) if item is ...), len(items))
    return [*items[:at], *full, *items[at + 1 :]]
