"""From liveness to a plan: which channels every compact value holds, and in which order.

A compact value is a tensor that holds some channels of the original one; the others are zero or
unread. Every operator wants its operands aligned to certain lists of channels:

1. A layer takes its input as it is. Filters that read the same live channels form a group, groups
   of equal size form one grouped convolution, filters are ordered group by group. Every group of
   a linear layer is a part of its own.
2. A channelwise operator takes its input as it is, plus channels that are zero before it and a
   constant after it. A depthwise convolution takes only what is kept.
3. An elementwise operator aligns its operands to the longest of them, without what is not kept.
4. A gather takes from each operand the channels that are kept; all of them, if it moves all.
5. An opaque operator takes its operands whole.
6. A batch norm that alone reads a layer is folded into it, unless it makes a constant of a zero.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from torch import fx, nn
from torch.fx.node import Node

from dspfx.passes import operators
from dspfx.passes.liveness import Liveness
from dspfx.passes.values import (
    BoolArray,
    ChannelAnalysis,
    Channelwise,
    Constant,
    Elementwise,
    Gate,
    Gather,
    IntArray,
    Mix,
    Op,
    any_along,
)

Order = IntArray | None  # None: all channels, or a tensor that is handled whole


@dataclass(frozen=True)
class GroupedConv:
    """k groups of equal size, emitted as one convolution.

    Attributes:
        filters: int `[k, f]`, original numbers of the filters.
        inputs: int `[k, c]`, original input channels of each group.
        constant: the filters read nothing that is not zero: one input, zero weights.
    """

    filters: IntArray
    inputs: IntArray
    constant: bool


@dataclass(frozen=True)
class LayerPlan:
    """How one call of a layer is emitted: grouped convolutions whose outputs are concatenated.

    Attributes:
        parts: in the order of the output channels.
        norm: the batch norm that is folded into the layer.
    """

    parts: tuple[GroupedConv, ...]
    norm: Node | None

    @property
    def order(self) -> IntArray:
        """The original numbers of the filters, in output order."""
        return np.concatenate([part.filters.reshape(-1) for part in self.parts])

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(filters, input channels) of every group."""
        return [p.filters.shape[1:] + p.inputs.shape[1:] for p in self.parts for _ in p.filters]


@dataclass(frozen=True)
class CompactionPlan:
    """What `compact` does.

    Attributes:
        order: for every node that is emitted, the original channels its tensor holds.
        wants: for every node, the channels that it wants of each operand, -1 for a zero.
        layers: the plans of convolutions and linear layers.
        folded: the batch norms that disappear into a layer.
        left_out: the operands that an elementwise operator does without.
    """

    order: dict[Node, Order]
    wants: dict[Node, tuple[Order, ...]]
    layers: dict[Node, LayerPlan]
    folded: frozenset[Node]
    left_out: dict[Node, tuple[bool, ...]]


def plan(root: fx.GraphModule, analysis: ChannelAnalysis, live: Liveness) -> CompactionPlan:
    """Decide the order of every value, the grouping of every layer and which norms to fold."""
    planner = _Planner(root, analysis, live)
    for node, op in analysis.ops.items():
        if node in live.kept:
            planner.place(node, op)
    return CompactionPlan(
        planner.order,
        planner.wants,
        planner.layers,
        frozenset(p.norm for p in planner.layers.values() if p.norm is not None),
        live.skipped,
    )


class _Planner:
    def __init__(self, root: fx.GraphModule, analysis: ChannelAnalysis, live: Liveness) -> None:
        self.root = root
        self.analysis = analysis
        self.live = live
        self.order: dict[Node, Order] = {}
        self.wants: dict[Node, tuple[Order, ...]] = {}
        self.layers: dict[Node, LayerPlan] = {}
        self.readers: dict[Node, list[Node]] = defaultdict(list)
        for node, op in analysis.ops.items():
            for operand in op.operands:
                self.readers[operand].append(node)

    def place(self, node: Node, op: Op) -> None:
        kept = self.live.kept.get(node, np.zeros(0, bool))
        match op:
            case Mix():
                self._place_layer(node, op, kept)
            case Channelwise():
                self._place_channelwise(node, op, kept)
            case Gate():
                self._set(node, self.held(op.operands[0]), (self.held(op.operands[0]),))
            case Elementwise():
                self._place_elementwise(node, op, kept)
            case Gather():
                self._place_gather(node, op, kept)
            case _:
                self._set(node, None, tuple(None for _ in op.operands))

    def held(self, node: Node) -> IntArray:
        """The channels that the compact value of `node` holds."""
        order = self.order[node]
        return np.arange(self.analysis.values[node].channels) if order is None else order

    def _set(self, node: Node, order: Order, wants: tuple[Order, ...]) -> None:
        self.order[node], self.wants[node] = order, wants

    def _place_layer(self, node: Node, op: Mix, kept: BoolArray) -> None:
        inputs = np.arange(op.channels) if op.restored else self.held(op.operands[0])
        filters = np.flatnonzero(kept)
        live, row = self.live.reads_live(node, op)[:, inputs], self.live.reads[op.layer].row
        layer = self.root.get_submodule(op.layer)
        parts = _parts(filters, live, row, alike=not isinstance(layer, nn.Linear))
        absolute = tuple(GroupedConv(p.filters, inputs[p.inputs], p.constant) for p in parts)
        self.layers[node] = LayerPlan(absolute, self._norm_to_fold(node, kept))
        self._set(node, self.layers[node].order, (None if op.restored else inputs,))

    def _norm_to_fold(self, node: Node, kept: BoolArray) -> Node | None:
        readers = self.readers[node]
        if len(readers) != 1 or len(node.users) != 1:
            return None
        norm = readers[0]
        if norm.op != "call_module" or norm not in self.live.kept:
            return None
        module = self.root.get_submodule(str(norm.target))
        if operators.key(norm, self.root) not in operators.BATCH_NORMS:
            return None
        foldable = isinstance(self.analysis.ops[norm], Channelwise) and node.op == "call_module"
        if not foldable or getattr(module, "running_mean", None) is None:
            return None
        on_channels = self.analysis.values[node].dim == 1
        makes_constants = bool((self.live.kept[norm] & ~kept).any())
        return norm if on_channels and not makes_constants else None

    def _place_channelwise(self, node: Node, op: Channelwise, kept: BoolArray) -> None:
        operand = op.operands[0]
        held = self.held(operand)
        needed = np.flatnonzero(any_along(kept.reshape(-1, op.repeat), 1))
        if op.macs_per_channel:
            held = held[np.isin(held, needed)]
        wanted = np.concatenate([held, np.setdiff1d(needed, held)])
        blocks = wanted[:, None] * op.repeat + np.arange(op.repeat)
        self._set(node, blocks.reshape(-1), (wanted,))

    def _place_elementwise(self, node: Node, op: Elementwise, kept: BoolArray) -> None:
        left_out = self.live.skipped[node]
        terms = [
            self.held(operand)
            for operand, spans, out in zip(op.operands, op.spans, left_out, strict=True)
            if spans and not out and not isinstance(self.analysis.ops[operand], Constant)
        ]
        wanted = np.flatnonzero(kept)
        if terms:
            longest = max(terms, key=len)
            if not all(np.array_equal(held, longest) for held in terms):
                longest = longest[kept[longest]]
            wanted = np.concatenate([longest, np.setdiff1d(wanted, longest)])
        self._set(node, wanted, tuple(wanted if spans else None for spans in op.spans))

    def _place_gather(self, node: Node, op: Gather, kept: BoolArray) -> None:
        wants: list[IntArray] = []
        order: list[IntArray] = []
        for k, operand in enumerate(op.operands):
            moved = np.flatnonzero(op.source == k)
            held = self.held(operand) if operand in self.order else np.zeros(0, np.int64)
            place = np.full(self.analysis.values[operand].channels, -1)
            place[held] = np.arange(len(held))
            moved = moved[place[op.index[moved]] >= 0]
            moves_all_once = len(moved) == len(held) == len(np.unique(op.index[moved]))
            if not moves_all_once:
                moved = moved[kept[moved]]
            moved = moved[np.argsort(place[op.index[moved]], kind="stable")]
            wants.append(op.index[moved])
            order.append(moved)
        if not any(len(moved) for moved in order):
            wants[0], order[0] = np.array([-1]), np.flatnonzero(kept)[:1]
        self._set(node, np.concatenate(order), tuple(wants))


def _parts(filters: IntArray, live: BoolArray, row: IntArray, alike: bool) -> list[GroupedConv]:
    """Group filters by what they read, and `alike` groups by size; inputs are positions."""
    by_inputs: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for r in dict.fromkeys(row[filters].tolist()):
        inputs = tuple(np.flatnonzero(live[r]).tolist()) if r >= 0 else ()
        by_inputs[inputs].extend(filters[row[filters] == r].tolist())
    by_size: dict[tuple[int, int], list[tuple[int, ...]]] = defaultdict(list)
    for inputs, members in by_inputs.items():
        by_size[len(members), len(inputs)].append(inputs)
    parts = []
    for (_, width), lists in by_size.items():
        rows = np.array([sorted(by_inputs[inputs]) for inputs in lists], np.int64)
        positions = np.array(lists, np.int64) if width else np.zeros((len(lists), 1), np.int64)
        step = len(lists) if alike else 1
        parts += [
            GroupedConv(rows[i : i + step], positions[i : i + step], constant=not width)
            for i in range(0, len(lists), step)
        ]
    return parts
