"""`prune_channels`: whole channels, from every layer that writes or reads them.

Channels that are added to each other live and die together: of a residual stream, channel c of all
layers that write to it, and of all that read it. It counts for what it does in all of them:

1. Writers: `sum_{c,k} W[o,c,k]^2` of the filter that writes it. Readers: `sum_{o,k} W[o,c,k]^2` of
   all filters that read it.
2. Each divided by its mean over the channels of its layer, so that layers compare; a channel's
   importance is the average over all that write or read it.
3. Given the moments of inputs, `W[o,c,k]^2 E[x_c^2]` stands for `W[o,c,k]^2`; given scores, these.

This is the group magnitude of Fang, Ma, Song, Bi Mi, Wang, "DepGraph: Towards Any Structural
Pruning", CVPR 2023, with layers made comparable one by one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from torch import Tensor, nn
from torch.fx.node import Node

from dspfx.layers.parametrised import weight_of
from dspfx.model.analysed import analyse_prepared
from dspfx.model.liveness import current_reads
from dspfx.model.module import PreparedModule
from dspfx.model.parts import Part, parts_of
from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Mix
from dspfx.passes.analysis.liveness import Liveness, ReadLists, liveness
from dspfx.passes.analysis.removable import pinned_classes
from dspfx.pruning.budget import Budget, PruneReport
from dspfx.pruning.criteria import LOWER_CAPS, Criteria, LeastKept, strongest
from dspfx.pruning.search import PrunablePart, prune_to
from dspfx.utils.arrays import BoolArray, FloatArray, IntArray, any_along

LEAST = (
    "with one channel left to every layer, and those that cannot go, {least:.2%} remains; ask for "
    "more than that, ignore fewer layers, or let groups drop more of their channels by dspfx.prune"
)


def prune_channels(
    prepared: nn.Module,
    budget: Budget,
    *,
    moments: Mapping[str, Tensor] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    keep_at_least: LeastKept = 0.0,
) -> PruneReport:
    """Mask whole channels of `prepared`, the least important first, until `budget` is met.

    A channel goes from all layers that write and read it at once, residual streams included, and
    from whatever groups of filters there are: the result has no groups of its own, so it is fast
    in any runtime. `prune` may go on from there by groups; they are best found afterwards.

    What is pruned already stays pruned. The masks take effect at once; fine-tune afterwards. The
    importance of a channel is the average, over all layers that write or read it, of the energy
    that it has in the layer over the layer's mean.

    Args:
        prepared: from `dspfx.prepare`; its masks are changed in place.
        budget: what may remain.
        moments: from `input_moments`: what a layer reads counts by how strong it is.
        scores: how important channels are, for layers that you know better: name of a gated layer
            -> `[O, C/groups]`, or `[O]` for its filters. It stands for the energy of the weights.
        keep_at_least: the share of its filters, and of its inputs, that every gated layer keeps,
            or a dict of shares by names or patterns of layers.

    Raises:
        BudgetError: the budget cannot be reached; the message says what can. Nothing is changed.
            Or `keep_at_least` is no fraction, or names no layer.
        PrepareError: a weight is not finite.
        DataError: `moments` or `scores` are of another model, negative or not finite.
        ConvertError: `prepared` does not come from `dspfx.prepare`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> report = dspfx.prune_channels(prepared, dspfx.Budget(params=0.5))
        >>> report.achieved <= 0.5
        True
        >>> dspfx.convert(prepared).get_submodule("0").out_channels < 8
        True
    """
    parts = channel_parts(prepared, moments, scores, keep_at_least)
    return prune_to(prepared, parts, budget, LEAST + (LOWER_CAPS if keep_at_least else ""))


def channel_parts(
    prepared: nn.Module,
    moments: Mapping[str, Tensor] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    keep_at_least: LeastKept = 0.0,
) -> Sequence[PrunablePart]:
    """The parts of a model with their channels in order, see `prune_channels`."""
    own = parts_of(prepared)
    criteria = Criteria.of(prepared, moments, scores, keep_at_least)
    return [_ChannelPart.of(part, criteria) for part in own]


@dataclass(frozen=True)
class ChannelOrder(ABC):
    """A prepared module whose channels go in an order, whole.

    Attributes:
        module, analysis, name, resolution: see `PrunablePart`.
        lost: `[classes]`, the threshold at which a class goes, at most 1; infinite for those that
            stay.
        widths: see `width_of`, of what each layer writes and reads.
    """

    module: PreparedModule
    analysis: ChannelAnalysis
    name: str
    lost: FloatArray
    widths: tuple[IntArray, ...]
    resolution: float = field(default=0.0, kw_only=True)

    @abstractmethod
    def reads_at(self, threshold: float) -> dict[str, ReadLists]:
        """What the gated layers read at `threshold`, apart from whole channels that are gone."""

    def liveness(self, threshold: float) -> Liveness:
        """The liveness where all that goes up to `threshold` is gone."""
        round_to = self.module.asked.round_to
        gone = classes_gone(self.lost, threshold, self.widths, round_to)
        reads = self.reads_at(threshold)
        for node, op in self.analysis.ops.items():
            if isinstance(op, Mix) and op.gated:
                reads[op.layer] = without(reads[op.layer], self.analysis, node, op, gone)
        return liveness(self.analysis, reads, round_to=round_to)

    def last_to_go(self, threshold: float) -> Sequence[int]:
        """The coupling classes that go at `threshold` and were there before; the last first."""
        gone = np.flatnonzero((self.lost > 0) & (self.lost <= threshold))
        last: list[int] = gone[np.argsort(-self.lost[gone], kind="stable")].tolist()
        return last

    def sparing(self, stays: Sequence[int]) -> Self:
        """The same order, in which the classes `stays` go at no threshold."""
        lost = self.lost.copy()
        lost[list(stays)] = np.inf
        return replace(self, lost=lost)


@dataclass(frozen=True)
class _ChannelPart(ChannelOrder):
    """By importance; `lost` is the share that goes with a channel and all less important ones.

    Attributes:
        reads: what the gated layers read at present.
    """

    reads: dict[str, ReadLists]

    @staticmethod
    def of(part: Part, criteria: Criteria) -> "_ChannelPart":
        module, analysis = part.module, analyse_prepared(part.module)
        both = list(sides(part, analysis))
        importance = _importance(part, analysis, both, criteria)
        capped = _capped(part, both, importance, criteria)
        going = np.flatnonzero(removable(analysis, both, importance) & ~capped)
        lost = np.full(len(importance), np.inf)
        order = going[np.argsort(importance[going], kind="stable")]
        lost[order] = np.arange(1, len(order) + 1) / len(order)
        reads = current_reads(module, analysis)
        widths = tuple(map(width_of, both))
        return _ChannelPart(module, analysis, part.name, lost, widths, reads)

    def reads_at(self, threshold: float) -> dict[str, ReadLists]:
        """See `ChannelOrder`: what they read at present."""
        return dict(self.reads)


def classes_gone(
    lost: FloatArray, threshold: float, widths: tuple[IntArray, ...], round_to: int
) -> BoolArray:
    """`[classes]`: those with `lost` up to `threshold`, fewer where widths shall be multiples.

    A layer's own groups are emitted as wide as the widest, and shall all be so.
    """
    gone: BoolArray = lost <= threshold
    for width in widths if round_to > 1 else ():
        wanted = -(-int((~gone[width]).sum(1).max()) // round_to) * round_to
        for own in width[any_along(~gone[width], 1)]:
            # the most important of those that go come back
            back = own[gone[own]]
            missing = wanted - (len(own) - len(back))
            gone[back[np.argsort(-lost[back], kind="stable")][:missing]] = False
    return gone


@dataclass(frozen=True)
class Side:
    """The filters of a layer that has a weight, or its inputs: the classes of the channels."""

    mix: Mix
    classes: IntArray
    writes: bool


def width_of(side: Side) -> IntArray:
    """Int `[S, n]`: the classes of a side, of each group that the layer has of its own."""
    classes = np.unique(side.classes)
    if len(classes) < len(side.classes):
        return classes[None]
    return side.classes.reshape(side.mix.structural_groups, -1)


def sides(part: Part, analysis: ChannelAnalysis) -> Iterator[Side]:
    """Both sides of every call of a layer that has a weight."""
    for node, op in analysis.ops.items():
        if not isinstance(op, Mix):
            continue
        if not isinstance(weight_of(part.module.get_submodule(op.layer)), Tensor):
            continue
        yield Side(op, analysis.class_of(node), writes=True)
        if not op.full_width:
            yield Side(op, analysis.class_of(op.operands[0]), writes=False)


def _capped(part: Part, sides: list[Side], importance: FloatArray, criteria: Criteria) -> BoolArray:
    """`[classes]`: the most important ones of every side, as many as its layer keeps at least."""
    found = np.zeros(len(importance), bool)
    for side in sides:
        least = criteria.least_of(part.full_name(side.mix.layer), len(side.classes))
        found[side.classes[strongest(importance[side.classes], least)]] = True
    return found


def _importance(
    part: Part, analysis: ChannelAnalysis, sides: list[Side], criteria: Criteria
) -> FloatArray:
    """`[classes]`, the average over all layers that write or read a class."""
    mixes = {side.mix.layer: side.mix for side in sides}
    energies = {name: _energies(part, mix, criteria) for name, mix in mixes.items()}
    count = analysis.class_count
    importance, layers = np.zeros(count), np.zeros(count)
    for side in sides:
        written, read = energies[side.mix.layer]
        own = np.bincount(side.classes, written if side.writes else read, count)
        here = np.unique(side.classes)
        mean = own[here].mean()
        importance[here] += own[here] / mean if mean > 0 else 0.0
        layers[here] += 1
    return importance / np.maximum(layers, 1)


def _energies(part: Part, mix: Mix, criteria: Criteria) -> tuple[FloatArray, FloatArray]:
    """The energies of what a layer writes, `[O]`, and of what it reads, `[C]`."""
    layer = part.module.get_submodule(mix.layer)
    energies = criteria.energies(part.full_name(mix.layer), layer)
    by_structure = energies.reshape(mix.structural_groups, -1, energies.shape[1])
    return energies.sum(1), by_structure.sum(1).reshape(-1)


def removable(analysis: ChannelAnalysis, sides: list[Side], importance: FloatArray) -> BoolArray:
    """`[classes]`: those that can go, for all their writers or all their readers are gated.

    The most important channel of each side stays, and what is pinned.
    """
    written, read = np.zeros(len(importance), bool), np.zeros(len(importance), bool)
    free_writers, free_readers = written.copy(), read.copy()
    stays = np.zeros(len(importance), bool)
    for side in sides:
        classes = side.classes
        (written if side.writes else read)[classes] = True
        if not side.mix.gated:
            (free_writers if side.writes else free_readers)[classes] = True
        if len(classes):
            stays[classes[importance[classes].argmax()]] = True
    stays[list(pinned_classes(analysis, {}))] = True
    removable: BoolArray = ((written & ~free_writers) | (read & ~free_readers)) & ~stays
    return removable


def without(
    reads: ReadLists, analysis: ChannelAnalysis, node: Node, op: Mix, gone: BoolArray
) -> ReadLists:
    """`reads` of a layer without the channels that are `gone`, written or read."""
    row = np.where(gone[analysis.class_of(node)], -1, reads.row)
    if op.full_width:
        return ReadLists(row, reads.lists)
    return ReadLists(row, reads.lists & ~gone[analysis.class_of(op.operands[0])])
