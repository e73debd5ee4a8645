"""Stored tensors put into a module of the same structure, all or none."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, nn

from dspfx.errors import LoadError
from dspfx.layers.branches import Branches
from dspfx.layers.gates import ChannelGate, FilterGate
from dspfx.model.parts import compact_parts_of, full_name
from dspfx.model.tensors import aliases, named_tensors


def fill(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    orders: Mapping[str, tuple[int, ...]],
) -> None:
    """Give `model` the values of `tensors`, if all of them fit.

    Args:
        model: changed in place, unless an error is raised.
        tensors: for every parameter and buffer under its first name.
        names: the `aliases` that `model` should have.
        orders: see `Manifest`.

    Raises:
        LoadError: names, shapes, kinds of types or aliases differ.
    """
    if aliases(model) != names:
        raise LoadError("it shares other tensors among its modules")
    own = {name: tensor for name, tensor in named_tensors(model).items() if name not in names}
    if own.keys() != tensors.keys():
        raise LoadError(
            f"the file lacks {_some(own.keys() - tensors.keys())} and has "
            f"{_some(tensors.keys() - own.keys())} besides"
        )
    new = {
        name: matching(name, tensor, tensors[name], orders.get(name))
        for name, tensor in own.items()
    }
    for name in _chosen_channels(model):
        if not torch.equal(own[name], new[name]):
            raise LoadError(f"'{name}' chooses other channels than its plan")
    for name, tensor in own.items():
        tensor.data = new[name]
    for module in model.modules():
        if isinstance(module, FilterGate):
            module.set_mask(module.mask)
        elif isinstance(module, ChannelGate):
            module.set_alive(module.alive)


def matching(
    name: str, own: Tensor, stored: Tensor, order: tuple[int, ...] | None = None
) -> Tensor:
    """`stored`, copied to the device of `own`, which it is to replace.

    Args:
        name: of `own`, for messages.
        order: of its dimensions in memory; contiguous if None.

    Raises:
        LoadError: it does not fit.
    """
    if own.shape != stored.shape:
        raise LoadError(f"'{name}' is {tuple(own.shape)} and was {tuple(stored.shape)}")
    if own.dtype != stored.dtype and not (own.is_floating_point() and stored.is_floating_point()):
        raise LoadError(f"'{name}' is of type {own.dtype} and was {stored.dtype}")
    if stored.dtype == torch.bool and bool((stored.view(torch.uint8) > 1).any()):
        raise LoadError(f"'{name}' holds something else than true and false")
    order = tuple(range(stored.dim())) if order is None else order
    if sorted(order) != list(range(stored.dim())):
        raise LoadError(f"'{name}' does not have the dimensions {order}")
    laid_out = stored.permute(order).clone(memory_format=torch.contiguous_format)
    return laid_out.permute([order.index(dim) for dim in range(len(order))]).to(own.device)


def _chosen_channels(model: nn.Module) -> list[str]:
    """The buffers of compact modules that say which channels are read, in which order."""
    found = []
    for path, part in compact_parts_of(model):
        branches = {n: m for n, m in part.named_modules() if isinstance(m, Branches)}
        chosen = [(n, own) for n, m in branches.items() for own in (*m.inputs, m.order)]
        found += [full_name(path, full_name(n, own)) for n, own in chosen if isinstance(own, str)]
        selects = part.graph.find_nodes(op="call_function", target=torch.index_select)
        indices = [node.args[2] for node in selects]
        found += [full_name(path, str(i.target)) for i in indices if i.op == "get_attr"]
    return found


def _some(names: AbstractSet[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"
