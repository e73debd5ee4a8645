"""`widen`: what a narrow model has learned goes back to where its elements come from."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dspfx.errors import NarrowError
from dspfx.model.module import NarrowModule, PreparedModule
from dspfx.model.parts import Part, narrow_parts_of, parts_of, tensors_outside
from dspfx.model.tensors import named_tensors
from dspfx.utils.wrappers import unwrapped

Written = Iterator[tuple[Tensor, Tensor]]  # a tensor of the prepared model, and its new values


@torch.no_grad()
def widen(narrow: nn.Module, prepared: nn.Module) -> None:
    """Copy what `narrow` has learned into the model that it was made from.

    Elements that `narrow` does not have stay as they are.

    Args:
        narrow: from `dspfx.narrow`, trained.
        prepared: what it was made from, or another with the same architecture; changed in place.

    Raises:
        ConvertError: `prepared` does not come from `dspfx.prepare`.
        NarrowError: `narrow` was not made from such a model; nothing is changed then.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> report = dspfx.prune_channels(prepared, dspfx.Budget(macs=0.5))
        >>> narrow = dspfx.narrow(prepared.train())
        >>> with torch.no_grad():
        ...     _ = narrow.get_submodule("2").bias.fill_(1.0)
        >>> dspfx.widen(narrow, prepared)
        >>> prepared.get_submodule("2").bias.tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    source, target = unwrapped(narrow), unwrapped(prepared)
    parts, narrowed = tuple(parts_of(target)), narrow_parts_of(source)
    if [part.name for part in parts] != list(narrowed):
        raise NarrowError("this narrow model was not made from this prepared one")
    written = list(_outside_of(source, target, parts))
    for part in parts:
        written += _inside(narrowed[part.name], part.module)
    for tensor, values in written:
        tensor.copy_(values)


def _inside(part: NarrowModule, prepared: PreparedModule) -> Written:
    tensors, wide = named_tensors(part), named_tensors(prepared)
    new: dict[str, Tensor] = {}
    for name, own in part.origins.items():
        if own.source not in wide or tuple(wide[own.source].shape) != own.shape:
            raise NarrowError(f"the prepared model has no '{own.source}' of shape {own.shape}")
        values = new.setdefault(own.source, wide[own.source].flatten().clone())
        learned = tensors[name][own.real.to(tensors[name].device)]
        values[own.places[own.real].to(values.device)] = learned.to(values)
    for source, values in new.items():
        yield wide[source], values.reshape(wide[source].shape)


def _outside_of(narrow: nn.Module, prepared: nn.Module, parts: tuple[Part, ...]) -> Written:
    tensors = named_tensors(narrow)
    for name, tensor in tensors_outside(prepared, parts).items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise NarrowError(f"the narrow model has no '{name}' of the prepared one's shape")
        yield tensor, tensors[name]
