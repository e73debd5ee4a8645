"""From a compact module to one that can be trained: the living part of the parameters it is from.

1. What was a parameter is one again, frozen if it was, and shared if it was.
2. Zeros that a layer is filled up with, where its filters read different channels, stay zero.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dspfx.elements import Elements, key
from dspfx.errors import NarrowError
from dspfx.filters import filters_first
from dspfx.gates import GATED, FilterGate


def make_trainable(
    root: nn.Module, origins: Mapping[str, Elements], wide: Mapping[str, Tensor]
) -> None:
    """Make tensors of `root` what those of the `wide` model are that they come from.

    Args:
        root: compact; changed in place.
        origins: where the elements of its tensors come from; others are constants.
        wide: the tensors of the model that it was compacted from, by name.

    Raises:
        NarrowError: a tensor holds zeros that could not be kept.
    """
    _keep_zeros(root, origins)
    _share(root, origins, wide)


class _Filled(FilterGate):
    """Of a layer that is filled up: other than a gate's, its filters may be constants.

    Attributes:
        alive: bool `[O]`, the filters that read anything or have a bias.
    """

    def __init__(self, layer: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(1, layer, 0)
        self.set_mask(filters_first(layer, weight).reshape(*self.mask.shape, -1).all(2))
        alive = self.mask.any(1) if bias is None else bias.to(self.mask.device)
        self.register_buffer("_alive", alive)

    @property
    def alive(self) -> Tensor:
        return self.get_buffer("_alive")


def _keep_zeros(root: nn.Module, origins: Mapping[str, Elements]) -> None:
    """Gate the layers that are filled up with zeros."""
    real = {name: places >= 0 for name, (_, places) in origins.items()}
    filled = {name for name, own in real.items() if not own.all()}
    for name, layer in list(root.named_modules()):
        weight, bias = f"{name}.weight", f"{name}.bias"
        if type(layer) in GATED and filled.intersection((weight, bias)):
            shape = layer.weight.shape
            own = real.get(weight, torch.zeros(shape, dtype=torch.bool)).reshape(shape)
            gate = _Filled(layer, own, real.get(bias))
            _replace(root, name, GATED[type(layer)].wrap(layer, gate))
            filled -= {weight, bias}
    if filled:
        raise NarrowError(
            f"'{min(filled)}' would be filled up with zeros; train the prepared model itself"
        )


def _share(root: nn.Module, origins: Mapping[str, Elements], wide: Mapping[str, Tensor]) -> None:
    """Parameters are what they were in the `wide` model, and shared where they were."""
    parameters: dict[tuple[str, bytes], nn.Parameter] = {}
    buffers: dict[tuple[str, bytes], Tensor] = {}
    for name, own in origins.items():
        path, _, leaf = name.rpartition(".")
        module, source, same = root.get_submodule(path), wide[own[0]], key(own)
        value = getattr(module, leaf).detach()
        delattr(module, leaf)
        if isinstance(source, nn.Parameter):
            parameter = nn.Parameter(value, source.requires_grad)
            module.register_parameter(leaf, parameters.setdefault(same, parameter))
        else:
            module.register_buffer(leaf, buffers.setdefault(same, value))


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    root.get_submodule(path).add_module(leaf, module)
