"""A whole run: train, prune, fine-tune, convert, save, report."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dspfx.convert import convert
from dspfx.errors import NarrowError, PlotError, RecipeError
from dspfx.model.config import PrepareConfig
from dspfx.prepare import prepare
from dspfx.pruning.budget import PruneReport
from dspfx.pruning.prune import prune
from dspfx.pruning.weak_layers import in_words, weak_layers_of
from dspfx.quantization.quantize import quantize
from dspfx.recipe.comparison import compare
from dspfx.recipe.epochs import Logger
from dspfx.recipe.folder import RunFolder
from dspfx.recipe.images.calibration import calibration
from dspfx.recipe.images.sources import Source, in_batches, open_source
from dspfx.recipe.networks.architectures import (
    Architecture,
    input_channels,
    read_weights,
    start_from,
)
from dspfx.recipe.networks.outputs import check
from dspfx.recipe.outcome import Outcome
from dspfx.recipe.phases import Dense, Learn, Prune, Tune, gradual_pruning, macs_left
from dspfx.recipe.settings import Recipe
from dspfx.recipe.team import Team, team
from dspfx.recipe.training import Training
from dspfx.reporting.report import report
from dspfx.storage.checkpoint import load_checkpoint, save_checkpoint
from dspfx.storage.save import save
from dspfx.training.groups.cluster import cluster_groups
from dspfx.training.narrow.narrow import NARROW, narrow
from dspfx.training.narrow.widen import widen
from dspfx.training.recalibrate import recalibrate

Say = Callable[[str], None]
RECALIBRATED = 2_048  # images that batch norms are recalibrated with


@dataclass(frozen=True)
class Machine:
    """How a run uses the machine; nothing of it decides what is computed, but for rounding.

    Attributes:
        device: see `dspfx.recipe.team`.
        workers: processes that read image files.
        checkpoint_minutes: between checkpoints within an epoch; there is one after every epoch.
    """

    device: str = "auto"
    workers: int = 4
    checkpoint_minutes: float = 10.0


def run(
    recipe: Recipe,
    folder: str | os.PathLike[str],
    *,
    resume: bool = False,
    machine: Machine | None = None,
    say: Say = lambda text: None,
    loggers: Sequence[Logger] = (),
) -> Outcome:
    """Make a compact network by `recipe`, in `folder`, or go on with the run that is there.

    Seeds torch's global generator. In a process that `torchrun` started, the others take part.

    Args:
        recipe: of the whole run; of the one in `folder` if that is resumed.
        folder: is made if it is missing.
        resume: go on from the last checkpoint; on a CPU, with the same number of threads, bit for
            bit.
        machine: how to compute it.
        say: called with a line on what is being done, and on every epoch.
        loggers: functions that are called with every `Epoch` that is done, in the first process.

    Raises:
        RecipeError: `folder` holds a run and is not to be resumed, or holds none, or one of another
            recipe; or the model does not fit the data.
        DspfxError: whatever the verbs of dspfx raise.
    """
    machine, folder = machine or Machine(), Path(folder)
    with team(machine.device) as own:
        files = RunFolder(folder, writes=own.first)
        if resume and files.recipe() != recipe:
            raise RecipeError(f"the run in {folder} has another recipe; see its config.json")
        if not resume:
            files.check_free()
        torch.manual_seed(recipe.seed)
        source = own.one_first(lambda: open_source(recipe, workers=machine.workers))
        if resume:
            files.check_images(source.fingerprint)
        begun = resume and files.checkpoint.exists()  # its weights are those to go on with
        model, architecture, source = _network(recipe, source, begun)
        steps = _Steps(recipe, files, source, own, architecture, say if own.first else _silent)
        steps.rehearse(model.to(own.device))
        own.wait()  # all have looked into the folder
        if own.first and not resume:
            files.begin(recipe, source.fingerprint)
        own.wait()
        training = Training(
            recipe,
            files,
            source,
            own,
            checkpoint_minutes=machine.checkpoint_minutes,
            loggers=(lambda epoch: say(str(epoch)), *loggers),
        )
        if resume:
            training.find_place()
        return steps.go(model, training)


def _network(recipe: Recipe, source: Source, begun: bool) -> tuple[nn.Module, Architecture, Source]:
    """The dense network, with the weights it starts from if not `begun`, and images it can read."""
    asked = Architecture(
        recipe.model, source.classes, source.channels, source.image_size, recipe.pretrained
    )
    model = asked.build(load=not begun)
    if recipe.weights is not None and not begun:
        path = Path(recipe.weights)
        start_from(model, read_weights(path), f"the weights in {path}")
    channels = input_channels(model) or source.channels
    if channels != source.channels:
        source = source.coloured()
    return model, replace(asked, channels=channels), source


class _Steps:
    """One run, step by step."""

    def __init__(
        self,
        recipe: Recipe,
        files: RunFolder,
        source: Source,
        own: Team,
        architecture: Architecture,
        say: Say,
    ) -> None:
        self.recipe = recipe
        self.files = files
        self.source = source
        self.own = own
        self.architecture = architecture
        self.say = say
        self.steps = len(in_batches(source.numbers["train"], recipe.batch))

    @property
    def example(self) -> Tensor:
        size = self.source.image_size
        return torch.zeros(2, self.source.channels, size, size, device=self.own.device)

    def rehearse(self, model: nn.Module) -> None:
        """Check the network, prepare and prune it once: what cannot work fails before training."""
        check(model, self.example, self.source.classes)
        prepared = self._prepare(model)
        if self.recipe.gradual:
            gradual_pruning(self.recipe, prepared, steps=1)
        else:
            prune(prepared, self.recipe.budget)

    def go(self, model: nn.Module, training: Training) -> Outcome:
        """Run all phases, or what is left of them."""
        self.say(self.source.describe())
        self._dense(model, training)
        prepared = self._prepare(model)
        self._learn(prepared, training)
        self._tune(model, prepared, training)
        self.say("converting, and verifying that nothing changed")
        return self._finish(prepared, convert(prepared), training)

    def _prepare(self, model: nn.Module) -> nn.Module:
        config = PrepareConfig(groups=self.recipe.groups, ignore=self.recipe.ignore)
        return prepare(model, self.example, config=config)

    def _dense(self, model: nn.Module, training: Training) -> None:
        if training.is_past("dense"):
            load_checkpoint(self.files.dense, model=model)
            return
        self._announce("training the dense network", self.recipe.dense.epochs)
        training.train(Dense(self.recipe.dense, model, self.steps, self.own))
        training.facts["dense"] = training.accuracy(model, "test")
        if self.recipe.validation:
            training.facts["dense_validation"] = training.accuracy(model, "validation")
        self.files.log(event="dense", **training.facts)
        self._keep(self.files.dense, model)

    def _learn(self, prepared: nn.Module, training: Training) -> None:
        if training.is_past("learn"):
            if self.recipe.gradual:
                load_checkpoint(self.files.pruned, model=prepared)
            return
        if self.recipe.method == "gradual" or not self.recipe.learn.epochs:
            self.say("finding groups in the weights")
            cluster_groups(prepared, seed=self.recipe.seed)
        if self.recipe.gradual:
            self._announce("pruning while it trains", self.recipe.learn.epochs)
            training.train(Prune(self.recipe, prepared, self.steps, self.own))
            self._keep(self.files.pruned, prepared)
        elif self.recipe.learn.epochs:
            self._announce("learning groups", self.recipe.learn.epochs)
            training.train(Learn(self.recipe, prepared, self.steps, self.own))

    def _tune(self, model: nn.Module, prepared: nn.Module, training: Training) -> None:
        if not self.recipe.tune.epochs:
            found = prune(prepared, self.recipe.budget_of_tuning)
            self._pruned(found, 0, prepared, training)
            recalibrate(prepared, self._some_batches(training))
            if self.recipe.validation:
                training.facts["validation"] = training.accuracy(prepared, "validation")
            return
        teacher = None
        if self.recipe.distill:
            model.eval()
            teacher = model.requires_grad_(False)
        score = training.accuracy(prepared, "validation") if self.recipe.validation else None
        doing, tuned, left = "pruning and fine-tuning", prepared, None
        if self.recipe.gradual:  # nothing is pruned any more
            left = macs_left(prepared)
            doing, tuned = "fine-tuning", self._narrow(prepared, left)
            if not training.is_in("tune"):
                found = prune(prepared, self.recipe.budget_of_tuning)
                self._pruned(found, 0, prepared, training)
        self._announce(doing, self.recipe.tune.epochs)
        tune = Tune(
            self.recipe,
            tuned,
            self.steps,
            self.own,
            teacher=teacher,
            initial_score=score,
            reference=training.facts.get("dense_validation"),
            macs_left=left,
        )
        reported: PruneReport | None = None

        def at_start(epoch: int) -> None:
            nonlocal reported
            found, cycle = tune.finetune.report, tune.finetune.cycle
            if found is not None and found is not reported:
                reported = found
                self._pruned(found, cycle, prepared, training)

        training.train(tune, at_start)
        if tuned is not prepared:
            widen(tuned, prepared)
        if self.recipe.validation and tune.finetune.best_score is not None:
            training.facts["validation"] = tune.finetune.best_score

    def _narrow(self, prepared: nn.Module, left: float) -> nn.Module:
        """What is alive of it, if that (the share `left`) trains faster and can be; else itself."""
        if left > NARROW:
            return prepared
        try:
            return narrow(prepared)
        except NarrowError as error:
            self.say(f"training it at its full width: {error}")
            return prepared

    def _pruned(
        self, found: PruneReport, cycle: int, prepared: nn.Module, training: Training
    ) -> None:
        """Print and log what one pruning did; warnings that the outcome repeats are only logged."""
        later = in_words(weak_layers_of(prepared))
        self.say(str(replace(found, warnings=tuple(w for w in found.warnings if w not in later))))
        accuracy = training.accuracy(prepared, "test")
        if cycle == 0:
            training.facts["pruned"] = accuracy
        self.files.log(
            event="prune",
            cycle=cycle,
            kept=found.achieved,
            macs=found.after.macs,
            parameters=found.after.parameters,
            test=accuracy,
            warnings=list(found.warnings),
        )

    def _some_batches(self, training: Training) -> list[Tensor]:
        """Training images as they are; the same ones in all processes, which stay alike so."""
        numbers = self.source.numbers["train"][:RECALIBRATED]
        batches = self.source.batches("train", in_batches(numbers, self.recipe.batch))
        return [x.to(self.own.device) for x, _ in batches]

    def _finish(self, prepared: nn.Module, compact: nn.Module, training: Training) -> Outcome:
        found = compare(prepared, compact, training.batches_of("test"))
        sums = self.own.sums(found.right_masked, found.right_compact, found.equal)
        images = len(self.source.numbers["test"])
        final, quantized = compact, None
        if self.recipe.quantize:
            self.say("rounding to 8 bits")
            final = quantize(compact, (x.to(self.own.device) for x, _ in calibration(self.source)))
            rounded = compare(compact, final, training.batches_of("test"))
            quantized = self.own.sums(rounded.right_compact)[0] / images
        outcome = Outcome(
            dense=training.facts["dense"],
            pruned=training.facts["pruned"],
            masked=sums[0] / images,
            compact=sums[1] / images,
            validation=training.facts.get("validation"),
            equal_predictions=int(sums[2]),
            test_images=images,
            largest_difference=self.own.largest(found.largest_difference),
            report=report(final),
            model=str(self.files.model),
            tuned=self.recipe.tune.epochs > 0,
            quantized=quantized,
            warnings=in_words(weak_layers_of(prepared)),
        )
        if self.own.first:
            save(final, self.files.model)
            if final is not compact:
                save(compact, self.files.float32)
            self.architecture.write(self.files.model)
            self.files.write(self.files.report, outcome.to_dict())
            self.files.write(self.files.text, str(outcome))
            self._write_page(outcome)
        return outcome

    def _write_page(self, outcome: Outcome) -> None:
        """The report as a page; a run is complete without it."""
        try:
            outcome.report.to_html(self.files.page)
        except PlotError as error:
            self.say(f"without {self.files.page.name}: {error}")

    def _keep(self, path: Path, model: nn.Module) -> None:
        """Write what a phase has made, for a run that is resumed after it."""
        if self.own.first:
            save_checkpoint(path, model=model)
        self.own.wait()

    def _announce(self, what: str, epochs: int) -> None:
        images = len(self.source.numbers["train"])
        self.say(f"{what}: {epochs} epochs of {images:,} images, {self.steps} steps each")


def _silent(text: str) -> None:
    return
