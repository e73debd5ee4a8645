"""`prune`: one threshold for the whole network, found by bisection on costs alone."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dspfx.errors import BudgetError, PrepareError
from dspfx.filters import filters_first
from dspfx.gates import GatedLayer, gated_layers
from dspfx.gating import analyse_prepared
from dspfx.masks import apply_reads
from dspfx.module import PreparedModule
from dspfx.parts import parts_of
from dspfx.passes.cost import Cost, layer_costs, total
from dspfx.passes.droppable import droppable_layers
from dspfx.passes.liveness import Liveness, ReadLists, liveness
from dspfx.passes.values import BoolArray, ChannelAnalysis, IntArray, Mix
from dspfx.penalty import energy as layer_energy

BISECTIONS = 40
CLOSE_ENOUGH = 0.005

Candidate = tuple[list[Liveness], Cost]  # of every part, and of all together


@dataclass(frozen=True)
class Budget:
    """What fraction of the dense network may remain; exactly one of the fields is given.

    Attributes:
        macs: of the multiply-accumulates of one sample, whole model; in (0, 1].
        params: of the parameters, whole model; in (0, 1].
    """

    macs: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        given = [f for f in (self.macs, self.params) if f is not None]
        if len(given) != 1:
            raise BudgetError("give exactly one of Budget(macs=...) and Budget(params=...)")
        if not 0 < given[0] <= 1:
            raise BudgetError(f"a budget is a fraction in (0, 1], got {given[0]}")

    @property
    def fraction(self) -> float:
        """The fraction that may remain."""
        return next(f for f in (self.macs, self.params) if f is not None)

    def of(self, cost: Cost) -> int:
        """The part of `cost` that is budgeted."""
        return cost.macs if self.macs is not None else cost.parameters


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did.

    Attributes:
        budget: the fraction that was asked for.
        achieved: the fraction that remains.
        threshold: beta, the share of its energy that each group lost at most.
        before, after: cost of the model for one sample.
        note: says so where the budget could not be met closely.
    """

    budget: float
    achieved: float
    threshold: float
    before: Cost
    after: Cost
    note: str = ""

    def __str__(self) -> str:
        lines = [
            f"kept {self.achieved:.2%} (budget {self.budget:.2%}) at threshold "
            f"{self.threshold:.4f}",
            f"MACs {self.before.macs:,} -> {self.after.macs:,}, "
            f"parameters {self.before.parameters:,} -> {self.after.parameters:,}",
        ]
        return "\n".join([*lines, *([self.note] if self.note else [])])


def prune(prepared: nn.Module, budget: Budget) -> PruneReport:
    """Mask `prepared` down to `budget`, by the energy of its weights and its groups.

    For every group of filters of a gated layer, the channel energies `e[g,c]`, the sum over the
    group's filters of `W[o,c,k]^2`, are normalised to sum 1 and sorted; the longest prefix whose
    running sum stays below beta is dropped. Where a layer is summed into a residual stream the
    same is done to whole filters. Beta is one number for the network (Park et al., "Dynamic
    Structure Pruning for Compressing CNNs", AAAI 2023, arXiv 2303.09736), found by bisection; the
    cost of a candidate follows from its masks by liveness.

    What is pruned already stays pruned. The masks take effect at once; fine-tune afterwards.

    Raises:
        BudgetError: the budget cannot be reached; the message says what can. Nothing is changed.
        PrepareError: a gated weight is not finite.
        ConvertError: `prepared` does not come from `dspfx.prepare`.
    """
    parts = [part.module for part in parts_of(prepared)]
    analyses = [analyse_prepared(part) for part in parts]
    layers = [_prunable_layers(*pair) for pair in zip(parts, analyses, strict=True)]
    before = _sum(total(layer_costs(analysis), analysis) for analysis in analyses)

    def candidate(beta: float) -> Candidate:
        lives = [
            liveness(analysis, {name: layer.reads(beta) for name, layer in own.items()})
            for analysis, own in zip(analyses, layers, strict=True)
        ]
        pairs = zip(analyses, lives, strict=True)
        return lives, _sum(total(layer_costs(a, live), a) for a, live in pairs)

    beta, lives, after = _bisect(candidate, budget, before)
    achieved = budget.of(after) / budget.of(before)
    for part, analysis, live in zip(parts, analyses, lives, strict=True):
        apply_reads(part, analysis, live)
    note = ""
    if achieved < budget.fraction - CLOSE_ENOUGH:
        note = "the next step up exceeds the budget: this is the closest below it"
    return PruneReport(budget.fraction, achieved, beta, before, after, note)


def _sum(costs: Iterable[Cost]) -> Cost:
    return sum(costs, Cost(0, 0))


def _bisect(
    candidate: Callable[[float], Candidate], budget: Budget, before: Cost
) -> tuple[float, list[Liveness], Cost]:
    """The smallest threshold, to 2^-40, whose cost is within the budget."""
    limit = budget.fraction * budget.of(before)
    low, (live, cost) = 0.0, candidate(0.0)
    if budget.of(cost) <= limit:
        return 0.0, live, cost
    high, (live, cost) = 1.0, candidate(1.0)
    if budget.of(cost) > limit:
        least = budget.of(cost) / budget.of(before)
        raise BudgetError(
            f"the budget of {budget.fraction:.2%} cannot be reached: with one input channel left "
            f"to each group, {least:.2%} remains; ask for more than that, use fewer groups or "
            "ignore fewer layers"
        )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = candidate(middle)
        if budget.of(found[1]) <= limit:
            high, live, cost = middle, *found
        else:
            low = middle
        if budget.of(cost) > limit - CLOSE_ENOUGH / 50 * budget.of(before):
            break
    return high, live, cost


@dataclass(frozen=True)
class _PrunableLayer:
    """The sorted energies of one layer, from which any threshold gives read lists.

    Attributes:
        mix: the layer in the analysis.
        group: int `[O]`.
        lost_channels: `[S, G, C/S]`, the share of its group's energy that is lost when the
            channel and all weaker ones are dropped.
        lost_filters: `[O]`, likewise for filters; infinite where filters may not be dropped.
        masked: bool `[O, C/S]`, what may be kept at most.
    """

    mix: Mix
    group: IntArray
    lost_channels: np.ndarray
    lost_filters: np.ndarray
    alive: BoolArray

    def reads(self, beta: float) -> ReadLists:
        """The read lists at threshold `beta`."""
        keep = self.lost_channels >= beta
        alive = self.alive & (self.lost_filters >= beta)
        return ReadLists.grouped(self.mix, self.group, keep, alive)


def _prunable_layers(
    prepared: PreparedModule, analysis: ChannelAnalysis
) -> dict[str, _PrunableLayer]:
    droppable = droppable_layers(analysis)
    modules = gated_layers(prepared)
    return {
        op.layer: _prunable_layer(modules[op.layer], op, op.layer, op.layer in droppable)
        for op in analysis.ops.values()
        if isinstance(op, Mix) and op.gated
    }


def _prunable_layer(layer: GatedLayer, mix: Mix, name: str, droppable: bool) -> _PrunableLayer:
    with torch.no_grad():
        weight = filters_first(layer, layer.masked()[0]).double()
        energy = layer_energy(weight).cpu().numpy()  # [O, C/S]
    if not np.isfinite(energy).all():
        raise PrepareError(f"{name} holds NaN or infinite weights; repair them first")
    group = layer.gate.assignment.cpu().numpy()
    structural, groups = mix.structural_groups, len(layer.gate.logits)
    members = np.eye(groups)[group].reshape(structural, -1, groups)  # [S, O/S, G]
    by_structure = energy.reshape(structural, -1, energy.shape[1])  # [S, O/S, C/S]
    channels = np.einsum("sog,soc->sgc", members, by_structure)
    filters = _lost(energy.sum(1)) if droppable else np.full(mix.filters, np.inf)
    alive = layer.gate.alive.cpu().numpy()
    return _PrunableLayer(mix, group, _lost(channels), filters, alive)


def _lost(energy: np.ndarray) -> np.ndarray:
    """The share of the energy along the last axis that goes when an entry and all weaker ones go.

    Exact zeros are always dropped: their share is given as -1.
    """
    order = np.argsort(energy, axis=-1, kind="stable")
    running = np.cumsum(np.take_along_axis(energy, order, -1), axis=-1)
    whole = running[..., -1:]
    share = np.divide(running, whole, out=np.zeros_like(running), where=whole > 0)
    share[..., -1] = 1.0  # the strongest entry is never dropped, whatever rounding says
    lost = np.empty_like(share)
    np.put_along_axis(lost, order, share, -1)
    return np.where(energy > 0, lost, -1.0)
