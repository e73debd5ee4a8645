"""The inputs that the filters of a layer are multiplied with, position by position.

A layer is linear in its weight: with the columns below, `y[s] = W[s] columns[s] + b` for every
structural group s, `W[s]` being `[O/S, C/S * taps]`. For convolutions this is im2col (Chellapilla,
Puri, Simard, "High Performance Convolutional Neural Networks for Document Processing", 2006); a
transposed one is a convolution of its input with zeros between, by the flipped filters.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspfx.layers.weights import TRANSPOSED, structural_groups

AT_ONCE = 2**23  # numbers that the columns of one piece hold; 64 MiB in float64


def columns(
    layer: nn.Module, x: Tensor, y: Tensor, channels: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The columns of the input `x` in pieces, each with the same positions of the output `y`.

    Args:
        layer: a convolution, transposed or not, or a linear layer; S are its structural groups.
        x: `[N, C, *sizes]`, or `[*, C]` of a linear layer.
        y: `[N, O, *sizes]` or `[*, O]`; what it holds does not matter.
        channels: int, the input channels that are wanted, if S is 1; all by default.

    Yields:
        Float64 `[S, C/S * taps, positions]`, and `[S, O/S, positions]`.
    """
    if isinstance(layer, nn.Linear):
        x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        x = x if channels is None else x[:, channels]
        count = max(1, AT_ONCE // max(1, x.shape[1]))
        for some, same in zip(torch.split(x, count), torch.split(y, count), strict=True):
            yield some.T[None].double(), same.T[None]
        return
    own: Any = layer
    taps = len(own.kernel_size)
    if x.dim() == taps + 1:  # one sample without a batch dimension
        x, y = x[None], y[None]
    x = x if channels is None else x[:, channels]
    numbers = x.shape[1] * y[0, 0].numel() * own.weight[0, 0].numel()
    groups, count = structural_groups(layer), max(1, AT_ONCE // max(1, numbers))
    for some, same in zip(torch.split(x, count), torch.split(y, count), strict=True):
        windows = _windows(own, some.double(), same)  # [n, C, *sizes, *taps]
        order = (1, *range(2 + taps, 2 + 2 * taps), 0, *range(2, 2 + taps))
        rows = windows.permute(order).reshape(groups, x.shape[1] // groups * _taps(own), -1)
        yield rows, same.transpose(0, 1).reshape(groups, y.shape[1] // groups, -1)


def _taps(layer: Any) -> int:
    return int(layer.weight[0, 0].numel())


def _windows(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    """`[n, C, *sizes of y, *taps]`, what every tap meets at every position of `y`."""
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    transposed = isinstance(layer, TRANSPOSED)
    if transposed:
        x = _spread_out(x, layer.stride)
        pads: list[int] = []
        for dim in reversed(range(len(reach))):
            before = reach[dim] - layer.padding[dim]
            pads += [before, y.shape[2 + dim] + reach[dim] - before - x.shape[2 + dim]]
        x = F.pad(x, pads)
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for dim, (far, step) in enumerate(zip(reach, layer.dilation, strict=True)):
        stride = 1 if transposed else layer.stride[dim]
        x = x.unfold(2 + dim, far + 1, stride)[..., ::step]
    return x.flip(tuple(range(-len(reach), 0))) if transposed else x


def _spread_out(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """`x` with `stride - 1` zeros between its positions."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    return spread
