"""`Recipe`: everything that decides what a run computes, as plain data."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspfx.engines.engine import Precision
from dspfx.engines.engines import OWN
from dspfx.errors import RecipeError
from dspfx.model.config import PrepareConfig
from dspfx.pruning.budget import Budget
from dspfx.utils.typed_json import from_json

PRECISIONS = ("float32", "bfloat16")
METHODS = ("gradual", "channels", "learned")


@dataclass(frozen=True)
class Schedule:
    """How one phase is trained, by SGD with momentum 0.9.

    Attributes:
        epochs: passes over the training images; 0 to leave the phase out.
        lr: learning rate at the start, or after the warm-up; it falls to nothing along a cosine.
        weight_decay: of all parameters.
        warm_up: the share of the steps in which the rate rises to `lr`.
    """

    epochs: int
    lr: float
    weight_decay: float = 1e-3
    warm_up: float = 0.0

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step number `step` of `steps`."""
        rising = round(self.warm_up * steps)
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        return self.lr / 2 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


@dataclass(frozen=True)
class Recipe:
    """A whole run: a dense network, its groups, pruning, fine-tuning, conversion.

    Attributes:
        model: see `dspfx.recipe.networks.libraries`.
        data: `digits`, `fashion-mnist`, `cifar10`, or a folder of images, see
            `dspfx.recipe.images.sources`.
        folder: where the files of a named data set are; None for the usual places.
        image_size: images are brought to so many pixels a side; None for the size that they have,
            of a folder of images for that which the network is made for.
        images: how many of the training images are used; None for all.
        validation: the share of these that is not trained on, and chooses the best weights.
        pretrained: start from the weights that torchvision or timm offers.
        weights: start from the weights in this file, of safetensors or `torch.save`.
        dense, learn, tune: the three phases. With no epochs in the second, `dspfx.cluster_groups`
            finds groups, which are pruned by their energies; with none to fine-tune in, batch norms
            are recalibrated.
        method: what goes, and when. `gradual`: channels and inputs of clustered groups go in the
            course of the second phase, by what the loss says, see `dspfx.GradualPruning`.
            `channels`: likewise, whole channels only. `learned`: groups are learned in the second
            phase, and pruned by their energies before each cycle of the third, as in the paper.
        groups: per layer.
        keep_macs: the fraction of the multiply-accumulates that may remain.
        keep_latency: the fraction of the dense network's time that may remain, in place of
            `keep_macs`; layers are measured on the machine that trains, for two images.
        engine: what will run the network, in which they are measured; see `dspfx.Budget`. In
            integers of 8 bits if it will be quantised.
        quantize: round the compact network to 8 bits in the end; see `dspfx.quantize`.
        strength, logits_every: of the group learning, see `dspfx.GroupLearner`.
        ignore: see `dspfx.PrepareConfig`.
        cycles, prune_more: of the fine-tuning, see `dspfx.CyclicFinetune`; what was pruned
            gradually is not pruned any more there.
        distill: fine-tune with the outputs of the dense network; see `dspfx.distillation_loss`.
        temperature, distill_weight: of the distillation.
        batch: images per step, in all processes together.
        precision: `float32`, or `bfloat16` for autocast.
        seed: of the initialisation, the split, the order of the images and their augmentation,
            and how groups are learned or clustered.

    Raises:
        RecipeError: a value out of range.
        BudgetError, PrepareError: likewise, of budgets and `groups`.
    """

    model: str = "cifar-resnet8"
    data: str = "digits"
    folder: str | None = None
    image_size: int | None = None
    images: int | None = None
    validation: float = 0.1
    pretrained: bool = False
    weights: str | None = None
    dense: Schedule = field(default_factory=lambda: Schedule(20, 0.1, warm_up=0.3))
    learn: Schedule = field(default_factory=lambda: Schedule(15, 0.05))
    tune: Schedule = field(default_factory=lambda: Schedule(20, 0.05))
    method: str = "gradual"
    groups: int = 4
    keep_macs: float = 0.35
    keep_latency: float | None = None
    engine: str = OWN
    quantize: bool = False
    strength: float = 2e-3
    logits_every: int = 1
    ignore: tuple[str, ...] = ()
    cycles: int = 2
    prune_more: float = 0.001
    distill: bool = False
    temperature: float = 4.0
    distill_weight: float = 0.9
    batch: int = 64
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ignore", tuple(self.ignore))
        Budget(macs=self.keep_macs)
        if self.keep_latency is None and self.engine != OWN:
            raise RecipeError("the engine is where keep_latency is measured; ask for that")
        _ = self.budget
        PrepareConfig(groups=self.groups)
        self._check_choices()
        self._check_numbers()
        self._check_phases()

    def _check_choices(self) -> None:
        for name, known in (("precision", PRECISIONS), ("method", METHODS)):
            value = getattr(self, name)
            if value not in known:
                raise RecipeError(f"{name} is one of {', '.join(known)}: {value}")
        if self.pretrained and self.weights is not None:
            raise RecipeError("start from pretrained weights, or from those in a file, not both")

    def _check_numbers(self) -> None:
        for name in ("batch", "cycles", "image_size", "images", "logits_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} must be at least 1, got {value}")
        for name in ("validation", "prune_more"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise RecipeError(f"{name} must be a fraction in [0, 1), got {value}")
        if not 0 <= self.strength < math.inf:
            raise RecipeError(f"strength must not be negative, got {self.strength}")
        if not (0 <= self.distill_weight <= 1 and 0 < self.temperature < math.inf):
            raise RecipeError("distill_weight is in [0, 1], the temperature is positive")

    def _check_phases(self) -> None:
        for phase in ("dense", "learn", "tune"):
            schedule = getattr(self, phase)
            if schedule.epochs < 0 or not 0 < schedule.lr < math.inf:
                raise RecipeError(f"{phase}: epochs and learning rate must be positive")
            if not (0 <= schedule.weight_decay < math.inf and 0 <= schedule.warm_up < 1):
                raise RecipeError(
                    f"{phase}: the weight decay must not be negative, the warm-up is a share"
                )
        if self.tune.warm_up:
            raise RecipeError("tune: its cycles begin at their rate, there is no warm-up")
        if self.tune.epochs and self.cycles > self.tune.epochs:
            raise RecipeError(
                f"{self.cycles} cycles do not fit into {self.tune.epochs} epochs of fine-tuning; "
                "ask for fewer cycles"
            )
        if self.method == "channels" and not self.learn.epochs:
            raise RecipeError(
                "whole channels go while the network trains: give the second phase epochs, or take "
                "another method; dspfx.prune_channels needs no training"
            )

    @property
    def gradual(self) -> bool:
        """Whether the second phase prunes."""
        return self.method != "learned" and self.learn.epochs > 0

    @property
    def budget(self) -> Budget:
        """What may remain."""
        if self.keep_latency is not None:
            precision: Precision = "int8" if self.quantize else "fp32"
            return Budget(latency=self.keep_latency, engine=self.engine, precision=precision)
        return Budget(macs=self.keep_macs)

    @property
    def budget_of_tuning(self) -> Budget:
        """For the third phase: what was pruned to a share of the time is not measured again."""
        if self.gradual and self.keep_latency is not None:
            return Budget(macs=1.0)
        return self.budget

    @staticmethod
    def of_json(value: Any, path: Path) -> "Recipe":
        """What `typed_json.to_json` made `value` of, read from `path`.

        Raises:
            RecipeError: it is something else.
        """
        try:
            recipe: Recipe = from_json(Recipe, value)
        except ValueError as error:
            raise RecipeError(f"{path} holds no recipe of this version: {error}") from error
        return recipe
