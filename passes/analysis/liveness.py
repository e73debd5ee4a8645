"""Liveness of channels: which are zero (forward), and which of the others are read (backward).

Two passes over the graph. It has no cycles, so one of each reaches the fixed point.

Forward, `zero[v][c]` (lattice: zero < unknown):
1. A filter that reads nothing, or only zeros, is zero unless it has a bias; a gated one always is.
2. A channelwise operator keeps a zero where running it on zeros gave exactly zero.
3. A gate makes zero what it holds dead, and everything of which what is shifted is zero.
4. A sum is zero where all its terms are, a product where any factor is.
5. A channel made of several is zero where all of them are, or the first one if it is absorbing.
   Moved channels stay what they were; padding with zeros is zero. All else is unknown.

Backward, `kept[v][c] = needed and not zero`:
6. A kept filter needs the live channels that it reads; other operators need the channels their
   kept channels are made of; an opaque operator and the outputs of the model need every channel,
   a norm over the channels every one that is not zero.
7. A value that something needed asks the shape of, but all of whose channels are zero, keeps one.
8. Widths that shall be multiples of n are rounded up with channels that are not zero; of a layer
   with groups of its own, those of the groups, to the widest.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch.fx.node import Node

from dspfx.passes.analysis.channel_ops import (
    ChannelAnalysis,
    Channelwise,
    Elementwise,
    FullWidth,
    Gate,
    Gather,
    Merge,
    Mix,
    Op,
    Query,
    Source,
    Statistics,
    is_wanted,
)
from dspfx.utils.arrays import BoolArray, IntArray, any_along, equal_rows


@dataclass(frozen=True)
class ReadLists:
    """What the filters of one layer read: filter o reads `lists[row[o]]`, nothing if -1.

    Attributes:
        row: int `[O]`.
        lists: bool `[R, C]` over all input channels of the layer.
    """

    row: IntArray
    lists: BoolArray

    @staticmethod
    def dense(mix: Mix) -> "ReadLists":
        """Every filter reads all channels of its structural group."""
        groups, width = mix.structural_groups, mix.channels // mix.structural_groups
        lists = np.kron(np.eye(groups, dtype=bool), np.ones((1, width), bool))
        return ReadLists(np.repeat(np.arange(groups), mix.filters // groups), lists)

    @staticmethod
    def grouped(mix: Mix, group: IntArray, keep: BoolArray, alive: BoolArray) -> "ReadLists":
        """From groups: filter o reads `keep[o's structural group, group[o]]`, if `alive[o]`.

        Args:
            mix: the layer.
            group: int `[O]`.
            keep: bool `[S, G, C/S]`.
            alive: bool `[O]`.
        """
        structural, groups, width = keep.shape
        lists = np.zeros((structural, groups, mix.channels), bool)
        for s in range(structural):
            lists[s, :, s * width : (s + 1) * width] = keep[s]
        row = np.arange(mix.filters) // (mix.filters // structural) * groups + group
        return ReadLists(np.where(alive, row, -1), lists.reshape(-1, mix.channels))

    @staticmethod
    def masked(mix: Mix, mask: BoolArray) -> "ReadLists":
        """From a mask, bool `[O, C/S]`: filters with equal rows share a list."""
        structural = mix.structural_groups
        group, rows = equal_rows(mask)
        keep = np.broadcast_to(rows, (structural, *rows.shape))
        return ReadLists.grouped(mix, group, keep, any_along(mask, 1))

    def mask(self, mix: Mix) -> BoolArray:
        """Bool `[O, C/S]`, the mask that these lists encode."""
        structural, width = mix.structural_groups, mix.channels // mix.structural_groups
        own = np.arange(mix.filters) // (mix.filters // structural)
        absolute = self.lists[self.row].reshape(mix.filters, structural, width)
        return absolute[np.arange(mix.filters), own] & (self.row >= 0)[:, None]


@dataclass(frozen=True)
class Liveness:
    """What `liveness` finds out.

    Attributes:
        reads: the lists by layer, as given or dense.
        zero: bool `[C]` for every value with channels.
        kept: bool `[C]` for every value that is needed at all; the others are absent.
        skipped: the all-zero operands that an elementwise operator may leave out.
    """

    reads: dict[str, ReadLists]
    zero: dict[Node, BoolArray]
    kept: dict[Node, BoolArray]
    skipped: dict[Node, tuple[bool, ...]]

    def reads_live(self, node: Node, mix: Mix) -> BoolArray:
        """Bool `[R, C]`, the lists of a layer without the channels that are zero."""
        return self.reads[mix.layer].lists & self.live_inputs(node, mix)

    def digest(self) -> bytes:
        """Equal where the same is alive, and read by the same filters."""
        found = hashlib.sha256()
        for reads in self.reads.values():
            found.update(np.ascontiguousarray(reads.row).tobytes())
            found.update(np.packbits(reads.lists).tobytes())
        for kept in self.kept.values():
            found.update(np.packbits(kept).tobytes())
        return found.digest()

    def live_inputs(self, node: Node, mix: Mix) -> BoolArray:
        """Bool `[C]`, the input channels of a layer that are not zero."""
        return _live_inputs(self.zero, node, mix)


def liveness(
    analysis: ChannelAnalysis,
    reads: Mapping[str, ReadLists],
    alive: Mapping[str, BoolArray] | None = None,
    round_to: int = 1,
) -> Liveness:
    """Run the forward and the backward pass.

    Args:
        analysis: of the graph.
        reads: the lists of the masked layers; the others are dense.
        alive: what each channel gate lets through; None if the gates follow the masks, which
            is how masks are evaluated before they are set.
        round_to: n.
    """
    lists = {
        op.layer: reads.get(op.layer) or ReadLists.dense(op)
        for op in analysis.ops.values()
        if isinstance(op, Mix)
    }
    zero: dict[Node, BoolArray] = {}
    for node, op in analysis.ops.items():
        if node in analysis.values:
            zero[node] = _zero(analysis, op, node, zero, lists, alive)
    return _Backward(analysis, lists, zero, alive, round_to).run()


def _zero(
    analysis: ChannelAnalysis,
    op: Op,
    node: Node,
    zero: dict[Node, BoolArray],
    reads: dict[str, ReadLists],
    alive: Mapping[str, BoolArray] | None,
) -> BoolArray:
    channels = analysis.values[node].channels
    match op:
        case Mix():
            row = reads[op.layer].row
            live = any_along(reads[op.layer].lists & _live_inputs(zero, node, op), 1)
            silent = (row < 0) | ~live[row]
            always = (row < 0) if alive is not None else silent
            return (silent & ~op.bias) | (always & op.gated)
        case Channelwise():
            return np.repeat(zero[op.operands[0]], op.repeat) & op.keeps_zero
        case Gate():
            follows = np.stack([zero[node] for node in op.follows])
            held = ~any_along(~follows, 0) if alive is None else ~alive[op.gate]
            return held | zero[op.operands[0]]
        case Elementwise():
            terms = [
                zero[operand] if len(zero[operand]) else np.zeros(channels, bool)
                for operand, spans in zip(op.operands, op.spans, strict=True)
                if spans
            ]
            broadcast = [o for o, spans in zip(op.operands, op.spans, strict=True) if not spans]
            muted = any(len(zero[o]) > 0 and bool(zero[o].all()) for o in broadcast)
            some = any_along(np.stack(terms), 0) | muted
            every = ~any_along(~np.stack(terms), 0) & all(op.spans)
            return (every & op.keeps_zero) | (some & op.absorbing)
        case Merge():
            read = zero[op.operands[0]][op.read_by(np.arange(channels), channels)]
            merged: BoolArray = ~any_along(~read, 0) | (read[0] & op.absorbing)
            return merged
        case Gather():
            result = np.ones(channels, bool)
            for k, root in enumerate(op.operands):
                here = op.source == k
                result[here] = zero[root][op.index[here]]
            return result
    return np.zeros(channels, bool)


def _live_inputs(zero: Mapping[Node, BoolArray], node: Node, mix: Mix) -> BoolArray:
    if mix.full_width:
        return np.ones(mix.channels, bool)
    return ~zero[mix.operands[0]]


class _Backward:
    def __init__(
        self,
        analysis: ChannelAnalysis,
        reads: dict[str, ReadLists],
        zero: dict[Node, BoolArray],
        alive: Mapping[str, BoolArray] | None,
        round_to: int,
    ) -> None:
        self.analysis = analysis
        self.alive = alive
        self.round_to = round_to
        self.result = Liveness(reads, zero, {}, {})
        self.needed: dict[Node, BoolArray] = {}
        self.demanded: set[Node] = set()

    def run(self) -> Liveness:
        for node, op in reversed(self.analysis.ops.items()):
            if isinstance(op, Query):
                if op.constant is None and self._is_used(node):
                    self._demand(op.operands[0], None)
            elif node in self.demanded or node.op == "placeholder" or is_wanted(node, op):
                self._need_operands(node, op, self._keep(node, op))
        return self.result

    def _is_used(self, node: Node) -> bool:
        """Whether the size, or what follows from it, is given to anything that is needed."""
        for user in node.users:
            plain = user not in self.analysis.ops or isinstance(self.analysis.ops[user], Query)
            if user in self.demanded or user.op == "output" or (plain and not user.users):
                return True
            if plain and self._is_used(user):
                return True
        return False

    def _keep(self, node: Node, op: Op) -> BoolArray:
        zero = self.result.zero.get(node, np.zeros(0, bool))
        kept = self.needed.get(node, np.zeros(len(zero), bool)) & ~zero
        if isinstance(op, Source) or (isinstance(op, Mix) and op.frozen):
            kept = np.ones(len(zero), bool)
        elif len(kept) and not kept.any():
            kept[0] = True
        if self.round_to > 1 and len(kept):
            self._round_up(kept, zero, op.structural_groups if isinstance(op, Mix) else 1)
        self.result.kept[node] = kept
        return kept

    def _round_up(self, kept: BoolArray, zero: BoolArray, structural_groups: int) -> None:
        """Keep more, until each structural group that keeps any has as many as the widest.

        They are emitted as one convolution, whose groups are of one size.
        """
        numbers = np.arange(len(kept)).reshape(structural_groups, -1)
        widest = int(kept[numbers].sum(1).max())
        wanted = -(-widest // self.round_to) * self.round_to
        for own in numbers[any_along(kept[numbers], 1)]:
            more = own[~kept[own] & ~zero[own]]
            kept[more[: wanted - int(kept[own].sum())]] = True

    def _demand(self, operand: Node, channels: IntArray | BoolArray | slice | None) -> None:
        """Record that `operand` is read, and that these of its channels are needed."""
        self.demanded.add(operand)
        if channels is None or operand not in self.analysis.values:
            return
        count = self.analysis.values[operand].channels
        if count:
            needed = self.needed.setdefault(operand, np.zeros(count, bool))
            needed[channels] = True

    def _need_operands(self, node: Node, op: Op, kept: BoolArray) -> None:
        match op:
            case Mix(full_width=True) | FullWidth() | Statistics():
                for operand in op.operands:
                    self._demand(operand, slice(None))
            case Mix():
                row = self.result.reads[op.layer].row[kept]
                lists = self.result.reads_live(node, op)[np.unique(row[row >= 0])]
                self._demand(op.operands[0], any_along(lists, 0))
            case Channelwise():
                self._demand(op.operands[0], any_along(kept.reshape(-1, op.repeat), 1))
            case Gate():
                alive = True if self.alive is None else self.alive[op.gate]
                self._demand(op.operands[0], kept & alive)
            case Elementwise():
                self._need_terms(node, op, kept)
            case Merge():
                self._demand(
                    op.operands[0], op.read_by(np.flatnonzero(kept), len(kept)).reshape(-1)
                )
            case Gather():
                for k, root in enumerate(op.operands):
                    read = op.index[kept & (op.source == k)]
                    if len(read):
                        self._demand(root, read)
                if not (op.source[kept] >= 0).any():
                    self._demand(op.operands[0], None)

    def _need_terms(self, node: Node, op: Elementwise, kept: BoolArray) -> None:
        silent = [
            spans and skips and self._all_zero(operand, kept)
            for operand, spans, skips in zip(op.operands, op.spans, op.skips_zero, strict=True)
        ]
        if all(silent):
            silent[0] = False
        self.result.skipped[node] = tuple(silent)
        for operand, spans, skip in zip(op.operands, op.spans, silent, strict=True):
            if not skip:
                self._demand(operand, kept if spans else slice(None))

    def _all_zero(self, operand: Node, kept: BoolArray) -> bool:
        zero = self.result.zero[operand]
        return len(zero) > 0 and bool(zero[kept].all())
