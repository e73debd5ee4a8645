"""The loop of a run: epochs, checkpoints and metrics of one phase after the other.

Whenever it stops, it goes on from its last checkpoint bit for bit, on a CPU: what the checkpoint
does not hold is drawn again from the place where the run is, see `seeds`.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dspfx.errors import LearnError
from dspfx.recipe.epochs import Epoch, Logger
from dspfx.recipe.folder import RunFolder
from dspfx.recipe.images.seeds import generator_of, seed_of
from dspfx.recipe.images.sources import Batch, Source, Split, in_batches
from dspfx.recipe.networks.outputs import autocast, right_answers
from dspfx.recipe.phases import Phase
from dspfx.recipe.settings import Recipe
from dspfx.recipe.team import Team
from dspfx.storage.checkpoint import load_checkpoint, save_checkpoint

NAMES = ("dense", "learn", "tune")
TEST_BATCH = 256
SHOWN_EVERY = 20  # steps: a look at the loss makes a GPU wait


@dataclass
class Place:
    """Where in a run a checkpoint is.

    Attributes:
        phase: the name of the phase.
        epoch: how many of its epochs are done.
        step: how many steps of the next one are.
        loss: the sum of the losses of these steps.
        metrics: how long the file of metrics is.
    """

    phase: str
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    metrics: int = 0


class Training:
    """What the phases of a run have in common.

    Attributes:
        facts: numbers that the run has found, for its report; checkpoints hold them.
        place: of the checkpoint that the run goes on from; None for a new one.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        source: Source,
        team: Team,
        *,
        checkpoint_minutes: float,
        loggers: Sequence[Logger] = (),
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.source = source
        self.team = team
        self.between_checkpoints = 60 * checkpoint_minutes
        self.loggers = loggers
        self.facts: dict[str, float] = {}
        self.place: Place | None = None
        self._saved = time.monotonic()

    def find_place(self) -> None:
        """Read from the checkpoint where the run stopped."""
        if not self.folder.checkpoint.exists():
            self.folder.cut_metrics(0)
            return
        values = load_checkpoint(self.folder.checkpoint)
        self.place, self.facts = Place(**values["place"]), values["facts"]
        self.folder.cut_metrics(self.place.metrics)

    def is_past(self, phase: str) -> bool:
        """Whether the run that is resumed has come to a later phase."""
        return self.place is not None and NAMES.index(self.place.phase) > NAMES.index(phase)

    def is_in(self, phase: str) -> bool:
        """Whether the run that is resumed has begun this phase, and no later one."""
        return self.place is not None and self.place.phase == phase

    def train(self, phase: Phase, at_start: Callable[[int], None] | None = None) -> None:
        """Go through all epochs of `phase` that are still to do.

        Args:
            phase: whose model and optimizer are those it shall start with; a checkpoint within
                the phase is loaded into them.
            at_start: called with the number of an epoch before its first step.

        Raises:
            LearnError: the loss is not finite.
        """
        place = Place(phase.name)
        if self.place is not None and self.place.phase == phase.name:
            place = self.place
            load_checkpoint(self.folder.checkpoint, **phase.objects())
        if not self.team.first:  # or its dropout would be the first one's
            torch.manual_seed(seed_of(self.recipe.seed, *asdict(place).values(), self._rank))
        for epoch in phase.epochs(place.epoch):
            if at_start is not None and place.step == 0:
                at_start(epoch)
            self._epoch(phase, place)
            place = Place(phase.name, epoch + 1, metrics=self.folder.logged())
            self._save(phase, place)

    def accuracy(self, model: nn.Module, split: Split) -> float:
        """The fraction of the images of `split` that `model` knows, in its weights' precision.

        Its mode stays as it is.
        """
        right = right_answers(model, self.batches_of(split))
        right_in_all, count = self.team.sums(right, len(self._numbers(split)))
        return right_in_all / count

    def batches_of(self, split: Split) -> Iterator[Batch]:
        """This process's share of the images of `split`, as they are, on its device."""
        numbers = self._numbers(split)
        if len(numbers):  # there may be more processes than images
            batches = self.source.batches(split, torch.split(numbers, TEST_BATCH))
            yield from self._on_device(batches)

    def autocast(self) -> Any:
        """Autocast to the precision of the recipe."""
        return autocast(self.team.device, self.recipe.precision)

    # -- one epoch ---------------------------------------------------------------------------

    @property
    def _rank(self) -> int:
        return self.team.rank

    def _epoch(self, phase: Phase, place: Place) -> None:
        """What is left of an epoch, of which `place.step` steps are done."""
        started, first = time.monotonic(), place.step
        losses = torch.tensor(place.loss, dtype=torch.float64, device=self.team.device)
        rate = phase.optimizer.param_groups[0]["lr"]
        phase.wrapped.train()
        with self._bar(phase, place) as bar:
            for step, (x, y) in enumerate(self._training_batches(phase, place), first):
                phase.before_step(place.epoch, step)
                losses += phase.step(self._closure(phase, x, y)).double()
                rate = phase.optimizer.param_groups[0]["lr"]
                phase.after_step()
                if step % SHOWN_EVERY == 0:
                    bar.set_postfix(loss=f"{float(losses) / (step + 1):.3f}", refresh=False)
                bar.update()
                if self._is_time() and step + 1 < phase.steps and losses.isfinite():
                    here = Place(
                        phase.name, place.epoch, step + 1, float(losses), self.folder.logged()
                    )
                    self._save(phase, here)
        (total,) = self.team.sums(float(losses))
        loss = total / phase.steps / self.team.count
        if not math.isfinite(loss):
            raise LearnError(
                f"the loss of epoch {place.epoch + 1} of phase {phase.name} is {loss}: lower its "
                "learning rate, or the strength if groups are being learned, and start again"
            )
        self.team.equalise(phase.model)
        score = self.accuracy(phase.model, "validation") if self.recipe.validation else None
        phase.end_epoch(score)
        seconds = time.monotonic() - started
        self.folder.log(
            phase=phase.name,
            epoch=place.epoch + 1,
            loss=loss,
            validation=score,
            lr=rate,
            seconds=round(seconds, 3),
        )
        if self.team.first and self.loggers:
            each = seconds * phase.steps / (phase.steps - first)
            self._log_epoch(phase, place.epoch + 1, loss, score, rate, seconds, each)

    def _log_epoch(
        self,
        phase: Phase,
        number: int,
        loss: float,
        score: float | None,
        rate: float,
        seconds: float,
        each: float,
    ) -> None:
        """Call all loggers with an epoch; `each` is how many seconds a whole one takes."""
        epochs = [getattr(self.recipe, name).epochs for name in NAMES]
        done = sum(epochs[: NAMES.index(phase.name)]) + number
        epoch = Epoch(
            phase=phase.name,
            number=number,
            epochs=phase.schedule.epochs,
            done=done,
            loss=loss,
            accuracy=score,
            macs=phase.macs_left(),
            learning_rate=rate,
            seconds=seconds,
            remaining=(sum(epochs) - done) * each,
        )
        for log in self.loggers:
            log(epoch)

    def _closure(self, phase: Phase, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            with self.autocast():
                return phase.loss(x, y)

        return loss

    def _training_batches(self, phase: Phase, place: Place) -> Iterator[Batch]:
        """The batches of an epoch that are still to do, this process's share of each."""
        here = (self.recipe.seed, phase.name, place.epoch)
        numbers = self.source.numbers["train"]
        order = numbers[torch.randperm(len(numbers), generator=generator_of(*here))]
        batches = in_batches(order, self.recipe.batch)
        steps = range(place.step, len(batches))
        yield from self._on_device(
            self.source.batches(
                "train",
                [self.team.share(batches[step]) for step in steps],
                [seed_of(*here, step, self._rank) for step in steps],
            )
        )

    def _on_device(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        device = self.team.device
        for x, y in batches:
            yield x.to(device, non_blocking=True), y.to(device, non_blocking=True)

    def _numbers(self, split: Split) -> Tensor:
        return self.team.part(self.source.numbers[split])

    def _bar(self, phase: Phase, place: Place) -> Any:
        return tqdm(
            total=phase.steps,
            initial=place.step,
            desc=f"{phase.name} {place.epoch + 1}/{phase.schedule.epochs}",
            unit="step",
            disable=None if self.team.first else True,  # None: on terminals only
            leave=False,
        )

    # -- checkpoints -------------------------------------------------------------------------

    def _is_time(self) -> bool:
        return time.monotonic() - self._saved >= self.between_checkpoints

    def _save(self, phase: Phase, place: Place) -> None:
        if self.team.first:
            save_checkpoint(
                self.folder.checkpoint, **phase.objects(), place=asdict(place), facts=self.facts
            )
        self._saved = time.monotonic()
