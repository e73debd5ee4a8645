"""The three phases: what each trains, how it steps, and what a checkpoint of it holds."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.pruning.budget import PruneReport
from dspfx.pruning.gradual import GradualPruning
from dspfx.recipe.networks.outputs import classification_loss, logits_of
from dspfx.recipe.settings import Recipe, Schedule
from dspfx.recipe.team import Team
from dspfx.reporting.report import report
from dspfx.training.distill import distillation_loss
from dspfx.training.finetune import CyclicFinetune
from dspfx.training.groups.learner import GroupLearner

MOMENTUM = 0.9


class Phase(ABC):
    """One phase of a run.

    Attributes:
        name: `dense`, `learn` or `tune`.
        schedule: how it trains.
        model: what it trains, without the wrapper of several processes.
        steps: in one epoch.
    """

    name: str

    def __init__(self, schedule: Schedule, model: nn.Module, steps: int, team: Team) -> None:
        self.schedule = schedule
        self.model = model
        self.wrapped = team.wrap(model)
        self.steps = steps
        self.optimizer = torch.optim.SGD(
            model.parameters(), schedule.lr, MOMENTUM, weight_decay=schedule.weight_decay
        )

    def objects(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"model": self.model, "optimizer": self.optimizer}

    def epochs(self, done: int) -> Iterator[int]:
        """The numbers of the epochs still to do, `done` of which are."""
        yield from range(done, self.schedule.epochs)

    def before_step(self, epoch: int, step: int) -> None:
        """Set the learning rate."""
        rate = self.schedule.rate(epoch * self.steps + step, self.schedule.epochs * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @abstractmethod
    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """One step on the loss of a batch, which is returned."""

    def after_step(self) -> None:
        """Called when a step is done and counted."""
        return

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of the images `x` with the labels `y`."""
        return classification_loss(self.wrapped(x), y)

    def end_epoch(self, score: float | None) -> None:
        """Take note of the accuracy on the validation images; None if there are none."""
        return

    def macs_left(self) -> float:
        """The fraction of the dense network's MACs that its model has at present."""
        return 1.0

    def _plain_step(
        self, loss: Callable[[], Tensor], before_update: Callable[[], object] = lambda: None
    ) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        before_update()
        self.optimizer.step()
        return value.detach()


class Dense(Phase):
    """Trains the dense network."""

    name = "dense"

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """See `Phase.step`."""
        return self._plain_step(loss)


class Learn(Phase):
    """Goes on training while the filters find their groups."""

    name = "learn"

    def __init__(self, recipe: Recipe, prepared: nn.Module, steps: int, team: Team) -> None:
        super().__init__(recipe.learn, prepared, steps, team)
        self.learner = GroupLearner(
            self.wrapped,
            self.optimizer,
            recipe.strength,
            total_steps=recipe.learn.epochs * steps,
            logits_every=recipe.logits_every,
        )

    def objects(self) -> dict[str, Any]:
        """See `Phase.objects`."""
        return {**super().objects(), "learner": self.learner}

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """See `Phase.step`."""
        return self.learner.step(loss)


class Prune(Phase):
    """Goes on training while the network is pruned, by what the loss says."""

    name = "learn"

    def __init__(self, recipe: Recipe, prepared: nn.Module, steps: int, team: Team) -> None:
        super().__init__(recipe.learn, prepared, steps, team)
        self.pruning = gradual_pruning(recipe, self.wrapped, recipe.learn.epochs * steps)

    def objects(self) -> dict[str, Any]:
        """See `Phase.objects`."""
        return {**super().objects(), "pruning": self.pruning}

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """See `Phase.step`."""
        return self._plain_step(loss, before_update=self.pruning.step)

    def macs_left(self) -> float:
        """See `Phase.macs_left`."""
        return macs_left(self.model, self.pruning.report)


def gradual_pruning(recipe: Recipe, prepared: nn.Module, steps: int) -> GradualPruning:
    """What prunes in the second phase, which takes so many `steps`.

    Raises:
        BudgetError: the budget cannot be reached.
    """
    groups = recipe.method == "gradual"
    return GradualPruning(prepared, recipe.budget, total_steps=steps, groups=groups)


class Tune(Phase):
    """Prunes and fine-tunes in cycles, with a teacher's outputs if there is one."""

    name = "tune"

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        steps: int,
        team: Team,
        *,
        teacher: nn.Module | None,
        initial_score: float | None,
        reference: float | None,
        macs_left: float | None = None,
    ) -> None:
        super().__init__(recipe.tune, model, steps, team)
        self.recipe = recipe
        self._macs_left = macs_left  # where nothing more is pruned
        self.teacher = teacher
        self.finetune = CyclicFinetune(
            model,
            self.optimizer,
            None if recipe.gradual else recipe.budget,
            cycles=recipe.cycles,
            epochs=recipe.tune.epochs,
            steps_per_epoch=steps,
            prune_more=recipe.prune_more,
            initial_score=initial_score,
            reference=reference,
        )

    def objects(self) -> dict[str, Any]:
        """See `Phase.objects`."""
        return {**super().objects(), "finetune": self.finetune}

    def epochs(self, done: int) -> Iterator[int]:
        """See `Phase.epochs`; what is left has the best weights when all are done."""
        yield from self.finetune

    def before_step(self, epoch: int, step: int) -> None:
        """The rate is set already."""
        return

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """See `Phase.step`."""
        return self._plain_step(loss)

    def after_step(self) -> None:
        """See `Phase.after_step`."""
        self.finetune.step()

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Phase.loss`."""
        output = self.wrapped(x)
        task = classification_loss(output, y)
        if self.teacher is None:
            return task
        with torch.no_grad():
            answers = logits_of(self.teacher(x))
        return distillation_loss(
            logits_of(output),
            answers,
            task.float(),
            temperature=self.recipe.temperature,
            weight=self.recipe.distill_weight,
        )

    def end_epoch(self, score: float | None) -> None:
        """See `Phase.end_epoch`."""
        self.finetune.end_epoch(score)

    def macs_left(self) -> float:
        """See `Phase.macs_left`."""
        if self._macs_left is not None:
            return self._macs_left
        return macs_left(self.model, self.finetune.report)


def macs_left(prepared: nn.Module, pruned: PruneReport | None = None) -> float:
    """The fraction of the MACs that the masks leave, from the report `pruned` if there is one."""
    found = pruned or report(prepared)
    return found.after.macs / found.before.macs
