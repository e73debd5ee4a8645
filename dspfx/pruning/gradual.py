"""`GradualPruning`: prunes while the network trains, what the loss would miss least for its cost.

1. Every step adds to the sensitivities of channels and of groups, see `dspfx.pruning.sensitivity`.
2. A few dozen times, what has the least sensitivity for the MACs (parameters, time) that would be
   saved is dropped, whole channels and inputs of groups in one order, until the present budget is
   met. It falls geometrically: after the share u of all prunings, `kept^u` remains.
3. What was seen before a pruning counts less and less afterwards.

After Liu et al., "Group Fisher Pruning for Practical Network Compression", ICML 2021, arXiv
2108.00708, who drop one channel at a time, and channels alone.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dspfx.errors import LearnError
from dspfx.model.parts import Part, parts_of
from dspfx.model.unfinished import note_unfinished
from dspfx.pruning.budget import Budget, PruneReport, check_budget
from dspfx.pruning.latency import Latency
from dspfx.pruning.ranking import sensitive_parts
from dspfx.pruning.search import prune_by
from dspfx.pruning.sensitivity import Sensitivity
from dspfx.pruning.whole_times import WholeTimes
from dspfx.utils.distributed import Processes
from dspfx.utils.resume import check_kind, check_settings
from dspfx.utils.wrappers import unwrapped

LEAST = (
    "with one channel left to every layer and one input to every group, {least:.2%} remains; ask "
    "for more than that or ignore fewer layers"
)
WHEN = "call step() after the backward pass and before zero_grad()"
SETTINGS = ("total_steps", "begin", "end", "prunings", "decay", "groups")


class GradualPruning:
    """Prunes a prepared model step by step while your own loop trains it.

        pruning = dspfx.GradualPruning(prepared, dspfx.Budget(macs=0.1),
                                       total_steps=epochs * len(loader))
        for x, y in loader:
            optimizer.zero_grad()
            loss(prepared(x), y).backward()
            pruning.step()      # after the backward pass: it looks at the gradients
            optimizer.step()

    Channels and inputs of groups go in one order: the mean square of the loss's derivative by a
    factor in front of them, over what they cost of the budget at present. Groups are those that the
    model has at the first step, learned or from `cluster_groups`; without either a layer is one
    group. What is pruned already stays pruned. Inputs of layers that are frozen, or whose
    weight is computed from others, all stay: nothing is known of them.

    Args:
        prepared: from `dspfx.prepare`, or a model that holds such; it may be wrapped or compiled.
        budget: what may remain in the end. For one of latency, layers are measured here, and the
            whole network half of the way and before the last pruning.
        total_steps: T, how often `step` will be called at most.
        begin: the share of them after which pruning begins.
        end: the share of them after which it is done; the rest trains what remains.
        prunings: how often something is dropped in between.
        decay: what the sums of sensitivities are multiplied by at every pruning.
        groups: whether groups drop inputs by themselves. Without, only whole channels go, which is
            fast in any runtime.
        process_group: the processes that train the model together; see `GroupLearner`. It is the
            sensitivities of the first one that count.

    Attributes:
        steps_done: how often `step` was called.
        prunings_done: how many of the prunings were due since.
        report: of the latest pruning, see `dspfx.PruneReport`; None before the first.

    Raises:
        BudgetError: the budget cannot be reached.
        LearnError: a setting out of range.
        ConvertError: `prepared` does not come from `dspfx.prepare`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
        >>> pruning = dspfx.GradualPruning(prepared, dspfx.Budget(macs=0.5), total_steps=10)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     prepared(x).square().mean().backward()
        ...     pruning.step()
        ...     optimizer.step()
        >>> pruning.report.achieved <= 0.5
        True
        >>> compact = dspfx.convert(prepared)
    """

    def __init__(
        self,
        prepared: nn.Module,
        budget: Budget,
        *,
        total_steps: int,
        begin: float = 0.05,
        end: float = 0.4,
        prunings: int = 40,
        decay: float = 0.7,
        groups: bool = True,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        if total_steps < 1 or prunings < 1:
            raise LearnError("total_steps and prunings must be at least 1")
        if not 0 <= begin <= end <= 1:
            raise LearnError(f"0 <= begin <= end <= 1 must hold, got {begin} and {end}")
        if not 0 <= decay <= 1:
            raise LearnError(f"decay must be in [0, 1], got {decay}")
        check_budget(budget)
        self.budget = budget
        self.total_steps, self.begin, self.end = total_steps, begin, end
        self.prunings, self.decay, self.groups = prunings, decay, groups
        self.steps_done = self.prunings_done = 0
        self._going = False  # a model may be loaded until then
        self.report: PruneReport | None = None
        self.processes = Processes.of(prepared, process_group)
        self.prepared = unwrapped(prepared)
        self.parts = parts_of(self.prepared)
        self.sensitivities = [Sensitivity(part.module) for part in self.parts]
        self.latency = Latency.of(self.parts, budget, self.processes)
        self._started = self._trial()

    def __repr__(self) -> str:
        left = "" if self.report is None else f", {self.report.achieved:.2%} left"
        return (
            f"GradualPruning(budget {self.budget.fraction:.2%}{left}, step {self.steps_done} of "
            f"{self.total_steps}, pruning {self.prunings_done} of {self.prunings})"
        )

    def step(self) -> None:
        """Look at the gradients, and prune if it is time to.

        Call it between the backward pass and the step of the optimizer, with gradients that are
        complete, unscaled and not clipped. Gradients that are not finite are passed over.

        Raises:
            LearnError: all steps are done, or no layer has a gradient; nothing is changed then. Or
                filters have changed groups since the first step.
            BudgetError: layers that the loss never reaches keep all they read, and so much is left
                that the budget cannot be met. Masks stay as they are then.
        """
        if self.steps_done >= self.total_steps:
            raise LearnError(
                f"all {self.total_steps} steps are done; construct a GradualPruning with the "
                "total_steps you need"
            )
        pruning = self.prunings_done < self.prunings
        if pruning and not any(s.has_gradients() for s in self.sensitivities):
            raise LearnError(
                f"no layer has a gradient; {WHEN}, on a model whose weights are not all frozen"
            )
        if not self._going:
            for sensitivity in self.sensitivities:
                sensitivity.take_groups()
        self._going = True
        self.steps_done += 1
        if not pruning:
            return
        for sensitivity in self.sensitivities:
            sensitivity.update()
        due = self._prunings_due()
        if due > self.prunings_done and any(s.reached.any() for s in self.sensitivities):
            self._prune(due)
            self.prunings_done = due
        done = self.prunings_done == self.prunings
        note_unfinished(self.prepared, "GradualPruning", None if done else self._progress())

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's own state; plain values and tensors."""
        return {
            "settings": {
                "budget": self.budget.plain(),
                **{name: getattr(self, name) for name in SETTINGS},
            },
            "steps_done": self.steps_done,
            "prunings_done": self.prunings_done,
            "started": self._started,
            "sums": [v.clone() for s in self.sensitivities for v in s.values()],
            "latency": None if self.latency is None else self.latency.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run that `state` was saved in; load the model's own state as well.

        Raises:
            LearnError: `state` is of another model, or of a run with other settings. Nothing is
                changed then.
        """
        own, state = self.state_dict(), _of_today(state)
        check_kind(own, state, "GradualPruning")
        check_settings(own["settings"], state["settings"], "this one")
        shapes = [v.shape for v in own["sums"]], [v.shape for v in state["sums"]]
        if _timed(own["latency"]) != _timed(state["latency"]) or shapes[0] != shapes[1]:
            raise LearnError("this is the state of a GradualPruning for another model")
        self.steps_done, self.prunings_done = state["steps_done"], state["prunings_done"]
        self._started, self._going = state["started"], False
        if self.latency is not None:
            self.latency = self.latency.with_state(state["latency"])
        values = [v for s in self.sensitivities for v in s.values()]
        for value, saved in zip(values, state["sums"], strict=True):
            value.copy_(saved)

    def _prunings_due(self) -> int:
        """How many prunings should have been done by now."""
        first, last = self.begin * self.total_steps, self.end * self.total_steps
        if self.steps_done >= last:
            return self.prunings
        if self.steps_done < first:
            return 0
        return int((self.steps_done - first) / (last - first) * self.prunings)

    def _progress(self) -> str:
        left = "" if self.report is None else f", {self.report.achieved:.2%} is left"
        return (
            f"{self.prunings_done} of {self.prunings} prunings{left} and the budget is "
            f"{self.budget.fraction:.2%}"
        )

    def _prune(self, due: int) -> None:
        """Prune to what should be left after the pruning of this number, from 1."""
        if any(sensitivity.groups_changed() for sensitivity in self.sensitivities):
            raise LearnError(
                "filters have changed groups since the first step, and what was gathered is of the "
                "former; construct a GradualPruning once the groups are final"
            )
        sums = [v for s in self.sensitivities for v in s.values()]
        self.processes.broadcast(sums)
        if not any(s.classes.any() for s in self.sensitivities):
            raise LearnError(f"all gradients were zero so far; {WHEN}")
        if self._is_to_be_measured(due):
            self._measure()
        share = due / self.prunings
        kept = self._started ** (1 - share) * self.budget.fraction**share
        report = self._prune_to(kept, self.parts, self.latency)
        if due < self.prunings:
            way = f"pruning {due} of {self.prunings}, on the way to {self.budget.fraction:.2%}"
            report = replace(report, note=way)
        self.report = report
        for sensitivity in self.sensitivities:
            sensitivity.decay(self.decay)

    def _trial(self) -> float:
        """What fraction there is at present; raises if the budget cannot be reached."""
        parts = parts_of(copy.deepcopy(self.prepared))
        latency = None if self.latency is None else self.latency.on(parts)
        started = self._prune_to(1.0, parts, latency).achieved
        self._prune_to(self.budget.fraction, parts, latency)
        return max(started, self.budget.fraction)

    def _prune_to(self, fraction: float, parts: list[Part], latency: Latency | None) -> PruneReport:
        tables = () if latency is None else latency.tables
        ordered = sensitive_parts(parts, self.sensitivities, self.budget, tables, self.groups)
        return prune_by(latency, ordered, self.budget.at(min(fraction, 1.0)), LEAST)

    def _is_to_be_measured(self, due: int) -> bool:
        """Half of the way, and before the last pruning."""
        half = self.prunings / 2
        return self.prunings_done < half <= due or due == self.prunings

    def _measure(self) -> None:
        """Correct what is predicted by the time that the present masks leave."""
        if self.latency is None or self.report is None:
            return
        modules = [part.module for part in self.parts]

        def measure() -> float:
            return WholeTimes(self.budget, modules).fraction(modules)

        measured = self.processes.of_first(measure)
        self.latency = self.latency.corrected(modules, measured)


def _of_today(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """`state`, also where it was saved before whole networks were measured."""
    if "times" not in state:
        return state
    latency = {"times": state["times"], "own_inputs": [{} for _ in state["times"]], "measured": []}
    others = {name: value for name, value in state.items() if name != "times"}
    return {**others, "latency": latency if state["times"] else None}


def _timed(state: Mapping[str, Any] | None) -> list[list[str]]:
    """The layers that there are times of."""
    return [] if state is None else [sorted(times) for times in state["times"]]
