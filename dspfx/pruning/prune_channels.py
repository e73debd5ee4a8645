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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from dspfx.model.analysed import analyse_prepared
from dspfx.model.liveness import current_reads
from dspfx.model.parts import Part, parts_of
from dspfx.passes.analysis.channel_ops import ChannelAnalysis
from dspfx.passes.analysis.liveness import ReadLists
from dspfx.pruning.budget import Budget, PruneReport, check_budget
from dspfx.pruning.channel_order import ChannelOrder, Side, removable, sides, tied, width_of
from dspfx.pruning.criteria import LOWER_CAPS, Criteria, LeastKept, strongest
from dspfx.pruning.energy_shares import energies_of_sides
from dspfx.pruning.prune_in_time import prune_in_time
from dspfx.pruning.search import PrunablePart, prune_by
from dspfx.utils.arrays import BoolArray, FloatArray

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
    that it has in the layer over the layer's mean. For a budget of latency it is the sum of its
    shares of these layers' energies, over the time that goes with it, and widths are multiples that
    the budget's engine likes.

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
    check_budget(budget)
    hint = LEAST + (LOWER_CAPS if keep_at_least else "")
    if budget.latency is not None:
        criteria = Criteria.of(prepared, moments, scores, keep_at_least)
        return prune_in_time(prepared, criteria, budget, hint, groups=False)
    return prune_by(None, channel_parts(prepared, moments, scores, keep_at_least), budget, hint)


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
        for classes in tied(both, module.asked.round_to, 1):
            importance[classes] = importance[classes].mean()
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
    energies = {name: energies_of_sides(part, mix, criteria) for name, mix in mixes.items()}
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
