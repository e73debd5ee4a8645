"""From a compact module to one that can be trained: the live part of its parameters.

1. Zeros that a layer is filled up with, where its filters read different channels, stay zero.
2. What was a parameter is one again, frozen if it was, and shared if it was.
3. Copied modules are in the mode that they were in, frozen norms for instance.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dspfx.errors import NarrowError
from dspfx.layers.gated import GATED
from dspfx.layers.gates import FilterGate
from dspfx.layers.weights import filters_first
from dspfx.model.tensors import named_tensors
from dspfx.passes.transforms.compacted import Compacted
from dspfx.training.narrow.provenance import Elements

Origins = dict[str, Elements]


def make_trainable(
    compacted: Compacted, origins: Mapping[str, Elements], source: nn.Module
) -> nn.Module:
    """Make `compacted` trainable, in place; returns it.

    Args:
        compacted: of `source`.
        origins: where the elements of its tensors come from; others are constants.
        source: the model that was compacted, in the mode that is asked for.

    Raises:
        NarrowError: a tensor holds zeros that could not be kept.
    """
    _keep_zeros(compacted.root, origins)
    _release_parameters(compacted.root, origins, named_tensors(source))
    for module in compacted.root.modules():
        module.training = source.training
    for own, copied in copied_modules(compacted, source):
        twins = dict(copied.named_modules(remove_duplicate=False))
        for name, module in own.named_modules():
            twins[name].training = module.training
    return compacted.root


def copied_modules(
    compacted: Compacted, source: nn.Module
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The modules of `source` that were copied, perhaps cut, and their copies."""
    for node, new in compacted.nodes.items():
        if node.op == new.op == "call_module":
            own = source.get_submodule(str(node.target))
            copied = compacted.root.get_submodule(str(new.target))
            if type(own) is type(copied):
                yield own, copied


class _Filled(FilterGate):
    """The mask of a layer that is filled up with zeros; a filter of it may be a constant.

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
    real = {name: own.real for name, own in origins.items()}
    filled = {name for name, own in real.items() if not own.all()}
    for name, layer in list(root.named_modules()):
        weight, bias = f"{name}.weight", f"{name}.bias"
        if type(layer) in GATED and filled.intersection((weight, bias)):
            nothing = torch.zeros(layer.weight.shape, dtype=torch.bool)
            gate = _Filled(layer, real.get(weight, nothing), real.get(bias))
            path, _, leaf = name.rpartition(".")
            root.get_submodule(path).add_module(leaf, GATED[type(layer)].wrap(layer, gate))
            filled -= {weight, bias}
    if filled:
        raise NarrowError(
            f"'{min(filled)}' would be filled up with zeros; train the prepared model itself"
        )


def _release_parameters(
    root: nn.Module, origins: Mapping[str, Elements], wide: Mapping[str, Tensor]
) -> None:
    """What comes from a parameter of the `wide` model is one; the same object where it was."""
    made: dict[tuple[object, ...], nn.Parameter] = {}
    for name, own in origins.items():
        if not isinstance(wide[own.source], nn.Parameter):
            continue
        path, _, leaf = name.rpartition(".")
        module = root.get_submodule(path)
        value = getattr(module, leaf)
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        made.setdefault(own.key, parameter)
        if made[own.key] is not value:
            delattr(module, leaf)
            module.register_parameter(leaf, made[own.key])
        made[own.key].requires_grad_(wide[own.source].requires_grad)
