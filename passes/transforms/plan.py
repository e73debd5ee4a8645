"""Planning: from liveness to the channels that every compact value holds, and their order.

A compact value is a tensor that holds some channels of the original one; the others are zero or
unread. Every operator wants its operands aligned to certain lists of channels:

1. A layer takes its input as it is. Filters that read the same live channels form a group; the
   filters are ordered as the layout wants, and the form is the one that the cost model prefers of
   those that have no more weights than the original layer.
   Calls of one layer that keep the same have the form of the first of them: they share weights.
   Where those that do not would have more weights together than the layer had, all calls have the
   form of what any of them keeps, and fold no norm.
2. A channelwise operator takes its input as it is, plus channels that are zero before it and a
   constant after it. A depthwise convolution takes only what is kept. A norm over the channels
   takes all that there are.
3. An elementwise operator aligns its operands to the longest of them, without what is not kept.
4. What merges channels takes those of which the kept ones are made, in the order it needs.
   A gather takes from each operand the channels that are kept; all of them, if it moves all.
5. An opaque operator takes its operands whole.
6. A batch norm that alone reads a layer, but for its sizes, is folded into it, unless it makes a
   constant of a zero.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import fx, nn
from torch.fx.node import Node

from dspfx.passes.analysis import operators
from dspfx.passes.analysis.channel_ops import (
    ChannelAnalysis,
    Channelwise,
    Constant,
    Elementwise,
    Gate,
    Gather,
    Merge,
    Mix,
    Op,
    Query,
    Statistics,
)
from dspfx.passes.analysis.liveness import Liveness
from dspfx.passes.lowering.cost_model import CostModel
from dspfx.passes.lowering.forms import Group, Lowering, forms, groups_of, weights
from dspfx.passes.transforms.layout import geometry, layout
from dspfx.utils.arrays import BoolArray, IntArray, any_along

Order = IntArray | None  # None: all channels, or a tensor that is handled whole


@dataclass(frozen=True)
class LayerPlan:
    """How one call of a layer is emitted. Channels are counted as they are stored.

    Attributes:
        groups: what the layer consists of.
        lowering: how they are emitted.
        filters: the original number of every filter.
        inputs: the original number of every input channel.
        norm: the batch norm that is folded into the layer.
    """

    groups: tuple[Group, ...]
    lowering: Lowering
    filters: IntArray
    inputs: IntArray
    norm: Node | None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for calls of a layer that are emitted alike."""
        parts = [
            (part.filters.shape, part.filters.tobytes(), part.inputs.shape, part.inputs.tobytes())
            for part in self.lowering
        ]
        norm = None if self.norm is None else self.norm.target
        return self.filters.tobytes(), self.inputs.tobytes(), tuple(parts), norm


@dataclass(frozen=True)
class CompactionPlan:
    """The decisions that `compact` carries out.

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


def plan(
    root: fx.GraphModule,
    analysis: ChannelAnalysis,
    live: Liveness,
    model: CostModel,
    fold: bool = True,
) -> CompactionPlan:
    """Decide the order of every value, the form of every layer and which norms to fold.

    Args:
        root: in evaluation mode; only read.
        analysis, live: of its graph.
        model: decides about the forms.
        fold: norms may disappear into layers; training needs them.
    """
    planner = _planned(_Planner(root, analysis, live, model, fold))
    grown = _grown(analysis, planner.layers)
    if grown:
        planner = _planned(_Planner(root, analysis, live, model, fold, grown))
    return CompactionPlan(
        planner.order,
        planner.wants,
        planner.layers,
        frozenset(p.norm for p in planner.layers.values() if p.norm is not None),
        live.skipped,
    )


def _planned(planner: "_Planner") -> "_Planner":
    for node, op in planner.analysis.ops.items():
        if node in planner.live.kept:
            planner.place(node, op)
    return planner


def _grown(analysis: ChannelAnalysis, layers: dict[Node, LayerPlan]) -> frozenset[str]:
    """The layers whose calls have more weights together than the layer had."""
    dense: dict[str, int] = {}
    forms: dict[str, dict[object, int]] = defaultdict(dict)
    for node, layer in layers.items():
        op = analysis.ops[node]
        assert isinstance(op, Mix)
        dense[op.layer] = op.filters * op.channels // op.structural_groups
        forms[op.layer][layer.key] = weights(layer.lowering)
    return frozenset(name for name, own in forms.items() if sum(own.values()) > dense[name])


class _Planner:
    def __init__(
        self,
        root: fx.GraphModule,
        analysis: ChannelAnalysis,
        live: Liveness,
        model: CostModel,
        fold: bool,
        joint: frozenset[str] = frozenset(),
    ) -> None:
        self.root = root
        self.fold = fold
        self.joint = joint  # layers whose calls are all emitted alike
        self.analysis = analysis
        self.live = live
        self.model = model
        self.place_of = layout(analysis, live, model)
        self.order: dict[Node, Order] = {}
        self.wants: dict[Node, tuple[Order, ...]] = {}
        self.layers: dict[Node, LayerPlan] = {}
        self.lowerings: dict[tuple[object, ...], Lowering] = {}  # of calls that keep the same
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
            case Merge():
                self._place_merge(node, op, kept)
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
        if op.layer in self.joint:
            filters, inputs, reads = self._of_all_calls(op.layer)
        else:
            inputs = np.arange(op.channels) if op.full_width else self.held(op.operands[0])
            filters = np.flatnonzero(kept)
            classes = self.analysis.class_of(node)[filters]
            filters = filters[np.argsort(self.place_of[classes], kind="stable")]
            reads = self.live.reads_live(node, op)
        live, row = reads[:, inputs], self.live.reads[op.layer].row
        groups = groups_of(np.arange(len(filters)), row[filters], live)
        of_filter = filters // (op.filters // op.structural_groups)
        structural_group = [int(of_filter[group.filters[0]]) for group in groups]
        called = op.layer, filters.tobytes(), inputs.tobytes(), live.tobytes()
        if called not in self.lowerings:
            grouping = not isinstance(self.root.get_submodule(op.layer), nn.Linear)
            size = geometry(self.analysis, node, op, len(inputs))
            seconds = partial(self.model.seconds, geometry=size)
            most = op.filters * op.channels // op.structural_groups
            self.lowerings[called] = min(
                forms(groups, structural_group, grouping, most), key=seconds
            )
        lowering = self.lowerings[called]
        norm = None if op.layer in self.joint else self._norm_to_fold(node, kept)
        self.layers[node] = LayerPlan(tuple(groups), lowering, filters, inputs, norm)
        self._set(node, filters, (None if op.full_width else inputs,))

    def _of_all_calls(self, layer: str) -> tuple[IntArray, IntArray, BoolArray]:
        """The filters that any call keeps, the inputs that any holds, and what is read of these."""
        calls = [
            (node, op)
            for node, op in self.analysis.ops.items()
            if isinstance(op, Mix) and op.layer == layer and node in self.live.kept
        ]
        every = np.ones(calls[0][1].channels, bool)
        kept = [self.live.kept[node] for node, _ in calls]
        held = [every if op.full_width else self.live.kept[op.operands[0]] for _, op in calls]
        reads = [self.live.reads_live(node, op) for node, op in calls]
        filters, inputs = (np.flatnonzero(any_along(np.stack(own), 0)) for own in (kept, held))
        return filters, inputs, any_along(np.stack(reads), 0)

    def _norm_to_fold(self, node: Node, kept: BoolArray) -> Node | None:
        readers = [r for r in self.readers[node] if not isinstance(self.analysis.ops[r], Query)]
        users = [u for u in node.users if not isinstance(self.analysis.ops.get(u), Query)]
        if not self.fold or len(readers) != 1 or len(users) != 1:
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
        own = None if np.array_equal(wanted, np.arange(len(kept))) else wanted  # of its parameters
        others = (own,) * (len(op.operands) - 1) if isinstance(op, Statistics) else ()
        self._set(node, blocks.reshape(-1), (wanted, *others))

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

    def _place_merge(self, node: Node, op: Merge, kept: BoolArray) -> None:
        held = self.held(op.operands[0])
        place = np.full(len(kept) * op.count, len(held))
        place[held] = np.arange(len(held))
        channels = np.flatnonzero(kept)
        first = place[op.read_by(channels, len(kept))].min(0, initial=len(held))
        channels = channels[np.argsort(first, kind="stable")]
        self._set(node, channels, (op.operand_for(channels, len(kept)),))

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
