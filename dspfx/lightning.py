"""`GroupLearning`: groups are learned while a `lightning.Trainer` fits.

    trainer = lightning.Trainer(callbacks=[dspfx.lightning.GroupLearning(strength=2e-3)])
    trainer.fit(module)         # whose network comes from dspfx.prepare
    dspfx.prune(module, dspfx.Budget(macs=0.35))

The one thing that changes is how the optimizer steps. Lightning hands a closure, which computes the
loss, propagates it back and calls the hooks, to its precision plugin to step with; while groups are
learned the plugin passes it on to `GroupLearner.step`, which calls it twice.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dspfx.errors import LearnError
from dspfx.training.groups.learner import GroupLearner

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
except ImportError as error:
    raise LearnError(
        "dspfx.lightning needs Lightning; run pip install 'dspfx[lightning]'"
    ) from error


class GroupLearning(Callback):
    """Learns the groups of the prepared networks in a module while it is fitted.

    For automatic optimization with one optimizer, on one device or with `strategy="ddp"`,
    gradient clipping included, in any precision that keeps the weights in float32 or float64, such
    as "bf16-mixed"; not in "bf16-true". Modules that optimize manually use `GroupLearner`.

    `training_step` is called twice for a batch, and the hooks around it, too. What the second call
    returns and logs with `self.log` is dropped; metrics that it updates by itself count both. The
    learner's state is part of Lightning's checkpoints.

    Args:
        strength: see `GroupLearner`.
        settings: further ones of `GroupLearner`; `total_steps` is the trainer's unless given.

    Attributes:
        learner: the present one, or the last; None before the first `fit`.
    """

    def __init__(self, strength: float = 2e-3, **settings: Any) -> None:
        self.settings: dict[str, Any] = {"strength": strength, **settings}
        self.learner: GroupLearner | None = None
        self._state: Mapping[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Construct the learner, and let it step.

        Raises:
            LearnError: the module, or how it is trained, is not as the class says.
        """
        _check(trainer, pl_module)
        settings = dict(self.settings)
        if "total_steps" not in settings:
            settings["total_steps"] = _total_steps(trainer)
        self.learner = GroupLearner(pl_module, trainer.optimizers[0], **settings)
        if self._state is not None:
            self.learner.load_state_dict(self._state)
            self._state = None
        precision: Any = trainer.precision_plugin
        precision.optimizer_step = partial(_step, self.learner, precision)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the optimizer step without the learner again."""
        vars(trainer.precision_plugin).pop("optimizer_step", None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let the optimizer step without the learner again."""
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The learner's, for checkpoints."""
        return {} if self.learner is None else self.learner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the learner that `fit` is about to construct."""
        self._state = state_dict or None


def _step(
    learner: GroupLearner,
    precision: Any,
    optimizer: torch.optim.Optimizer,
    model: LightningModule,
    closure: Callable[[], Any],
    **_: Any,
) -> Tensor:
    """Replaces `Precision.optimizer_step`."""
    return learner.step(
        _Closure(model, closure),
        # hooks and clipping, where all precisions have them
        before_step=lambda: precision._after_closure(model, optimizer),
        scaler=getattr(precision, "scaler", None),
        backward=False,
    )


class _Closure:
    """A closure of Lightning's; it logs, and its outputs are kept, in the first call only."""

    def __init__(self, module: LightningModule, closure: Callable[[], Any]) -> None:
        self.module, self.closure, self.first = module, closure, True

    def __call__(self) -> Any:
        if self.first:
            self.first = False
            return self.closure()
        kept = getattr(self.closure, "_result", None)  # what `on_train_batch_end` is given
        self.module.log = _nothing  # type: ignore[method-assign]
        try:
            return self.closure()
        finally:
            del self.module.log
            if kept is not None:
                self.closure._result = kept  # type: ignore[attr-defined]


def _nothing(*_: Any, **__: Any) -> None:
    """Replaces `LightningModule.log`."""


def _total_steps(trainer: Trainer) -> int:
    steps = trainer.estimated_stepping_batches
    if steps == float("inf"):
        raise LearnError(
            "the trainer has no end; give it max_epochs or max_steps, or use "
            "GroupLearning(total_steps=...)"
        )
    return int(steps)


def _check(trainer: Trainer, module: LightningModule) -> None:
    if not module.automatic_optimization:
        raise LearnError(
            "the module optimizes manually; construct a dspfx.GroupLearner in it, and call its "
            "step in training_step"
        )
    if len(trainer.optimizers) != 1:
        raise LearnError(f"there must be one optimizer, not {len(trainer.optimizers)}")
    if trainer.accumulate_grad_batches != 1:
        raise LearnError(
            "gradients of several batches cannot be accumulated while groups are learned, for each "
            "batch is needed twice; use larger batches, or the accumulation inside training_step"
        )
    whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    if not whole or isinstance(trainer.strategy, DeepSpeedStrategy):  # that is a DDPStrategy, too
        raise LearnError(
            f"groups cannot be learned with a {type(trainer.strategy).__name__}; use one device, "
            'or strategy="ddp"'
        )
