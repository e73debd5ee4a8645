"""Which elements of a model's tensors a rewritten model has: it is run on numbers to find out.

A copy of the model whose elements are numbers from 1 on is rewritten in the same way. What the
rewriting cuts, reorders, pads or puts together then says itself where it is from; 0 is filled in.
"""

import copy
import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx

from dspfx.blueprint import named_tensors
from dspfx.errors import NarrowError

Elements = tuple[str, Tensor]  # of which tensor; and int64, flat: their places in it, -1 for none


def numbered(view: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, int]]:
    """A float64 copy of `view`, over the same graph, and the first number of each tensor."""
    twin = fx.GraphModule(copy.deepcopy(view).double(), view.graph)
    first: dict[str, int] = {}
    free, seen = 1, set[int]()
    for name, tensor in named_tensors(twin).items():
        if tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            first[name] = free
            numbers = torch.arange(free, free + tensor.numel(), dtype=torch.float64)
            tensor.data.copy_(numbers.reshape(tensor.shape))
            free += tensor.numel()
    return twin, first


def elements(name: str, numbers: Tensor, first: Mapping[str, int]) -> Elements | None:
    """What the `numbers` found in the tensor `name` mean; None if all are filled in.

    Args:
        name: for the message.
        numbers: of any shape.
        first: see `numbered`.

    Raises:
        NarrowError: they are of several tensors.
    """
    names, starts = list(first), np.array(list(first.values()))
    flat = numbers.detach().cpu().flatten().long()
    real = flat[flat > 0].numpy()
    sources = np.unique(np.searchsorted(starts, real, side="right") - 1)
    if not len(sources):
        return None
    if len(sources) > 1:
        raise NarrowError(
            f"'{name}' is put together from several tensors; train the prepared model itself"
        )
    source = int(sources[0])
    return names[source], torch.where(flat > 0, flat - int(starts[source]), -1)


def key(own: Elements) -> tuple[str, bytes]:
    """Equal for equal elements."""
    source, places = own
    return source, hashlib.blake2b(places.numpy().data).digest()
