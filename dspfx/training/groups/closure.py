"""One pass over a batch: the losses that a closure gives, and the gradients that they leave."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dspfx.errors import LearnError

# one loss; several, which are added; or micro-batches, whose losses come one at a time
Losses = Tensor | list[Tensor] | tuple[Tensor, ...] | Mapping[str, Tensor] | Iterator[Tensor]

WITH_GRADIENT = (
    "the closure must return the loss, a scalar tensor with a gradient, or a list, a dict or an "
    "iterator of such"
)
PROPAGATED = (
    "with backward=False the closure must return the loss that it has propagated back, a scalar "
    "tensor; a training_step must, too, and cannot skip a batch by returning None"
)


@dataclass(frozen=True)
class BatchTask:
    """What a user asks of one step, see `GroupLearner.step`.

    Attributes:
        closure: computes the losses of the batch.
        before_step: called when the gradients are complete; None for nothing.
        scaler: of the losses; None if there is none that is enabled.
        backward: whether losses are propagated back here; else the closure has done it.
        finite: whether a loss that is not finite is refused at once.
    """

    closure: Callable[[], Losses]
    before_step: Callable[[], object] | None
    scaler: torch.amp.GradScaler | None
    backward: bool
    finite: bool

    def run(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Compute the gradients of the closure's losses; returns their sum, detached."""
        torch.clear_autocast_cache()  # an autocast around the whole step remembers older weights
        total: Tensor | None = None
        with torch.enable_grad():
            for loss in _one_by_one(self.closure(), self.backward):
                _check_loss(loss, finite=self.finite, gradient=self.backward)
                if self.backward:
                    if total is None:
                        optimizer.zero_grad(set_to_none=True)
                    scaled = loss if self.scaler is None else self.scaler.scale(loss)
                    _propagate(scaled)
                total = loss.detach() if total is None else total + loss.detach()
        if total is None:
            raise LearnError("the closure gave no loss at all; it must give at least one")
        return total


def _propagate(loss: Tensor) -> None:
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise LearnError(
            "the closure has propagated its loss back, which is done here; leave that out, or call "
            "step(closure, backward=False)"
        ) from error


def _one_by_one(losses: Losses, gradient: bool) -> list[Tensor] | Iterator[Tensor]:
    """The losses to be propagated back one after the other; each needs a gradient if asked."""
    if isinstance(losses, Mapping):
        losses = list(losses.values())
    if isinstance(losses, list | tuple):
        for loss in losses:
            _check_loss(loss, finite=False, gradient=gradient)
        return [torch.stack([loss.reshape(()) for loss in losses]).sum()] if losses else []
    return [losses] if isinstance(losses, Tensor) or not isinstance(losses, Iterator) else losses


def _check_loss(loss: object, *, finite: bool, gradient: bool) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or (gradient and not loss.requires_grad):
        raise LearnError(WITH_GRADIENT if gradient else PROPAGATED)
    if finite and not torch.isfinite(loss.detach()).all():
        raise LearnError(
            f"the loss is {loss.item()}; this pass changed nothing. Lower the learning rate "
            "or the strength, or look for bad values in the batch"
        )
