"""Which elements of a model's tensors a rewritten model has: it is run on numbers to find out.

A copy of the model whose elements are numbers from 1 on is rewritten in the same way. What the
rewriting cuts, reorders, pads or puts together then says itself where it is from; 0 is filled in.
"""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from dspfx.errors import NarrowError
from dspfx.model.tensors import named_tensors


@dataclass(frozen=True)
class Elements:
    """Where the elements of a tensor come from.

    Attributes:
        source: the name of the tensor that they are of.
        shape: of that one.
        places: int64, of the shape of the tensor: their places in the source, flattened; -1 for
            a zero that was filled in.
    """

    source: str
    shape: tuple[int, ...]
    places: Tensor

    @staticmethod
    def whole(source: str, tensor: Tensor) -> "Elements":
        """All of `tensor`, which is called `source`, as they are."""
        places = torch.arange(tensor.numel()).reshape(tensor.shape)
        return Elements(source, tuple(tensor.shape), places)

    @property
    def real(self) -> Tensor:
        """Bool: those that were not filled in."""
        return self.places >= 0

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for tensors of equal elements and shapes."""
        digest = hashlib.blake2b(self.places.contiguous().numpy().data).digest()
        return self.source, tuple(self.places.shape), digest


def numbered(view: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, tuple[int, ...]]]:
    """A float64 copy of `view` over the same graph, and the shapes of its tensors, in order."""
    twin = fx.GraphModule(copy.deepcopy(view).double(), view.graph)
    shapes: dict[str, tuple[int, ...]] = {}
    free, seen = 1, set[int]()
    for name, tensor in named_tensors(twin).items():
        if tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            shapes[name] = tuple(tensor.shape)
            numbers = torch.arange(free, free + tensor.numel(), dtype=torch.float64)
            tensor.data.copy_(numbers.reshape(tensor.shape))
            free += tensor.numel()
    return twin, shapes


def elements(name: str, numbers: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Elements | None:
    """What the `numbers` found in the tensor `name` mean; None if all are filled in.

    Args:
        name: for the message.
        numbers: of any shape.
        shapes: see `numbered`.

    Raises:
        NarrowError: they are of several tensors.
    """
    names = list(shapes)
    first = 1 + np.cumsum([0, *(int(np.prod(shape)) for shape in shapes.values())])
    found = numbers.detach().cpu().long()
    sources = np.unique(np.searchsorted(first, found[found > 0].numpy(), side="right") - 1)
    if not len(sources):
        return None
    if len(sources) > 1:
        raise NarrowError(
            f"'{name}' is put together from several tensors; train the prepared model itself"
        )
    source = names[int(sources[0])]
    places = torch.where(found > 0, found - int(first[sources[0]]), -1)
    return Elements(source, shapes[source], places)
