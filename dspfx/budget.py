"""Budgets, and the search for the smallest threshold whose masks are within one.

The cost of a candidate is reckoned from its masks by liveness, so a search takes no forward pass.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Protocol

from torch import nn

from dspfx.collapse import in_words, weak_layers
from dspfx.errors import BudgetError
from dspfx.latency import LatencyTable, measured_fraction
from dspfx.masks import apply_reads
from dspfx.module import PreparedModule
from dspfx.parts import Part
from dspfx.passes.cost import Cost, layer_costs, together, total
from dspfx.passes.liveness import Liveness
from dspfx.passes.values import ChannelAnalysis
from dspfx.processes import Processes

FINEST = 2.0**-40  # thresholds are not told apart any further
CLOSE_ENOUGH = 0.005


class PrunablePart(Protocol):
    """A part of a model, of which the more is pruned the higher a threshold in [0, 1] is."""

    @property
    def module(self) -> PreparedModule:
        """The part."""

    @property
    def analysis(self) -> ChannelAnalysis:
        """Of its evaluation graph."""

    @property
    def name(self) -> str:
        """Its own, in the model."""

    @property
    def resolution(self) -> float:
        """What thresholds must be apart to make a difference; zero if that is not known."""

    def liveness(self, threshold: float) -> Liveness:
        """What is left alive at `threshold`."""


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
        params: of the parameters of all convolutions, linear layers and operators that work channel
            by channel, whole model; in (0, 1]. A layer that is called twice counts once.
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
        if not isinstance(given[0], Real) or not 0 < given[0] <= 1:
            raise BudgetError(f"a budget is a fraction in (0, 1], got {given[0]!r}")
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                object.__setattr__(self, field.name, float(value))  # numpy's cannot be saved

    @property
    def fraction(self) -> float:
        """The fraction that may remain."""
        return next(f for f in (self.macs, self.params, self.latency) if f is not None)

    def at(self, fraction: float) -> "Budget":
        """A budget of the same, of another fraction."""
        return Budget(
            *(None if own is None else fraction for own in (self.macs, self.params, self.latency))
        )

    def of(self, candidate: Candidate) -> float:
        """What of `candidate` is budgeted."""
        if self.latency is not None:
            return candidate.seconds
        return candidate.cost.macs if self.macs is not None else candidate.cost.parameters


def check_budget(budget: object, *, optional: bool = False) -> None:
    """Refuse what is no budget, such as a mere number; nothing at all is fine if `optional`.

    Raises:
        BudgetError: it is none.
    """
    if not isinstance(budget, Budget) and not (optional and budget is None):
        raise BudgetError(f"{budget!r} is no budget; give dspfx.Budget(macs=0.35), for instance")


@dataclass(frozen=True)
class PruneReport:
    """What `prune` or `prune_channels` did.

    Attributes:
        budget: the fraction that was asked for.
        achieved: the fraction that remains.
        threshold: of `prune` beta, the share of its energy that each group lost at most; of
            `prune_channels` the share of the channels that went, of those that could.
        before, after: cost of the model for one sample.
        note: says so where the budget could not be met closely.
        measured: of a budget of latency, the fraction of the dense network's time that the pruned
            one really takes; `achieved` is what was predicted from its layers. Not measured by
            `GradualPruning`, which goes on training.
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


def prune_to(
    prepared: nn.Module, parts: Sequence[PrunablePart], budget: Budget, hint: str
) -> PruneReport:
    """`prune_by` the times of layers, where they count; the result is measured then.

    Raises:
        BudgetError: the budget cannot be reached. Nothing is changed.
    """
    check_budget(budget)
    processes = Processes.of(prepared)
    report = prune_by(latency_tables(parts, budget, processes), parts, budget, hint)
    if budget.latency is None:
        return report
    modules = [part.module for part in parts]
    return replace(report, measured=processes.of_first(lambda: measured_fraction(modules)))


def latency_tables(
    parts: Iterable[Part | PrunablePart], budget: Budget, processes: Processes
) -> list[LatencyTable]:
    """The times of the layers of all `parts`; none where the budget does not ask for them."""
    if budget.latency is None:
        return []
    return [LatencyTable.of(part.module, processes) for part in parts]


def prune_by(
    tables: Sequence[LatencyTable], parts: Sequence[PrunablePart], budget: Budget, hint: str
) -> PruneReport:
    """Mask `parts` by the smallest threshold that is within `budget`.

    Args:
        tables: of the parts, for a budget of latency.
        parts: all of a model.
        budget: what may remain.
        hint: for an error, why no less than `{least}` can remain, and what to do about it.

    Raises:
        BudgetError: the budget cannot be reached. Nothing is changed.
    """
    before = together(total(layer_costs(part.analysis), part.analysis) for part in parts)

    def candidate(threshold: float) -> Candidate:
        lives = tuple(part.liveness(threshold) for part in parts)
        costs = (
            total(layer_costs(part.analysis, live), part.analysis)
            for part, live in zip(parts, lives, strict=True)
        )
        seconds = sum(table.predict(live) for table, live in zip(tables, lives, strict=False))
        return Candidate(lives, together(costs), seconds)

    dense = Candidate((), before, sum(table.predict() for table in tables))
    resolution = max(min(part.resolution for part in parts), FINEST)
    threshold, found = _bisect(candidate, resolution, budget, budget.of(dense), hint)
    achieved = budget.of(found) / budget.of(dense)
    for part, live in zip(parts, found.lives, strict=True):
        apply_reads(part.module, part.analysis, live)
    note = ""
    if threshold > 0 and achieved < budget.fraction - CLOSE_ENOUGH:
        note = "the next step up exceeds the budget: this is the closest below it"
    weak = [
        layer
        for part, live in zip(parts, found.lives, strict=True)
        for layer in weak_layers(part.name, part.analysis, live)
    ]
    return PruneReport(
        *(budget.fraction, achieved, threshold, before, found.cost, note),
        warnings=in_words(weak),
    )


def _bisect(
    candidate: Callable[[float], Candidate],
    resolution: float,
    budget: Budget,
    dense: float,
    hint: str,
) -> tuple[float, Candidate]:
    """The smallest threshold, to `resolution`, that is within the budget; `dense` is the whole."""
    limit = budget.fraction * dense
    low, best = 0.0, candidate(0.0)
    if budget.of(best) <= limit:
        return 0.0, best
    high, best = 1.0, candidate(1.0)
    if budget.of(best) > limit:
        least = budget.of(best) / dense
        raise BudgetError(
            f"the budget of {budget.fraction:.2%} cannot be reached: {hint.format(least=least)}"
        )
    while high - low > resolution:
        middle = (low + high) / 2
        found = candidate(middle)
        if budget.of(found) <= limit:
            high, best = middle, found
        else:
            low = middle
        if budget.of(best) > limit - CLOSE_ENOUGH / 50 * dense:
            break
    return high, best
