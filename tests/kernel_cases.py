"""Layers and runs of the project's own kernel for its tests."""

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from dspfx.layers.group_conv import Added, FilterGroup, GroupConv2d, group_conv_like
from dspfx.layers.group_conv_run import GroupConvRun
from dspfx.layers.native import packing, reference

X = torch.empty(0)  # instead of a weight that is not drawn yet


def layer(
    conv: nn.Conv2d, groups: int, seed: int, keep: float = 0.6
) -> tuple[GroupConv2d, nn.Conv2d]:
    """`conv` with random groups of filters that read random channels, in both forms."""
    rng = np.random.default_rng(seed)
    conv = conv.eval().requires_grad_(False)
    mask = rng.random((groups, conv.in_channels)) < keep
    row = rng.integers(groups, size=conv.out_channels)
    conv.weight.mul_(torch.from_numpy(mask[row])[:, :, None, None])
    lists = [(np.flatnonzero(row == g), np.flatnonzero(mask[g])) for g in range(groups)]
    return group_conv_like(conv, lists, conv.weight, conv.bias), conv


def damage(data: st.DataObject, run: GroupConvRun) -> list[list[int]]:
    """Change one number of the plan of a run; the numbers of its layers as they are then."""
    layers = packing.as_numbers(run.layers)
    numbers: Any = data.draw(st.sampled_from([run.indices, *layers, run.outputs]))
    place = data.draw(st.integers(0, len(numbers) - 1))
    numbers[place] = data.draw(st.sampled_from([-(2**62), -2, -1, 0, 1, 2, 5, 8, 9, 2**31, 2**62]))
    run.layers = packing.as_text(layers)
    return layers


def expected(conv: nn.Conv2d, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    y = conv.double()(x.double())
    y = y if residual is None else y + residual.double()
    return reference.FUNCTIONS[packing.ACTIVATIONS.index(activation)](y).float()


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    pair = st.tuples(st.integers(1, 4), st.integers(1, 4))
    kernel, stride, dilation = draw(pair), draw(pair), draw(pair)
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    size = [
        max(1, draw(st.integers(1, 24)), d * (k - 1) + 1 - 2 * p)
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    return {
        "conv": nn.Conv2d(
            *(draw(st.integers(1, 20)), draw(st.integers(1, 20)), kernel, stride, padding),
            dilation=dilation,
            bias=draw(st.booleans()),
        ),
        "size": size,
        "groups": draw(st.integers(1, 4)),
        "seed": draw(st.integers(0, 999)),
        "batch": draw(st.integers(1, 3)),
        "residual": draw(st.integers(0, 9)),
        "activation": draw(st.sampled_from(packing.ACTIVATIONS)),
        "threads": draw(st.integers(1, 3)),
    }


def added_to(count: int, channels: int, seed: int) -> Added:
    return Added(channels, np.random.default_rng(seed).integers(-1, channels, count))


def moved(residual: Tensor, added: Added) -> Tensor:
    """The channels of `residual` that are `added`, zeros for -1."""
    index = torch.from_numpy(added.places)
    return torch.where(index.reshape(-1, 1, 1) >= 0, residual[:, index.clamp(min=0)], 0)


@st.composite
def any_lists(draw: st.DrawFn) -> dict[str, Any]:
    """Groups that read whatever they like: nothing, or a channel twice, in any order."""
    channels, filters = draw(st.integers(1, 130)), draw(st.integers(1, 130))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    cuts = np.sort(rng.integers(0, filters + 1, draw(st.integers(0, 3))))
    groups = [
        FilterGroup(own, rng.integers(0, channels, int(rng.integers(0, 2 * channels + 1))), X)
        for own in np.split(rng.permutation(filters), cuts)
    ]
    kernel, stride, dilation = (
        [draw(st.integers(1, 3)) for _ in range(2)] for _ in ("kernel", "stride", "dilation")
    )
    padding = [draw(st.integers(0, 4)) for _ in range(2)]
    size = [
        max(1, draw(st.integers(1, 67)), d * (k - 1) + 1 - 2 * p)
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    return {
        "settings": (kernel, stride, padding, dilation),
        "groups": groups,
        "filters": filters,
        "size": (draw(st.integers(0, 3)), channels, *size),
        "layout": draw(st.sampled_from(["plain", "channels last", "slice", "every second row"])),
        "threads": draw(st.integers(1, 4)),
    }


@st.composite
def for_winograd(draw: st.DrawFn) -> dict[str, Any]:
    """Three rows of taps and strides of 1, else anything."""
    call = draw(any_lists())
    kernel, _, padding, dilation = call["settings"]
    settings = ([3, kernel[1]], [1, 1], padding, [1, dilation[1]])
    count, channels, *size = call["size"]
    size[0] = max(size[0], 3 - 2 * padding[0])
    residual = draw(st.integers(0, 9))
    return call | {
        "settings": settings,
        "size": (count, channels, *size),
        "activation": draw(st.sampled_from(packing.ACTIVATIONS)),
        "added": added_to(call["filters"], residual, 0) if residual else None,
        "residual": residual,
    }


def with_weight(group: FilterGroup, kernel: list[int], generator: torch.Generator) -> FilterGroup:
    size = (len(group.filters), len(group.inputs), *kernel)
    return FilterGroup(group.filters, group.inputs, torch.randn(size, generator=generator))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """`x` with other strides."""
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slice":
        return torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]]
    return x.repeat_interleave(2, 2)[:, :, ::2] if layout == "every second row" else x


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Layers that read what was there before them, and add it where it is of their size."""
    inputs = [(draw(st.integers(1, 9)), draw(st.integers(1, 20)), draw(st.integers(1, 20)))]
    values, layers = list(inputs), []
    for seed in range(draw(st.integers(1, 6))):
        source = draw(st.integers(0, len(values) - 1))
        channels, *size = values[source]
        if seed and draw(st.integers(0, 3)) == 0:
            pool = draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))(
                *(draw(st.integers(1, 3)) for _ in range(2)), padding=0
            )
            kernel, stride = pool.kernel_size, pool.stride
            pool.padding = draw(st.integers(0, kernel // 2))
            out = [(n + 2 * pool.padding - kernel) // stride + 1 for n in size]
            if min(out) > 0:
                layers.append((pool, source, -1))
                values.append((channels, *out))
                continue
        if seed and draw(st.integers(0, 5)) == 0:
            layers.append((nn.AdaptiveAvgPool2d(1), source, -1))
            values.append((channels, 1, 1))
            continue
        kernel = [draw(st.integers(1, min(3, n))) for n in size]
        same = draw(st.booleans()) and all(k % 2 for k in kernel)
        padding = [k // 2 if same else draw(st.integers(0, 2)) for k in kernel]
        stride = [1 if same else draw(st.integers(1, 2)) for _ in size]
        filters = draw(st.integers(1, 20))
        conv = nn.Conv2d(channels, filters, kernel, stride, padding, bias=draw(st.booleans()))
        out = list(conv(torch.zeros(1, *values[source])).shape[2:])
        like = [i for i, (_, *other) in enumerate(values) if other == out]
        residual = draw(st.sampled_from([-1, *like]))
        own, _ = layer(conv, draw(st.integers(1, 3)), seed)
        if residual >= 0:
            own = own.remade(added=added_to(filters, values[residual][0], seed))
        own = own.remade(activation=draw(st.sampled_from(packing.ACTIVATIONS)))
        layers.append((own, source, residual))
        values.append((filters, *out))
    results = range(len(inputs), len(values))
    return {
        "layers": layers,
        "inputs": inputs,
        "outputs": draw(st.lists(st.sampled_from(results), min_size=1, unique=True)),
        "winograd": draw(st.sets(st.integers(0, len(layers) - 1))),
        "batch": draw(st.integers(0, 5) | st.integers(9, 13)),
        "threads": draw(st.integers(1, 4)),
    }
