"""A layer that is a part of a model by itself: a graph needs a module around what it calls."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from dspfx.errors import PrepareError
from dspfx.layers.gated import GATED

INSIDE = "gated"  # the name of the layer in the module around it


class Single(nn.Module):
    """Calls a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.train(layer.training)
        self.add_module(INSIDE, layer)

    def forward(self, input: Tensor) -> Any:
        """What the layer makes of `input`."""
        return self.get_submodule(INSIDE)(input)


def enclosed(module: nn.Module) -> nn.Module:
    """`module`, in a `Single` if it is a layer.

    Raises:
        PrepareError: it is a parametrised layer, whose tensors have names of their own.
    """
    if not isinstance(module, tuple(GATED)):
        return module
    if parametrize.is_parametrized(module):
        raise PrepareError("a parametrised layer is no part by itself")
    return Single(module)


@contextmanager
def tensors_hidden(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Context: those of `parts` that replace a layer do not show its `weight` and `bias`.

    Once converted they have none, for their weights are smaller: no code around them may use it.
    """
    hidden = []
    for part in parts:
        if isinstance(part, tuple(GATED)):
            hidden.append((part, dict(part._parameters)))
            part._parameters.clear()
    try:
        yield
    finally:
        for part, parameters in hidden:
            part._parameters.update(parameters)


def names_inside(names: Iterable[str], prefix: str) -> frozenset[str]:
    """Those of `names` at or below the path `prefix`, as the part there knows them."""
    below = {name[len(prefix) + 1 :] for name in names if name.startswith(f"{prefix}.")}
    return frozenset(below | ({INSIDE} if prefix in names else set()))
