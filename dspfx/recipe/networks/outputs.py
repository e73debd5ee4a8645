"""What a run asks of a network, whatever forms its outputs have."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dspfx.errors import RecipeError

AUXILIARY = 0.3  # weight of auxiliary classifiers (Szegedy et al., CVPR 2015)


def logits_of(output: Any) -> Tensor:
    """The logits `[N, classes]` in what a network returns: all of it, the first, or by name.

    Raises:
        RecipeError: there are none.
    """
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out"))
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor) or output.dim() != 2:
        shape = f" of shape {tuple(output.shape)}" if isinstance(output, Tensor) else ""
        raise RecipeError(
            f"the model gives a {type(output).__name__}{shape} where logits [N, classes] are "
            "needed; only classifiers can be trained by a recipe"
        )
    return output


def classification_loss(output: Any, labels: Tensor) -> Tensor:
    """The cross-entropy, of auxiliary classifiers (further outputs), too."""
    loss = F.cross_entropy(logits_of(output), labels)
    further = output[1:] if isinstance(output, tuple | list) else ()
    for auxiliary in further:
        if isinstance(auxiliary, Tensor) and auxiliary.dim() == 2:
            loss = loss + AUXILIARY * F.cross_entropy(auxiliary, labels)
    return loss


def right_answers(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """How many labels `model` finds, in evaluation mode; its mode stays as it is."""
    right = 0
    with evaluating(model), torch.no_grad():
        for x, y in batches:
            right += int((logits_of(model(x)).argmax(1) == y).sum())
    return right


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Autocast to bfloat16, or nothing."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def check(model: nn.Module, example: Tensor, classes: int) -> None:
    """Try `model`, in evaluation mode, on one batch of the images that it shall learn.

    Raises:
        RecipeError: it does not take them, or does not tell that many classes apart.
    """
    shape = "x".join(str(size) for size in example.shape[1:])
    try:
        with torch.no_grad():
            model.eval()
            output = model(example)
    except Exception as error:  # the model is anybody's
        raise RecipeError(
            f"the model does not take images of {shape} ({error}); --image-size gives them another"
        ) from error
    width = logits_of(output).shape[1]
    if width != classes:
        raise RecipeError(f"the model tells {width} classes apart, the data has {classes}")
