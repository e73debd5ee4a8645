"""Layout: the order in which channels are stored, so that groups read and write contiguous ones.

Channels that are added to each other share a place in every tensor they are in: the order is one of
coupling classes. Every layer would like

1. what each of its groups reads side by side: its inputs sorted by who reads them, in the order of
   a Gray code, in which neighbours differ in one reader. For two groups that is [A only | both | B
   only], and exact.
2. what each of its groups writes side by side: its filters sorted by group.
3. what it writes to a stream side by side, and what is used of the stream, where that is not all:
   then the rest is padding, or cut off.

The layer that saves the most time by it comes first; the others sort within ranges that are still
unordered, every second range backwards, so that the ends of neighbouring ranges meet.
Pinned channels keep their place.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.fx.node import Node

from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Constant, Elementwise, Mix
from dspfx.passes.analysis.liveness import Liveness
from dspfx.passes.analysis.removable import pinned_classes
from dspfx.passes.lowering.cost_model import CostModel, Geometry
from dspfx.passes.lowering.forms import Group, dense, groups_of, separate
from dspfx.utils.arrays import IntArray

MOST_READERS = 60  # bits of an integer


@dataclass(frozen=True)
class _Wish:
    """A preference of a layer: seconds saved if `classes` are sorted by `key`; both int `[n]`."""

    saves: float
    classes: IntArray
    key: IntArray


def layout(analysis: ChannelAnalysis, live: Liveness, model: CostModel) -> IntArray:
    """The place of every coupling class among all of them, int `[classes]`."""
    count = analysis.class_count
    stretch, order = np.zeros(count, np.int64), np.arange(count)
    fixed = np.fromiter(pinned_classes(analysis, {}), np.int64)
    for wish in sorted(_wishes(analysis, live, model), key=lambda wish: -wish.saves):
        key = np.zeros(count, np.int64)
        key[wish.classes] = wish.key
        key[fixed] = 0
        order, stretch = _refine(order, stretch, key)
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    return place


def _wishes(analysis: ChannelAnalysis, live: Liveness, model: CostModel) -> Iterator[_Wish]:
    for node, op in analysis.ops.items():
        if node in live.kept:
            match op:
                case Mix(full_width=False):
                    yield from _of_layer(node, op, analysis, live, model)
                case Elementwise():
                    yield from _of_stream(node, op, analysis, live, model)


def _of_layer(
    node: Node, op: Mix, analysis: ChannelAnalysis, live: Liveness, model: CostModel
) -> Iterator[_Wish]:
    """Preferences 1 and 2 of a layer, if both together save time."""
    held, filters = np.flatnonzero(live.kept[op.operands[0]]), np.flatnonzero(live.kept[node])
    row = live.reads[op.layer].row[filters]
    groups = groups_of(np.arange(len(filters)), row, live.reads_live(node, op)[:, held])
    where = geometry(analysis, node, op, len(held))
    gain = model.seconds(dense(groups), where) - model.seconds(separate(_tidy(groups)), where)
    if len(groups) == 1 or len(groups) > MOST_READERS or gain <= 0:
        return
    gathered = sum(len(group.inputs) for group in groups) * where.read
    saves = min(gain, model.gather * gathered)
    yield _Wish(saves, analysis.class_of(op.operands[0])[held], _by_reader(groups, len(held)))
    writer = np.zeros(len(filters), np.int64)
    for number, group in enumerate(groups):
        writer[group.filters] = number
    saves = min(gain, model.gather * len(filters) * where.written)
    yield _Wish(saves, analysis.class_of(node)[filters], writer)


def _of_stream(
    node: Node, op: Elementwise, analysis: ChannelAnalysis, live: Liveness, model: CostModel
) -> Iterator[_Wish]:
    """Preference 3."""
    kept, value = live.kept[node], analysis.values[node]
    each = math.prod(value.shape) // max(1, value.shape[0]) // max(1, value.channels)
    for operand, spans, out in zip(op.operands, op.spans, live.skipped[node], strict=True):
        if not spans or out or isinstance(analysis.ops[operand], Constant):
            continue
        held = live.kept[operand]
        if not np.array_equal(held, kept):
            either = held | kept
            key = (held & kept)[either].astype(np.int64)
            saves = model.gather * int(either.sum()) * each
            yield _Wish(saves, analysis.class_of(node)[either], key)


def geometry(analysis: ChannelAnalysis, node: Node, op: Mix, channels: int) -> Geometry:
    """The geometry of the layer that `node` calls, if its input has `channels` channels."""
    shape, result = analysis.values[op.operands[0]].shape, analysis.values[node].shape
    samples = max(1, shape[0])
    return Geometry(
        channels,
        max(1, math.prod(shape) // samples // op.channels),
        max(1, math.prod(result) // samples // op.filters),
        op.positions,
        op.taps,
    )


def _tidy(groups: list[Group]) -> list[Group]:
    """The groups as they would be in the best order: nothing needs a gather."""
    starts = np.cumsum([0, *(len(group.filters) for group in groups)])
    return [
        Group(start + np.arange(len(group.filters)), np.arange(len(group.inputs)))
        for start, group in zip(starts[:-1], groups, strict=True)
    ]


def _by_reader(groups: list[Group], channels: int) -> IntArray:
    """For every channel the place of its set of readers in the order of a Gray code."""
    code = np.zeros(channels, np.int64)
    for number, group in enumerate(groups):
        code[group.inputs] |= 1 << number
    place = code.copy()
    for shift in range(1, MOST_READERS):
        place ^= code >> shift
    return place


def _refine(order: IntArray, stretch: IntArray, key: IntArray) -> tuple[IntArray, IntArray]:
    """Sort every range of `order` by `key`; equal keys within a range form the new ranges."""
    backwards = np.where(stretch % 2 == 1, -1, 1) * key[order]
    by = np.lexsort((np.arange(len(order)), backwards, stretch))
    order, stretch, backwards = order[by], stretch[by], backwards[by]
    starts = (np.diff(stretch, prepend=-1) != 0) | (np.diff(backwards, prepend=0) != 0)
    return order, np.cumsum(starts) - 1
