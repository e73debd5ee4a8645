"""`CyclicFinetune`: fine-tuning in cycles, each of which prunes a little more.

As the method's authors do it (Park et al., AAAI 2023, arXiv 2303.09736, and their program):

1. A cycle starts from the best weights so far, prunes a little more, and forgets what the
   optimizer remembers.
2. Within it, the learning rate falls from that of the optimizer to nothing along half a cosine,
   `lr(s) = lr / 2 * (1 + cos(pi s / S))` after s of its S steps (Loshchilov, Hutter, "SGDR:
   Stochastic Gradient Descent with Warm Restarts", ICLR 2017).
3. At the end of every epoch its weights are kept if no others of the same masks had a better score.

Weights with more left cannot be compared with those of the final budget: whenever pruning takes
anything away, the best score starts again, so that in the end the best weights of the last cycle
count. Where masks stay as they are, the best of all cycles does.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import DspfxWarning, LearnError
from dspfx.model.module import PreparedModule
from dspfx.pruning.budget import Budget, PruneReport, check_budget
from dspfx.pruning.masks import get_masks
from dspfx.pruning.prune import prune
from dspfx.pruning.weak_layers import REMEDY, suspects
from dspfx.utils.resume import check_kind, check_settings
from dspfx.utils.wrappers import trained_parameters, unwrapped

PROGRESS = ("epoch", "step_in_epoch", "cycle", "best_score", "best_epoch", "history")


class CyclicFinetune:
    """Fine-tunes a prepared model in your own loop, and prunes it on the way.

        finetune = dspfx.CyclicFinetune(prepared, optimizer, dspfx.Budget(macs=0.35),
                                        cycles=5, epochs=400, steps_per_epoch=len(loader))
        for epoch in finetune:  # prunes at the start of each cycle
            for x, y in loader:
                ...             # one step of the optimizer, as usual
                finetune.step()
            finetune.end_epoch(accuracy_on_validation_images)

    Afterwards the model holds the best weights within the budget. To resume a run, save it after
    `end_epoch`, with `dspfx.save_checkpoint(path, model=prepared, optimizer=optimizer,
    finetune=finetune)`, construct all three again, load them, and enter the loop again.

    Args:
        prepared: from `dspfx.prepare`, pruned before or not; any other model, such as one of
            `dspfx.narrow`, if there is no budget.
        optimizer: the user's, over the model's parameters, with the learning rates that each cycle
            starts with. Every cycle finds it in the state that it has now.
        budget: what may remain in the end; cycle c of n prunes to `(n - 1 - c) * prune_more` above
            it. None to prune no further.
        cycles: n, of as equal lengths as whole epochs allow.
        epochs: in all.
        steps_per_epoch: how often `step` is called in an epoch at most.
        prune_more: the fraction of the dense network's cost that a cycle takes away.
        initial_score: of the model as it is now; its weights count as the best until others have a
            better score, if nothing is pruned from them. Unknown, those of the first epoch do.
        reference: the score before pruning; cycles that end far below it are warned of.
        collapse: warn of a score that is lower than the best, or than `reference`, by more than
            this share of it.

    Attributes:
        epoch: how many are done.
        cycle: the number of the present one, from 0.
        best_score: with the present masks; None if there was no score yet.
        best_epoch: the epoch that the best weights come from; None for those a cycle began with.
        report: of the latest pruning, see `dspfx.PruneReport`; None in a resumed run until then.
        history: for every cycle that is done, its best score and epoch.

    Raises:
        LearnError: a setting out of range.
        ConvertError: there is a budget, and `prepared` does not come from `dspfx.prepare`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
        >>> budget = dspfx.Budget(macs=0.5)
        >>> finetune = dspfx.CyclicFinetune(
        ...     prepared, optimizer, budget, cycles=2, epochs=4, steps_per_epoch=1
        ... )
        >>> for epoch in finetune:
        ...     optimizer.zero_grad()
        ...     prepared.train()(x).square().mean().backward()
        ...     optimizer.step()
        ...     finetune.step()
        ...     finetune.end_epoch(score=0.0)
        >>> finetune.report.achieved <= 0.5
        True
    """

    def __init__(
        self,
        prepared: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: Budget | None = None,
        *,
        cycles: int = 5,
        epochs: int,
        steps_per_epoch: int,
        prune_more: float = 0.001,
        initial_score: float | None = None,
        reference: float | None = None,
        collapse: float = 0.5,
    ) -> None:
        if not 1 <= cycles <= epochs:
            raise LearnError(f"a cycle takes an epoch at least: {cycles} cycles, {epochs} epochs")
        if steps_per_epoch < 1:
            raise LearnError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}")
        if not 0 <= prune_more < 1:
            raise LearnError(f"prune_more must be a fraction in [0, 1), got {prune_more}")
        if initial_score is not None and not math.isfinite(initial_score):
            raise LearnError(f"initial_score must be finite, got {initial_score}")
        if not collapse > 0:
            raise LearnError(f"collapse must be positive, got {collapse}")
        check_budget(budget, optional=True)
        gated = budget is not None or any(isinstance(m, PreparedModule) for m in prepared.modules())
        if gated:
            get_masks(prepared)
        if not trained_parameters(optimizer) & set(prepared.parameters()):
            raise LearnError("the optimizer trains no weight of this model; construct it again")
        if not any(float(group["lr"]) for group in optimizer.param_groups):
            raise LearnError(
                "the learning rates of the optimizer are zero, perhaps since it was annealed; give "
                "it those that each cycle is to start with"
            )
        self.prepared = prepared
        self.optimizer = optimizer
        self._gated = gated
        self.budget = budget
        self.cycles = cycles
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.prune_more = prune_more
        self.initial_score = initial_score
        self.reference = reference
        self.collapse = collapse
        self.epoch = 0
        self.step_in_epoch = 0
        self.cycle = -1
        self.best_score: float | None = None
        self.best_epoch: int | None = None
        self.report: PruneReport | None = None
        self.history: list[dict[str, Any]] = []
        self._begun = 0  # the epoch that the loop is in
        self._best: dict[str, Tensor] = {}
        self._fresh = copy.deepcopy(optimizer.state_dict())

    def __iter__(self) -> Iterator[int]:
        """The numbers of the epochs still to do; starts cycles, and ends with the best weights.

        Raises:
            BudgetError: the budget cannot be reached.
            LearnError: `end_epoch` was not called.
        """
        while self.epoch < self.epochs:
            if self._cycle_of(self.epoch) > self.cycle:
                self._begin_cycle()
            before = self._begun = self.epoch
            yield before
            if self.epoch == before:
                raise LearnError("call end_epoch() at the end of every epoch")
        self.restore_best()

    def step(self) -> None:
        """Set the learning rate of the next step; call it after each step of the optimizer.

        Raises:
            LearnError: the epoch has more steps than it was said to have, or none has begun.
        """
        if self.step_in_epoch >= self.steps_per_epoch:
            raise LearnError(
                f"this epoch has more than {self.steps_per_epoch} steps; construct CyclicFinetune "
                "with the steps_per_epoch that you need"
            )
        if self.cycle < 0:
            raise LearnError("no cycle has begun; loop over the epochs: for epoch in finetune")
        self.step_in_epoch += 1
        self._set_rates()

    def end_epoch(self, score: float | None = None) -> None:
        """Count an epoch as done, and keep its weights if they are the best.

        Args:
            score: of the model as it is now, the higher the better, such as the accuracy on
                validation images; the same number in every process of a distributed run. Without
                any, the last weights count; one that is not finite counts as the worst.

        Warns:
            DspfxWarning: the score has collapsed; the message says what to look at.
        """
        if self.cycle < 0:
            raise LearnError("no cycle has begun; loop over the epochs: for epoch in finetune")
        if self.epoch > self._begun:
            raise LearnError("this epoch has ended; call end_epoch() once for each")
        score = None if score is None else float(score)
        if score is not None:
            self._warn_of_a_fall(score)
        if self._is_best(score):
            self._best = self._snapshot()
            self.best_score, self.best_epoch = score, self.epoch
        self.epoch += 1
        self.step_in_epoch = 0
        self._set_rates()
        if self.epoch == self._first_epoch(self.cycle + 1):
            done = {"cycle": self.cycle, "score": self.best_score, "epoch": self.best_epoch}
            self.history.append(done)
            self._warn_of_a_loss()

    def restore_best(self) -> None:
        """Put the best weights, and the buffers that belong to them, into the model."""
        if self._best:
            unwrapped(self.prepared).load_state_dict(self._best)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the states of model and optimizer, the best weights."""
        return {
            "settings": self._settings(),
            "progress": {name: copy.copy(getattr(self, name)) for name in PROGRESS},
            "best": self._best,
            "fresh_optimizer": self._fresh,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run that `state` was saved in.

        Raises:
            LearnError: `state` is of another model, or of a run with other settings. Nothing is
                changed then.
        """
        check_kind(self.state_dict(), state, "CyclicFinetune")
        check_settings(self._settings(), state["settings"], "this one")
        best, own = state["best"], unwrapped(self.prepared).state_dict()
        if best and {n: t.shape for n, t in best.items()} != {n: t.shape for n, t in own.items()}:
            raise LearnError("this is the state of a CyclicFinetune for another model")
        self._best = {name: t.to(own[name].device, copy=True) for name, t in best.items()}
        self._fresh = copy.deepcopy(state["fresh_optimizer"])
        for name in PROGRESS:
            setattr(self, name, copy.copy(state["progress"][name]))

    def _settings(self) -> dict[str, Any]:
        plain = None if self.budget is None else self.budget.plain()
        names = ("cycles", "epochs", "steps_per_epoch", "prune_more")
        return {"budget": plain, **{name: getattr(self, name) for name in names}}

    # -- cycles ------------------------------------------------------------------------------

    def _cycle_of(self, epoch: int) -> int:
        return epoch * self.cycles // self.epochs

    def _first_epoch(self, cycle: int) -> int:
        return math.ceil(cycle * self.epochs / self.cycles)

    def _begin_cycle(self) -> None:
        """Restore the best weights so far, prune a little more, and restart the learning rates."""
        cycle, first = self._cycle_of(self.epoch), not self._best
        self.restore_best()
        before = self._masks()
        if self.budget is not None:
            if first and cycle < self.cycles - 1 and self.budget.latency is None:
                prune(copy.deepcopy(unwrapped(self.prepared)), self.budget)  # can it be reached?
            self.report = prune(self.prepared, self._budget_of(cycle, self.budget))
        after = self._masks()
        unchanged = all(torch.equal(mask, after[name]) for name, mask in before.items())
        if first or not unchanged:
            self._best = self._snapshot()
            self.best_score = self.initial_score if unchanged else None
            self.best_epoch = None
        self.optimizer.load_state_dict(copy.deepcopy(self._fresh))
        self.cycle = cycle
        self._set_rates()

    def _masks(self) -> dict[str, Tensor]:
        return get_masks(self.prepared) if self._gated else {}

    def _budget_of(self, cycle: int, final: Budget) -> Budget:
        return final.at(min(1.0, final.fraction + (self.cycles - 1 - cycle) * self.prune_more))

    def _set_rates(self) -> None:
        first, end = self._first_epoch(self.cycle), self._first_epoch(self.cycle + 1)
        done = (self.epoch - first) * self.steps_per_epoch + self.step_in_epoch
        factor = (1 + math.cos(math.pi * done / ((end - first) * self.steps_per_epoch))) / 2
        started = self._fresh["param_groups"]
        if len(started) != len(self.optimizer.param_groups):
            raise LearnError(
                "the optimizer has other parameter groups than at the start; add them before "
                "CyclicFinetune is constructed"
            )
        for group, fresh in zip(self.optimizer.param_groups, started, strict=True):
            group["lr"] = fresh["lr"] * factor

    # -- the best weights --------------------------------------------------------------------

    def _is_best(self, score: float | None) -> bool:
        if score is None:
            return self.best_score is None
        if not math.isfinite(score):
            return False
        return self.best_score is None or score >= self.best_score

    def _snapshot(self) -> dict[str, Tensor]:
        own = unwrapped(self.prepared).state_dict()
        return {name: t.detach().clone() for name, t in own.items()}

    # -- warnings ----------------------------------------------------------------------------

    def _warn_of_a_fall(self, score: float) -> None:
        if not math.isfinite(score) or self._far_below(score, self.best_score):
            self._warn(
                f"epoch {self.epoch} scored {score:.4g}, the best with these masks is "
                f"{_number(self.best_score)}, whose weights are kept. Lower the learning rate "
                f"({self._fresh['param_groups'][0]['lr']:g} at the start of a cycle)"
            )

    def _warn_of_a_loss(self) -> None:
        if self.best_score is not None and self._far_below(self.best_score, self.reference):
            self._warn(
                f"cycle {self.cycle} came to {self.best_score:.4g} at best, before pruning it was "
                f"{_number(self.reference)}. Train for longer, or {REMEDY}"
            )

    def _far_below(self, score: float, known: float | None) -> bool:
        return known is not None and known - score > self.collapse * abs(known)

    def _warn(self, text: str) -> None:
        found = suspects(self.prepared) if self._gated else ()
        hint = f"; suspects: {', '.join(found)}" if found else "; no layer is nearly closed"
        warnings.warn(f"fine-tuning has collapsed: {text}{hint}", DspfxWarning, stacklevel=4)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
