"""Pruning to a budget of latency by the weights alone: what has the least energy for its time goes.

Whole networks are measured in the end. Where they take longer or shorter than their layers promise,
the prediction is corrected by that, and pruning begins anew.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from dspfx.errors import BudgetError
from dspfx.model.parts import parts_of
from dspfx.pruning.budget import Budget, PruneReport
from dspfx.pruning.criteria import Criteria
from dspfx.pruning.energy_shares import EnergyShares
from dspfx.pruning.latency import Latency
from dspfx.pruning.ranking import sensitive_parts
from dspfx.pruning.search import PrunablePart, prune_by
from dspfx.pruning.whole_times import WholeTimes
from dspfx.utils.distributed import Processes

CORRECTIONS = 3
AS_PREDICTED = 0.02  # a difference of measured from predicted fractions that is none


def prune_in_time(
    prepared: nn.Module,
    criteria: Criteria,
    budget: Budget,
    hint: str,
    *,
    groups: bool,
    whole: bool = True,
) -> PruneReport:
    """Mask `prepared` down to a budget of latency.

    Args:
        prepared: from `dspfx.prepare`.
        criteria: of it.
        budget: of latency.
        hint: see `prune_by`.
        groups: whether groups may drop inputs by themselves.
        whole: whether channels may go from the whole model.

    Raises:
        BudgetError: the budget cannot be reached, or its engine is not there. Nothing is changed.
    """
    parts, processes = parts_of(prepared), Processes.of(prepared)
    energies = [EnergyShares.of(part, criteria, whole=whole) for part in parts]
    latency = Latency.of(parts, budget, processes)
    assert latency is not None
    ordered = sensitive_parts(parts, energies, budget, latency.tables, groups)
    return _measured(latency, ordered, budget, hint, processes)


def _measured(
    latency: Latency,
    parts: Sequence[PrunablePart],
    budget: Budget,
    hint: str,
    processes: Processes,
) -> PruneReport:
    """`prune_by` the times of layers, corrected by what is measured; the closest is kept."""
    report = prune_by(latency, parts, budget, hint)
    modules = [part.module for part in parts]
    if report.threshold == 0:
        return report
    whole: WholeTimes | None = None

    def measure() -> float:
        nonlocal whole
        whole = whole or WholeTimes(budget, modules)
        return whole.fraction(modules)

    used, note = latency, ""  # by which the present masks were found
    tried: list[tuple[float, Latency, float]] = []
    for left in reversed(range(CORRECTIONS + 1)):
        measured = processes.of_first(measure)
        tried.append((_miss(measured, budget), used, measured))
        if not left or abs(measured - report.achieved) <= AS_PREDICTED:
            break
        latency = latency.corrected(modules, measured)
        try:
            again = prune_by(latency, parts, budget, hint)
        except BudgetError as error:  # a disturbance, perhaps: it is measured once more
            note = f"by what was measured, {error}"
            continue
        alike = again.after == report.after
        report, used, note = again, latency, ""
        if alike:  # nothing comes closer
            break
    _, best, measured = min(tried, key=lambda one: one[0])
    if best is not used:
        report = prune_by(best, parts, budget, hint)
    return replace(report, measured=measured, note=note or report.note)


def _miss(measured: float, budget: Budget) -> float:
    """How far off a network is; what takes longer than it may is worse than what takes less."""
    over = measured - budget.fraction
    return max(2 * over, -over)
