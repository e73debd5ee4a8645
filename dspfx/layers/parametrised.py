"""Layers whose weight is computed from other tensors whenever it is read.

1. Parametrisations (`torch.nn.utils.parametrize`) make the weight a property of the layer. It is
   whole at every time, so such layers are gated like others.
2. Hooks (`torch.nn.utils.weight_norm`, `spectral_norm` and `prune`) write the weight before every
   call. What is read between two calls may be out of date, so such layers are left alone.
"""

from typing import Any

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_REMOVALS = {
    WeightNorm: "torch.nn.utils.remove_weight_norm(layer)",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(layer)",
    BasePruningMethod: "torch.nn.utils.prune.remove(layer, 'weight')",
}
REMOVE = "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The type of `module`, without its parametrisations."""
    kind: type[nn.Module] = parametrize.type_before_parametrizations(module)
    return kind


def is_computed(layer: nn.Module) -> bool:
    """Whether a parametrisation computes the weight of `layer`."""
    return parametrize.is_parametrized(layer, "weight")


def weight_of(layer: nn.Module) -> Any:
    """The weight of `layer`, a computed one as in evaluation; None if it has none.

    In training, reading it may write buffers, as the power iteration of a spectral norm does.
    """
    if not is_computed(layer):
        return getattr(layer, "weight", None)
    own: Any = layer
    modes = {module: module.training for module in own.parametrizations["weight"].modules()}
    try:
        for module in modes:
            module.training = False
        return own.weight
    finally:
        for module, mode in modes.items():
            module.training = mode


def make_plain(layer: nn.Module) -> None:
    """Make the computed tensors of `layer`, a private copy, parameters of their present value.

    `remove_parametrizations` would also take the properties from the layer that was copied, as
    both have one class.
    """
    own: Any = layer
    if parametrize.is_parametrized(layer):
        values = {name: getattr(layer, name).detach() for name in own.parametrizations}
        layer.__class__ = kind_of(layer)
        del layer._modules["parametrizations"]
        for name, value in values.items():
            layer.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))


def why_computed(module: nn.Module) -> str:
    """What computes tensors of `module`, and how to make them parameters; empty if nothing does."""
    for hook in module._forward_pre_hooks.values():
        for kind, remedy in _REMOVALS.items():
            if isinstance(hook, kind):
                return f"a hook of torch.nn.utils computes its weight; call {remedy} before prepare"
    if parametrize.is_parametrized(module):
        return f"a parametrisation computes its weight; call {REMOVE} before prepare"
    return ""
