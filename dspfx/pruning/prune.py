"""`prune`: one threshold for the whole network, found by bisection on costs alone."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from dspfx.layers.gated import GatedLayer, gated_layers
from dspfx.model.analysed import analyse_prepared
from dspfx.model.module import PreparedModule
from dspfx.model.parts import Part, parts_of
from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Mix
from dspfx.passes.analysis.liveness import Liveness, liveness
from dspfx.passes.analysis.removable import droppable_layers
from dspfx.pruning.budget import Budget, PruneReport, check_budget
from dspfx.pruning.criteria import LOWER_CAPS, Criteria, LeastKept, strongest
from dspfx.pruning.energy_shares import energies_of_groups
from dspfx.pruning.prunable_layer import PrunableLayer
from dspfx.pruning.prune_in_time import prune_in_time
from dspfx.pruning.search import PrunablePart, prune_by
from dspfx.utils.arrays import BoolArray, FloatArray

LEAST = (
    "with one input channel left to each group, {least:.2%} remains; ask for more than that, use "
    "fewer groups or ignore fewer layers"
)


def prune(
    prepared: nn.Module,
    budget: Budget,
    *,
    moments: Mapping[str, Tensor] | None = None,
    drop_filters: bool = True,
    scores: Mapping[str, Tensor] | None = None,
    keep_at_least: LeastKept = 0.0,
) -> PruneReport:
    """Mask `prepared` down to `budget`, by the energy of its weights and its groups.

    For every group of filters of a gated layer, the channel energies `e[g,c]`, the sum over the
    group's filters of `W[o,c,k]^2`, are normalised to sum 1 and sorted; the longest prefix whose
    running sum stays below beta is dropped. Where a layer is summed into a residual stream the
    same is done to whole filters. Beta is one number for the network (Park et al., "Dynamic
    Structure Pruning for Compressing CNNs", AAAI 2023, arXiv 2303.09736), found by bisection; the
    cost of a candidate follows from its masks by liveness.

    For a budget of latency, what goes first is what has the least share of its layers' energy for
    the time that it takes: inputs of groups where the budget's engine saves time by them, and whole
    channels, residual streams included, in multiples that it likes.

    What is pruned already stays pruned. The masks take effect at once; fine-tune afterwards. Where
    several processes train the model, each of them prunes it: equal weights give equal masks, and
    of a budget of latency it is the first process's measurements that count.

    Args:
        prepared: from `dspfx.prepare`; its masks are changed in place.
        budget: what may remain.
        moments: from `input_moments`: energy counts by how strong its channel is.
        drop_filters: whether whole filters are dropped, too, as in the paper. Without, the
            channels of a residual stream are left to `prune_channels`.
        scores: how important channels are, for layers that you know better: name of a gated layer
            -> `[O, C/groups]`, or `[O]` for its filters. It stands for the energy of the weights.
        keep_at_least: the share of its filters, and of the inputs of each group, that every gated
            layer keeps, or a dict of shares by names or patterns of layers. Filters that nobody
            reads any more leave all the same: let those that read them keep more.

    Raises:
        BudgetError: the budget cannot be reached; the message says what can. Nothing is changed.
            Or `keep_at_least` is no fraction, or names no layer.
        PrepareError: a gated weight is not finite.
        DataError: `moments` or `scores` are of another model, negative or not finite.
        ConvertError: `prepared` does not come from `dspfx.prepare`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> report = dspfx.prune(prepared, dspfx.Budget(macs=0.5))
        >>> report.achieved <= 0.5
        True
        >>> dspfx.report(dspfx.convert(prepared)).emitted == report.emitted
        True
    """
    check_budget(budget)
    hint = LEAST + (LOWER_CAPS if keep_at_least else "")
    if budget.latency is not None:
        criteria = Criteria.of(prepared, moments, scores, keep_at_least)
        return prune_in_time(prepared, criteria, budget, hint, groups=True, whole=drop_filters)
    parts = group_parts(prepared, moments, drop_filters, scores, keep_at_least)
    return prune_by(None, parts, budget, hint)


def group_parts(
    prepared: nn.Module,
    moments: Mapping[str, Tensor] | None = None,
    drop_filters: bool = True,
    scores: Mapping[str, Tensor] | None = None,
    keep_at_least: LeastKept = 0.0,
) -> Sequence[PrunablePart]:
    """The parts of a model with the inputs of their groups in order, see `prune`."""
    own = parts_of(prepared)
    criteria = Criteria.of(prepared, moments, scores, keep_at_least)
    return [_PrunablePart.of(part, criteria, drop_filters) for part in own]


@dataclass(frozen=True)
class _PrunablePart:
    """A prepared module, its analysis, its gated layers by name, and its own name."""

    module: PreparedModule
    analysis: ChannelAnalysis
    layers: dict[str, PrunableLayer]
    name: str
    resolution: float = 0.0

    @staticmethod
    def of(part: Part, criteria: Criteria, drop_filters: bool) -> "_PrunablePart":
        analysis = analyse_prepared(part.module)
        droppable = droppable_layers(analysis) if drop_filters else frozenset()
        gated = gated_layers(part.module)
        layers = {}
        for op in analysis.ops.values():
            if isinstance(op, Mix) and op.gated:
                layer, name = gated[op.layer], part.full_name(op.layer)
                energy = criteria.energies(name, layer)
                least = functools.partial(criteria.least_of, name)
                layers[op.layer] = _prunable_layer(layer, op, energy, op.layer in droppable, least)
        return _PrunablePart(part.module, analysis, layers, part.name)

    def liveness(self, beta: float) -> Liveness:
        """The liveness at threshold `beta`."""
        round_to = self.module.asked.round_to
        reads = {name: layer.reads(beta, round_to) for name, layer in self.layers.items()}
        live = liveness(self.analysis, reads, round_to=round_to)
        if round_to == 1:
            return live
        # what died elsewhere is made up for, or the lists would be no multiples
        alive: dict[str, BoolArray] = {}
        for node, op in self.analysis.ops.items():
            if isinstance(op, Mix) and op.gated:
                alive[op.layer] = live.live_inputs(node, op) | alive.get(op.layer, False)
        reads = {n: layer.reads(beta, round_to, alive[n]) for n, layer in self.layers.items()}
        return liveness(self.analysis, reads, round_to=round_to)

    def last_to_go(self, beta: float) -> Sequence[int]:
        """Nothing: inputs of groups are small, the threshold alone comes close to a budget."""
        return ()

    def sparing(self, stays: Sequence[int]) -> "_PrunablePart":
        """See `PrunablePart`."""
        return self


def _prunable_layer(
    layer: GatedLayer,
    mix: Mix,
    energy: FloatArray,
    droppable: bool,
    least: Callable[[int], int],
) -> PrunableLayer:
    """The orders of `mix`; `least` maps how many there are to how many stay."""
    group = layer.gate.assignment.cpu().numpy()
    channels = energies_of_groups(energy, group, len(layer.gate.logits), mix.structural_groups)
    filters = _lost(energy.sum(1), least) if droppable else np.full(mix.filters, np.inf)
    alive = layer.gate.alive.cpu().numpy()
    mask = layer.gate.mask.cpu().numpy()
    return PrunableLayer.of(mix, mask, group, _lost(channels, least), filters, alive)


def _lost(energy: np.ndarray, least: Callable[[int], int] = lambda _: 0) -> np.ndarray:
    """The share of the energy along the last axis that goes when an entry and all weaker ones go.

    The strongest, as many as `least` says of how many there are, go never: their share is 1.
    Exact zeros are always dropped: their share is given as -1.
    """
    order = np.argsort(energy, axis=-1, kind="stable")
    running = np.cumsum(np.take_along_axis(energy, order, -1), axis=-1)
    whole = running[..., -1:]
    share = np.divide(running, whole, out=np.zeros_like(running), where=whole > 0)
    share[..., -1] = 1.0  # the strongest entry is never dropped, whatever rounding says
    lost = np.empty_like(share)
    np.put_along_axis(lost, order, share, -1)
    lost[strongest(energy, least(energy.shape[-1]))] = 1.0
    return np.where(energy > 0, lost, -1.0)
