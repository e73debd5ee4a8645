"""The portable implementation of the operators, by torch's own convolutions, on any device."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dspfx.layers.native.packing import (
    CONVOLUTION,
    MAX_POOL,
    POOLS,
    Layer,
    as_text,
    described,
    unpacked,
)

FUNCTIONS: tuple[Any, ...] = (torch.clone, F.relu, F.relu6, F.hardswish, F.silu)


def run(
    inputs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    layers: str,
    outputs: list[int],
) -> list[Tensor]:
    """The portable implementation: one of torch's convolutions for each group, on any device.

    Inputs and results of layers are rounded to the type of the weight, sums are not.
    """
    rounded = functools.partial(_rounded, bf16=weight.dtype == torch.bfloat16)
    values = [rounded(x) for x in inputs]
    for layer in unpacked(weight, indices, layers):
        x, (_, stride, padding, dilation) = values[layer.source], layer.settings
        if layer.kind in POOLS:
            values.append(rounded(_pool(x, layer)))
            continue
        if x.shape[1] != layer.channels:
            raise RuntimeError(
                f"group_conv2d: expected an input of {layer.channels} channels, got {x.shape[1]}"
            )
        filters = layer.filters.numel()
        y = x.new_zeros(len(x), filters, *out_size(x.shape[2:], *layer.settings))
        for written, read, own in layer.groups:
            if written.numel() and read.numel():
                y[:, written] = F.conv2d(
                    x[:, read], own.to(x.dtype), None, stride, padding, dilation
                )
        if bias is not None:
            own_bias, bias = bias[:filters], bias[filters:]
            y = y + own_bias.reshape(1, -1, 1, 1)
        if layer.added is not None:
            residual = values[layer.residual]
            if residual.shape[1] != layer.addends:
                raise RuntimeError(
                    f"group_conv2d: expected a residual of {layer.addends} channels, got "
                    f"{residual.shape[1]}"
                )
            added = residual[:, layer.added.clamp(min=0)]
            y = y + torch.where(layer.added.reshape(-1, 1, 1) >= 0, added, 0)
        values.append(rounded(FUNCTIONS[layer.activation](y)))
    return [values[number] for number in outputs]


def _rounded(x: Tensor, *, bf16: bool) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype) if bf16 else x


def _pool(x: Tensor, layer: Layer) -> Tensor:
    kernel, stride, padding, dilation = layer.settings
    if layer.kind == MAX_POOL:
        return F.max_pool2d(x, kernel, stride, padding, dilation)
    return F.avg_pool2d(x, _whole(kernel, x.shape[2:]), stride, padding)


def _whole(kernel: list[int], size: Sequence[int]) -> list[int]:
    """The kernel of a pool, that of all pixels spelt out."""
    return [k or n for k, n in zip(kernel, size, strict=True)]


def run_fake(
    inputs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    layers: str,
    outputs: list[int],
) -> list[Tensor]:
    """Tensors like what `run` returns."""
    shapes: list[Sequence[int]] = [x.shape for x in inputs]
    for (kind, source, _, _, filters), settings, _ in described(layers):
        (kernel, *other), before = settings, shapes[source]
        size = out_size(before[2:], _whole(kernel, before[2:]), *other)
        channels = before[1] if kind in POOLS else filters
        shapes.append((shapes[source][0], channels, *size))
    return [inputs[0].new_empty(shapes[number]) for number in outputs]


def one(
    x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, *args: Any, run: Any = run
) -> Tensor:
    """A convolution, as a run of one layer."""
    residual, groups, filters, kernel, stride, padding, dilation, activation = args
    inputs = [x] if residual is None else [x, residual]
    settings = (*kernel, *stride, *padding, *dilation)
    numbers = [CONVOLUTION, 0, len(inputs) * 2 - 3, groups, filters, *settings, activation]
    result: Tensor = run(inputs, weight, bias, indices, as_text([numbers]), [len(inputs)])[0]
    return result


one_fake = functools.partial(one, run=run_fake)


def out_size(
    size: Sequence[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> list[int]:
    """Height and width of what a layer makes of an image of `size`."""
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
