"""`prune`: one threshold for the whole network, found by bisection on costs alone."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dspfx.collapse import in_words, weak_layers
from dspfx.errors import BudgetError, PrepareError
from dspfx.filters import filters_first
from dspfx.gates import GatedLayer, gated_layers
from dspfx.gating import analyse_prepared
from dspfx.latency import LatencyTable, measured_fraction
from dspfx.masks import apply_reads
from dspfx.module import PreparedModule
from dspfx.parts import parts_of
from dspfx.passes.cost import Cost, layer_costs, together, total
from dspfx.passes.droppable import droppable_layers
from dspfx.passes.liveness import Liveness, ReadLists, liveness
from dspfx.passes.values import BoolArray, ChannelAnalysis, IntArray, Mix
from dspfx.penalty import energy as layer_energy
from dspfx.processes import Processes

BISECTIONS = 40
CLOSE_ENOUGH = 0.005


@dataclass(frozen=True)
class Candidate:
    """Masks that might be set.

    Attributes:
        lives: what they leave alive in every part of the model.
        cost: of all parts together.
        seconds: that they are likely to take; 0 where that is not asked for.
    """

    lives: tuple[Liveness, ...]
    cost: Cost
    seconds: float


@dataclass(frozen=True)
class Budget:
    """What fraction of the dense network may remain; exactly one of the fields is given.

    Attributes:
        macs: of the multiply-accumulates of one sample, whole model; in (0, 1].
        params: of the parameters, whole model; in (0, 1].
        latency: of the time that the dense network takes, compiled, for the example inputs; in
            (0, 1]. Layers are measured, which takes a while.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        given = [f for f in (self.macs, self.params, self.latency) if f is not None]
        if len(given) != 1:
            raise BudgetError(
                "give exactly one of Budget(macs=...), Budget(params=...) and Budget(latency=...)"
            )
        if not 0 < given[0] <= 1:
            raise BudgetError(f"a budget is a fraction in (0, 1], got {given[0]}")

    @property
    def fraction(self) -> float:
        """The fraction that may remain."""
        return next(f for f in (self.macs, self.params, self.latency) if f is not None)

    def of(self, candidate: "Candidate") -> float:
        """What of `candidate` is budgeted."""
        if self.latency is not None:
            return candidate.seconds
        return candidate.cost.macs if self.macs is not None else candidate.cost.parameters


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did.

    Attributes:
        budget: the fraction that was asked for.
        achieved: the fraction that remains.
        threshold: beta, the share of its energy that each group lost at most.
        before, after: cost of the model for one sample.
        note: says so where the budget could not be met closely.
        measured: of a budget of latency, the fraction of the dense network's time that the pruned
            one really takes; `achieved` is what was predicted from its layers.
        warnings: layers of which hardly anything is left, and what to do; see
            `dspfx.CyclicFinetune` for what may come of them.
    """

    budget: float
    achieved: float
    threshold: float
    before: Cost
    after: Cost
    note: str = ""
    measured: float | None = None
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"kept {self.achieved:.2%} (budget {self.budget:.2%}) at threshold "
            f"{self.threshold:.4f}",
            f"MACs {self.before.macs:,} -> {self.after.macs:,}, "
            f"parameters {self.before.parameters:,} -> {self.after.parameters:,}",
        ]
        if self.measured is not None:
            lines.append(f"latency {self.achieved:.2%} predicted, {self.measured:.2%} measured")
        warnings = [f"warning: {warning}" for warning in self.warnings]
        return "\n".join([*lines, *([self.note] if self.note else []), *warnings])


def prune(prepared: nn.Module, budget: Budget) -> PruneReport:
    """Mask `prepared` down to `budget`, by the energy of its weights and its groups.

    For every group of filters of a gated layer, the channel energies `e[g,c]`, the sum over the
    group's filters of `W[o,c,k]^2`, are normalised to sum 1 and sorted; the longest prefix whose
    running sum stays below beta is dropped. Where a layer is summed into a residual stream the
    same is done to whole filters. Beta is one number for the network (Park et al., "Dynamic
    Structure Pruning for Compressing CNNs", AAAI 2023, arXiv 2303.09736), found by bisection; the
    cost of a candidate follows from its masks by liveness.

    What is pruned already stays pruned. The masks take effect at once; fine-tune afterwards. Where
    several processes train the model, each of them prunes it: equal weights give equal masks, and
    of a budget of latency it is the first process's measurements that count.

    Raises:
        BudgetError: the budget cannot be reached; the message says what can. Nothing is changed.
        PrepareError: a gated weight is not finite.
        ConvertError: `prepared` does not come from `dspfx.prepare`.
    """
    parts = [_PrunablePart.of(part.module, part.name) for part in parts_of(prepared)]
    before = together(total(layer_costs(part.analysis), part.analysis) for part in parts)

    processes = Processes.of(prepared)
    tables = [] if budget.latency is None else _tables(parts, processes)

    def candidate(beta: float) -> Candidate:
        lives = tuple(part.liveness(beta) for part in parts)
        costs = (
            total(layer_costs(part.analysis, live), part.analysis)
            for part, live in zip(parts, lives, strict=True)
        )
        seconds = sum(table.predict(live) for table, live in zip(tables, lives, strict=False))
        return Candidate(lives, together(costs), seconds)

    dense = Candidate((), before, sum(table.predict() for table in tables))
    beta, found = _bisect(candidate, budget, budget.of(dense))
    achieved = budget.of(found) / budget.of(dense)
    for part, live in zip(parts, found.lives, strict=True):
        apply_reads(part.module, part.analysis, live)
    note = ""
    if achieved < budget.fraction - CLOSE_ENOUGH:
        note = "the next step up exceeds the budget: this is the closest below it"
    measured = None
    if budget.latency is not None:
        modules = [part.module for part in parts]
        measured = processes.of_first(lambda: measured_fraction(modules))
    weak = [
        layer
        for part, live in zip(parts, found.lives, strict=True)
        for layer in weak_layers(part.name, part.analysis, live)
    ]
    return PruneReport(
        budget.fraction, achieved, beta, before, found.cost, note, measured, in_words(weak)
    )


def _tables(parts: list["_PrunablePart"], processes: Processes) -> list[LatencyTable]:
    return [LatencyTable.of(part.module, part.analysis, processes) for part in parts]


def _bisect(
    candidate: Callable[[float], Candidate], budget: Budget, dense: float
) -> tuple[float, Candidate]:
    """The smallest threshold, to 2^-40, that is within the budget; `dense` is the whole."""
    limit = budget.fraction * dense
    low, best = 0.0, candidate(0.0)
    if budget.of(best) <= limit:
        return 0.0, best
    high, best = 1.0, candidate(1.0)
    if budget.of(best) > limit:
        least = budget.of(best) / dense
        raise BudgetError(
            f"the budget of {budget.fraction:.2%} cannot be reached: with one input channel left "
            f"to each group, {least:.2%} remains; ask for more than that, use fewer groups or "
            "ignore fewer layers"
        )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        found = candidate(middle)
        if budget.of(found) <= limit:
            high, best = middle, found
        else:
            low = middle
        if budget.of(best) > limit - CLOSE_ENOUGH / 50 * dense:
            break
    return high, best


@dataclass(frozen=True)
class _PrunableLayer:
    """The sorted energies of one layer, from which any threshold gives read lists.

    Attributes:
        mix: the layer in the analysis.
        group: int `[O]`.
        lost_channels: `[S, G, C/S]`, the share of its group's energy that is lost when the
            channel and all weaker ones are dropped.
        lost_filters: `[O]`, likewise for filters; infinite where filters may not be dropped.
        alive: bool `[O]`, the filters that may be kept at most.
    """

    mix: Mix
    group: IntArray
    lost_channels: np.ndarray
    lost_filters: np.ndarray
    alive: BoolArray

    def reads(self, beta: float, round_to: int, live: BoolArray | None = None) -> ReadLists:
        """The read lists at threshold `beta`, in multiples of `round_to`, of `live` inputs only."""
        lost = self.lost_channels
        if live is not None:
            lost = np.where(live.reshape(len(lost), 1, -1), lost, -1.0)
        keep = _above(lost, beta, round_to)
        alive = self.alive & _above(self.lost_filters, beta, round_to)
        return ReadLists.grouped(self.mix, self.group, keep, alive)


@dataclass(frozen=True)
class _PrunablePart:
    """A prepared module, its analysis, its gated layers by name, and its own name."""

    module: PreparedModule
    analysis: ChannelAnalysis
    layers: dict[str, _PrunableLayer]
    name: str

    @staticmethod
    def of(module: PreparedModule, name: str) -> "_PrunablePart":
        analysis = analyse_prepared(module)
        droppable = droppable_layers(analysis)
        gated = gated_layers(module)
        layers = {
            op.layer: _prunable_layer(gated[op.layer], op, op.layer in droppable)
            for op in analysis.ops.values()
            if isinstance(op, Mix) and op.gated
        }
        return _PrunablePart(module, analysis, layers, name)

    def liveness(self, beta: float) -> Liveness:
        """The liveness at threshold `beta`."""
        round_to = self.module.config.round_to
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


def _prunable_layer(layer: GatedLayer, mix: Mix, droppable: bool) -> _PrunableLayer:
    with torch.no_grad():
        weight = filters_first(layer, layer.masked()[0]).double()
        energy = layer_energy(weight).cpu().numpy()  # [O, C/S]
    if not np.isfinite(energy).all():
        raise PrepareError(f"{mix.layer} holds NaN or infinite weights; repair them first")
    group = layer.gate.assignment.cpu().numpy()
    structural, groups = mix.structural_groups, len(layer.gate.logits)
    members = np.eye(groups)[group].reshape(structural, -1, groups)  # [S, O/S, G]
    by_structure = energy.reshape(structural, -1, energy.shape[1])  # [S, O/S, C/S]
    channels = np.einsum("sog,soc->sgc", members, by_structure)
    filters = _lost(energy.sum(1)) if droppable else np.full(mix.filters, np.inf)
    alive = layer.gate.alive.cpu().numpy()
    return _PrunableLayer(mix, group, _lost(channels), filters, alive)


def _above(lost: np.ndarray, beta: float, round_to: int) -> BoolArray:
    """Where `lost` reaches `beta`, and the next best along the last axis to make a multiple.

    What has no energy at all is never among them.
    """
    keep: BoolArray = lost >= beta
    if round_to == 1:
        return keep
    count = keep.sum(-1, keepdims=True)
    wanted = np.minimum(-(-count // round_to) * round_to, (lost >= 0).sum(-1, keepdims=True))
    rank = np.argsort(np.argsort(-lost, axis=-1, kind="stable"), axis=-1)
    above: BoolArray = rank < wanted
    return above


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
