"""Norms over channels of which only some are there: the others are zero, and count all the same.

A LayerNorm over `width` channels of which all but d are zero is not one over the d channels: its
mean is `sum(x) / width`, and all that are zero are as far from it as it is from zero. So the zeros
are filled in, and the norm is the one that engines know.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspfx.utils.arrays import IntArray


def layer_norm(
    x: Tensor,
    width: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm` over `width` channels, of which `x`, `[..., d]`, are those that are not zero.

    Args:
        x: the channels that are there.
        width: how many there were.
        weight, bias: of those that are there, `[d]`.
        eps: as of `F.layer_norm`, with its default.
    """
    there = x.shape[-1]

    def filled(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, width - there))

    own = None if weight is None else filled(weight), None if bias is None else filled(bias)
    return F.layer_norm(filled(x), (width,), own[0], own[1], eps)[..., :there]


def rms_norm(
    x: Tensor, width: int, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`F.rms_norm` over `width` channels, of which `x`, `[..., d]`, are those that are not zero.

    It is one over d channels, by `mean_d(x^2) = mean(x^2) width / d`.
    """
    there = x.shape[-1]
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    normed = F.rms_norm(x, (there,), None, eps * width / there) * math.sqrt(width / there)
    return normed if weight is None else normed * weight


NARROW_FORM: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
}


class NarrowLayerNorm(nn.Module):
    """An `nn.LayerNorm` over channels of which only those `kept` are there."""

    def __init__(self, norm: nn.LayerNorm, kept: IntArray) -> None:
        super().__init__()
        (self.width,), self.eps = norm.normalized_shape, norm.eps
        self.weight = _cut(norm.weight, kept)
        self.bias = _cut(norm.bias, kept)

    def forward(self, x: Tensor) -> Tensor:
        """The norm of `x`, `[..., d]`."""
        return layer_norm(x, self.width, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """How many channels count."""
        return f"of {self.width}, eps={self.eps}"


class NarrowRMSNorm(nn.Module):
    """An `nn.RMSNorm` over channels of which only those `kept` are there."""

    def __init__(self, norm: nn.RMSNorm, kept: IntArray) -> None:
        super().__init__()
        (self.width,), self.eps = norm.normalized_shape, norm.eps
        self.weight = _cut(norm.weight, kept)

    def forward(self, x: Tensor) -> Tensor:
        """The norm of `x`, `[..., d]`."""
        return rms_norm(x, self.width, self.weight, self.eps)

    def extra_repr(self) -> str:
        """How many channels count."""
        return f"of {self.width}, eps={self.eps}"


def narrow_norm(norm: nn.Module, kept: IntArray) -> nn.Module | None:
    """`norm` for the channels `kept`; None if it is not a norm over channels."""
    if type(norm) is nn.LayerNorm:
        return NarrowLayerNorm(norm, kept)
    return NarrowRMSNorm(norm, kept) if type(norm) is nn.RMSNorm else None


def _cut(parameter: Tensor | None, kept: IntArray) -> nn.Parameter | None:
    if parameter is None:
        return None
    own = parameter.detach()[torch.from_numpy(kept).to(parameter.device)].clone()
    return nn.Parameter(own, False)
