"""The weight of a layer, seen as filters: `[O, C/S, *taps]`, however torch stores it.

O filters read C input channels in S structural groups. Convolutions and linear layers store their
weight in this form (linear layers without taps). Transposed convolutions store `[C, O/S, *taps]`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from dspfx.layers.parametrised import weight_of

TRANSPOSED = _ConvTransposeNd


def structural_groups(layer: nn.Module) -> int:
    """S: `groups` of a convolution, 1 for a linear layer."""
    return int(getattr(layer, "groups", 1))


def filters_first(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """`weight`, else the layer's own, as `[O, C/S, *taps]`."""
    own: Any = layer
    weight = weight_of(layer) if weight is None else weight
    if not isinstance(layer, TRANSPOSED):
        return weight
    (channels, filters), taps, groups = weight.shape[:2], weight.shape[2:], own.groups
    split = weight.reshape(groups, channels // groups, filters, *taps)
    return split.transpose(1, 2).reshape(groups * filters, channels // groups, *taps)


def spread(layer: nn.Module, matrix: Tensor) -> Tensor:
    """`matrix`, `[O, C/S]`, in the form of the layer's weight, with taps of size 1."""
    taps = [1] * len(getattr(layer, "kernel_size", ()))
    return as_weight(layer, matrix.reshape(*matrix.shape, *taps))


def as_weight(layer: nn.Module, filters: Tensor, groups: int | None = None) -> Tensor:
    """`filters`, `[O, C/S, *taps]`, in the form in which the layer stores its weight.

    Args:
        layer: says which form that is.
        filters: the sizes of the taps may also be 1.
        groups: S, if not the layer's own.
    """
    if not isinstance(layer, TRANSPOSED):
        return filters
    (count, channels), taps = filters.shape[:2], filters.shape[2:]
    groups = structural_groups(layer) if groups is None else groups
    split = filters.reshape(groups, count // groups, channels, *taps)
    return split.transpose(1, 2).reshape(groups * channels, count // groups, *taps)


def energy(weight: Tensor, other: Tensor | None = None) -> Tensor:
    """`[O, C]`: `sum_k weight * other` of `[O, C, *taps]`, `other` being `weight` if left out."""
    other = weight if other is None else other
    product = weight * other
    return product.reshape(*product.shape[:2], -1).sum(2)


def folded_batch_norm(
    norm: nn.Module, bias: Tensor | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """What a batch norm in evaluation makes of the layer before it: scale and bias, both `[O]`.

    `(W x + b - mean) * scale + beta`, with `scale = gamma / sqrt(var + eps)`, is a layer of weight
    `W * scale` and bias `(b - mean) * scale + beta`.

    Args:
        norm: with running statistics, affine or not.
        bias: b, `[O]`, or None.
        dtype: to compute in; by default that of the norm.
    """
    own: Any = norm
    mean, variance = own.running_mean.to(dtype=dtype), own.running_var.to(dtype=dtype)
    scale = torch.rsqrt(variance + own.eps)
    if own.weight is not None:
        scale = scale * own.weight.detach().to(dtype=dtype)
    shift = (-mean if bias is None else bias.detach().to(dtype=dtype) - mean) * scale
    return scale, shift if own.bias is None else shift + own.bias.detach().to(dtype=dtype)
