"""The search for the smallest threshold whose masks are within a budget.

The cost of a candidate follows from its masks: by liveness what they leave, and from the plan that
`convert` would make of it what is emitted. A search takes no forward pass.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import fx

from dspfx.errors import BudgetError
from dspfx.model.liveness import apply_reads
from dspfx.model.module import PreparedModule
from dspfx.model.parts import full_name
from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Mix
from dspfx.passes.analysis.cost import Cost, layer_costs, together, total
from dspfx.passes.analysis.liveness import Liveness
from dspfx.passes.lowering.cost_model import CPU
from dspfx.passes.transforms.emitted import broken_ties, emitted_total
from dspfx.passes.transforms.plan import CompactionPlan, plan
from dspfx.pruning.budget import Budget, PruneReport
from dspfx.pruning.latency import Latency
from dspfx.pruning.reopen import reopened
from dspfx.pruning.weak_layers import in_words, weak_layers

FINEST = 2.0**-40  # thresholds closer than this count as equal
CLOSE_ENOUGH = 0.005
MOST_FILLED = 64  # channels of a part that are tried to be kept after all
MOST_HOLDERS, LEAST_HELD = 4, 0.001  # that an error names, and what share they hold at least


class PrunablePart(Protocol):
    """A part of a model, of which the more is pruned the higher a threshold in [0, 1] is."""

    @property
    def module(self) -> PreparedModule:
        """The part."""

    @property
    def analysis(self) -> ChannelAnalysis:
        """The analysis of its evaluation graph."""

    @property
    def name(self) -> str:
        """Its own, in the model."""

    @property
    def resolution(self) -> float:
        """What thresholds must be apart to make a difference; zero if that is not known."""

    def liveness(self, threshold: float) -> Liveness:
        """What is left alive at `threshold`."""

    def last_to_go(self, threshold: float) -> Sequence[int]:
        """What goes at `threshold` and could stay by itself, the most important first."""

    def sparing(self, stays: Sequence[int]) -> "PrunablePart":
        """The part with some of `last_to_go` that stays at every threshold."""


@dataclass(frozen=True)
class Candidate:
    """Masks that might be set.

    Attributes:
        lives: what they leave alive in every part of the model.
        cost: of what they leave, all parts together.
        emitted: of what `convert` makes of it, the zeros that fill up its forms included.
        budgeted: what of it the budget is of.
        broken: which parameters are not shared any more.
    """

    lives: tuple[Liveness, ...]
    cost: Cost
    emitted: Cost
    budgeted: float
    broken: tuple[str, ...]


class Emitted(NamedTuple):
    """What is emitted of a part, see `Candidate`."""

    cost: Cost
    broken: tuple[str, ...]


def prune_by(
    latency: Latency | None, parts: Sequence[PrunablePart], budget: Budget, hint: str
) -> PruneReport:
    """Mask `parts` by the smallest threshold that is within `budget`.

    Args:
        latency: of the parts, for a budget of it.
        parts: all of a model.
        budget: what may remain.
        hint: for an error, why no less than `{least}` can remain, and what to do about it.

    Raises:
        BudgetError: the budget cannot be reached. Nothing is changed.
    """
    before = together(total(part.analysis) for part in parts)
    dense = budget.of(before, before, 1.0)
    with ExitStack() as stack:
        views = [stack.enter_context(part.module.evaluation_view()) for part in parts]
        search = _Search(parts, views, latency, budget, dense)
        threshold, found = search.smallest(hint)
        found = search.reopened(search.filled(threshold, found)) if threshold > 0 else found
    for part, live in zip(parts, found.lives, strict=True):
        apply_reads(part.module, part.analysis, live)
    achieved, note = found.budgeted / dense, ""
    if threshold > 0 and achieved < budget.fraction - CLOSE_ENOUGH:
        note = "the next step up exceeds the budget: this is the closest below it"
    weak = [
        layer
        for part, live in zip(parts, found.lives, strict=True)
        for layer in weak_layers(part.name, part.analysis, live)
    ]
    return PruneReport(
        *(budget.fraction, achieved, threshold, before, found.cost, found.emitted, note),
        warnings=(*in_words(weak), *found.broken),
    )


def held_by_others(
    parts: Sequence[PrunablePart], found: Candidate, budget: Budget, dense: float
) -> str:
    """Which layers without a gate hold most of what `found` leaves, as the end of a message."""
    if budget.latency is not None:
        return ""
    held: dict[str, float] = defaultdict(float)
    for part, live in zip(parts, found.lives, strict=True):
        analysis = part.analysis
        for node, cost in layer_costs(analysis, live).items():
            op = analysis.ops[node]
            if not (isinstance(op, Mix) and op.gated):
                name = full_name(part.name, str(node.target))
                held[name] += cost.macs if budget.macs is not None else cost.parameters
        if budget.macs is not None and analysis.fixed.outside:
            held["the code around the parts"] += analysis.fixed.outside
        fixed = analysis.fixed.macs if budget.macs is not None else analysis.fixed.parameters
        for node in fixed.keys() & live.kept.keys():
            name = str(node.target) if node.op == "call_module" else node.name
            held[full_name(part.name, name)] += fixed[node]
    largest = sorted(held.items(), key=lambda item: -item[1])[:MOST_HOLDERS]
    named = [f"{name} ({n / dense:.2%})" for name, n in largest if n >= LEAST_HELD * dense]
    if not named:
        return ""
    return f". Layers that are not gated hold {sum(held.values()) / dense:.2%}: " + ", ".join(named)


class _Search:
    """For the smallest threshold within a budget; `dense` is what is budgeted of all there is."""

    def __init__(
        self,
        parts: Sequence[PrunablePart],
        views: Sequence[fx.GraphModule],
        latency: Latency | None,
        budget: Budget,
        dense: float,
    ) -> None:
        self.parts, self.views, self.latency = parts, views, latency
        self.budget, self.dense = budget, dense
        self.plans: dict[tuple[int, bytes], Emitted] = {}  # of a part, by what is alive in it

    def smallest(self, hint: str) -> tuple[float, Candidate]:
        """The threshold, as closely as it is known to matter, and what it leaves.

        Raises:
            BudgetError: the budget cannot be reached.
        """
        limit = self.budget.fraction * self.dense
        low, best = 0.0, self.candidate(0.0)
        if best.budgeted <= limit:
            return 0.0, best
        high, best = 1.0, self.candidate(1.0)
        if best.budgeted > limit:
            least = best.budgeted / self.dense
            raise BudgetError(
                f"the budget of {self.budget.fraction:.2%} cannot be reached: "
                + hint.format(least=least)
                + held_by_others(self.parts, best, self.budget, self.dense)
            )
        resolution = max(min(part.resolution for part in self.parts), FINEST)
        while high - low > resolution:
            middle = (low + high) / 2
            found = self.candidate(middle)
            if found.budgeted <= limit:
                high, best = middle, found
            else:
                low = middle
            if best.budgeted > limit - CLOSE_ENOUGH / 50 * self.dense:
                break
        return high, best

    def filled(self, threshold: float, found: Candidate) -> Candidate:
        """`found` with more of what went last, as far as the budget has room for it.

        A channel of a residual stream that all layers share may be worth several percent: the
        step that leaves it out falls short of the budget, and smaller ones before it fit in.
        """
        limit = self.budget.fraction * self.dense
        for number, part in enumerate(self.parts):
            spared: list[int] = []
            for one in part.last_to_go(threshold)[:MOST_FILLED]:
                if found.budgeted >= limit - CLOSE_ENOUGH / 5 * self.dense:
                    return found
                more = part.sparing([*spared, one])
                lives = (*found.lives[:number], more.liveness(threshold))
                trial = self._candidate((*lives, *found.lives[number + 1 :]))
                if found.budgeted < trial.budgeted <= limit:
                    found = trial
                    spared.append(one)
        return found

    def reopened(self, found: Candidate) -> Candidate:
        """`found` with masks that leave out nothing that is emitted anyway, if that is counted."""
        rounded = any(part.module.asked.round_to > 1 for part in self.parts)
        if rounded or self.budget.count == "masks" or self.budget.latency is not None:
            return found
        more = self._candidate(
            tuple(
                reopened(part.module, part.analysis, live, self._plan(number, live))
                for number, (part, live) in enumerate(zip(self.parts, found.lives, strict=True))
            )
        )
        return more if more.budgeted <= self.budget.fraction * self.dense else found

    def candidate(self, threshold: float) -> Candidate:
        """What `threshold` leaves of all parts."""
        return self._candidate(tuple(part.liveness(threshold) for part in self.parts))

    def _candidate(self, lives: tuple[Liveness, ...]) -> Candidate:
        costs = (total(p.analysis, live) for p, live in zip(self.parts, lives, strict=True))
        planned = [self._emitted(number, live) for number, live in enumerate(lives)]
        cost, emitted = together(costs), together(each.cost for each in planned)
        time = self.latency.predict(lives) if self.latency is not None else 0.0
        ties = tuple(tie for each in planned for tie in each.broken)
        return Candidate(lives, cost, emitted, self.budget.of(cost, emitted, time), ties)

    def _emitted(self, number: int, live: Liveness) -> Emitted:
        key = number, live.digest()
        if key not in self.plans:
            analysis, planned = self.parts[number].analysis, self._plan(number, live)
            cost = emitted_total(analysis, live, planned)
            self.plans[key] = Emitted(cost, broken_ties(analysis, planned))
        return self.plans[key]

    def _plan(self, number: int, live: Liveness) -> CompactionPlan:
        return plan(self.views[number], self.parts[number].analysis, live, CPU)
