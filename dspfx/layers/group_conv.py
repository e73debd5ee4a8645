"""Convolutions of groups of filters on the project's own kernel: index lists instead of gathers."""

import copy
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dspfx.layers import native
from dspfx.utils.arrays import IntArray


@dataclass(frozen=True, eq=False)
class FilterGroup:
    """Filters that read the same channels.

    Attributes:
        filters: the channels of the output that they write, int `[f]`.
        inputs: the channels of the input that they read, int `[c]`.
        weight: `[f, c, kh, kw]`.
    """

    filters: IntArray
    inputs: IntArray
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Added:
    """What is added to the output: channels of another value.

    Attributes:
        channels: R, how many the value has.
        places: int `[O]`, which one is added to each of the output; -1 for none.
    """

    channels: int
    places: IntArray


class GroupConv2d(nn.Module):
    """y[:, filters_g] = conv2d(x[:, inputs_g], weight_g) for every group g, and an epilogue.

    y = activation(y + bias + residual[:, added.places]).

    Args:
        settings: kernel size, stride, padding and dilation.
        groups: none of them writes what another writes; channels of the output that none writes
            are zero before bias, residual and activation.
        channels: C, how many the input has.
        filters: O, how many channels the output has.
        bias: `[O]`, or None.
        activation: one of `native.ACTIVATIONS`.
        added: of a residual, or None.
    """

    def __init__(
        self,
        settings: native.Settings,
        groups: Sequence[FilterGroup],
        channels: int,
        filters: int,
        bias: Tensor | None,
        activation: str = "none",
        added: Added | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.block = native.filters_in_a_block()
        self.channels, self.count = channels, filters
        self.activation = activation
        written = np.concatenate([group.filters for group in groups])
        silent = np.setdiff1d(np.arange(filters), written)
        sizes = [(len(group.filters), len(group.inputs)) for group in groups]
        self.sizes = [*sizes, (len(silent), 0)] if len(silent) else sizes
        numbers = [
            np.array(self.sizes).reshape(-1),
            *(written, silent),
            *(group.inputs for group in groups),
            *([] if added is None else [[added.channels], added.places]),
        ]
        self.register_buffer("weight", native.packed([g.weight for g in groups], self.block))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        indices = np.concatenate([[self.block, channels], *numbers]).astype(np.int64)
        self.register_buffer("indices", torch.from_numpy(indices))
        self.adds = added is not None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register the operator, which a process that unpickles may not have done."""
        native.built()
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[N, C, H, W]`, and a residual `[N, R, H', W']` if one is added, to `[N, O, H', W']`."""
        result: Tensor = torch.ops.dspfx.group_conv2d(
            *(x, self.weight, self.bias, self.indices, residual, len(self.sizes), self.count),
            *(*self.settings, native.ACTIVATIONS.index(self.activation)),
        )
        return result

    def numbers(self, source: int, residual: int) -> list[int]:
        """The description of this layer for the kernel, if it reads those values of a run."""
        settings = [number for setting in self.settings for number in setting]
        activation = native.ACTIVATIONS.index(self.activation)
        kind = native.CONVOLUTION
        return [kind, source, residual, len(self.sizes), self.count, *settings, activation]

    def remade(self, **changes: Any) -> "GroupConv2d":
        """A copy with some of the constructor's arguments changed."""
        made_of: dict[str, Any] = {
            "settings": self.settings,
            "groups": self.groups(),
            "channels": self.channels,
            "filters": self.count,
            "bias": self.bias,
            "activation": self.activation,
            "added": self.added(),
        }
        return GroupConv2d(**(made_of | changes)).train(self.training)

    def groups(self) -> list[FilterGroup]:
        """The groups that this was constructed with."""
        return [
            FilterGroup(filters.numpy(), inputs.numpy(), weight)
            for filters, inputs, weight in self._unpacked().groups
        ]

    def added(self) -> Added | None:
        """The channels of a residual that are added."""
        layer = self._unpacked()
        return None if layer.added is None else Added(layer.addends, layer.added.numpy())

    def whole(self, structural_groups: int = 1) -> Tensor:
        """The weight that this was constructed with, `[O, C/S, kh, kw]`, zeros filled in.

        Args:
            structural_groups: S; the filters of each, O/S, read C/S channels of their own.
        """
        packed: Any = self.weight
        channels = self.channels // structural_groups
        weight: Tensor = packed.new_zeros(self.count, channels, *self.settings[0])
        for filters, inputs, own in self._unpacked().groups:
            first = filters // (self.count // structural_groups) * channels
            weight[filters[:, None], inputs[None] - first[:, None]] = own
        return weight

    def _unpacked(self) -> native.Layer:
        weight: Any = self.weight
        indices: Any = self.indices
        (layer,) = native.unpacked(
            weight, indices, native.as_text([self.numbers(0, 1 if self.adds else -1)])
        )
        return layer

    def extra_repr(self) -> str:
        """The groups and settings, in `print`."""
        groups = ", ".join(
            f"{reads}->{filters}" + (f" x{count}" if count > 1 else "")
            for (filters, reads), count in _counted(self.sizes)
        )
        kernel, stride, padding, dilation = self.settings
        return (
            f"{groups}, kernel={kernel}, stride={stride}, padding={padding}, "
            f"dilation={dilation}, activation={self.activation}"
        )


def group_conv_like(
    conv: nn.Conv2d,
    groups: Sequence[tuple[IntArray, IntArray]],
    weight: Tensor,
    bias: Tensor | None,
    structural_groups: int = 1,
) -> GroupConv2d:
    """A `GroupConv2d` with the settings of `conv`.

    Args:
        conv: its kernel size, stride, padding and dilation are taken over.
        groups: for each the output channels that it writes, int `[f]`, and the input channels
            that it reads, int `[c]`; together they write all channels of the output.
        weight: `[O, C/S, kh, kw]`, of which only what groups read is taken.
        bias: `[O]`, or None.
        structural_groups: S, structural groups; each group is within one.
    """
    settings = (
        list(conv.kernel_size),
        list(conv.stride),
        [int(p) for p in conv.padding],
        list(conv.dilation),
    )
    filters, channels = weight.shape[:2]
    own = []
    for f, c in groups:
        stored = c - (f[0] // (filters // structural_groups) * channels if len(f) else 0)
        cut = weight.detach()[torch.from_numpy(f)][:, torch.from_numpy(stored)]
        own.append(FilterGroup(f, c, cut))
    return GroupConv2d(settings, own, channels * structural_groups, filters, bias)


class GroupConvRun(nn.Module):
    """Layers that are computed image by image, so that intermediate values stay in the cache.

    Args:
        layers: convolutions, and pools of which there are `pool_numbers`, in an order in which
            they can be computed.
        reads: for each the values that it reads and adds (-1 for none); the inputs come first,
            then one value for each layer.
        inputs: how many.
        outputs: the values that are returned.
        names: of the layers; their numbers by default.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        reads: Sequence[tuple[int, int]],
        inputs: int,
        outputs: Sequence[int],
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.names = [str(i) for i in range(len(layers))] if names is None else list(names)
        self.descriptions = [layer.extra_repr() for layer in layers]
        self.inputs, self.outputs = inputs, list(outputs)
        numbers: list[Any] = [
            layer.numbers(source, residual)
            if isinstance(layer, GroupConv2d)
            else pool_numbers(layer, source)
            for layer, (source, residual) in zip(layers, reads, strict=True)
        ]
        self.layers = native.as_text(numbers)
        parts: list[Any] = [layer for layer in layers if isinstance(layer, GroupConv2d)]
        indices = [parts[0].indices[:1], *(part.indices[1:] for part in parts)]
        bias = [p.weight.new_zeros(p.count) if p.bias is None else p.bias for p in parts]
        self.register_buffer("weight", torch.cat([part.weight for part in parts]))
        self.register_buffer("bias", torch.cat(bias))
        self.register_buffer("indices", torch.cat(indices))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register the operator, which a process that unpickles may not have done."""
        native.built()
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def transformable(self) -> list[int]:
        """The layers that Winograd's algorithm can compute: 3 rows of taps, and strides of 1."""
        found = []
        for number, ((kind, *_), settings, _) in enumerate(native.described(self.layers)):
            kernel, stride, _, dilation = settings
            rows = kernel[0] == 3 and dilation[0] == 1 and stride == [1, 1]
            if kind not in native.POOLS and rows:
                found.append(number)
        return found

    def transformed(self, chosen: Collection[int]) -> "GroupConvRun":
        """The same, but `chosen`, of the `transformable` layers, are by Winograd's algorithm.

        Their weights are transformed, and rounded again.
        """
        twin = copy.deepcopy(self)
        weights: list[Tensor] = []
        numbers = native.as_numbers(self.layers)
        for number, layer in enumerate(self._unpacked()):
            if layer.kind in native.POOLS:
                continue
            by_winograd = number in chosen
            kind = native.WINOGRAD if by_winograd else native.CONVOLUTION
            numbers[number][0] = kind
            own = [weight for _, _, weight in layer.groups]
            weights += [native.transformed(w) for w in own] if by_winograd else own
        indices: Any = self.indices
        twin.weight = native.packed(weights, int(indices[0]))
        twin.layers = native.as_text(numbers)
        return twin

    def by_winograd(self) -> list[str]:
        """The names of the layers that are computed by Winograd's algorithm."""
        pairs = zip(self.names, native.as_numbers(self.layers), strict=True)
        return [name for name, (kind, *_) in pairs if kind == native.WINOGRAD]

    def _unpacked(self) -> list[native.Layer]:
        weight: Any = self.weight
        indices: Any = self.indices
        return list(native.unpacked(weight, indices, self.layers))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """The inputs, each `[N, C, H, W]`, to the values that are returned."""
        results: list[Tensor] = torch.ops.dspfx.group_conv_run(
            list(inputs), self.weight, self.bias, self.indices, self.layers, self.outputs
        )
        return results

    def seconds(self, *inputs: Tensor) -> Tensor:
        """Float64 `[layers]`, how long the first thread's share of each layer takes in one call.

        Threads have images of their own where there are enough, and share every layer otherwise.
        Only where the kernel is built.
        """
        result: Tensor = torch.ops.dspfx.group_conv_run_seconds(
            list(inputs), self.weight, self.bias, self.indices, self.layers, self.outputs
        )
        return result

    def extra_repr(self) -> str:
        """A line for each layer, in `print`."""
        own = self.by_winograd()
        return "\n".join(
            f"({name}): {description}" + (", Winograd" if name in own else "")
            for name, description in zip(self.names, self.descriptions, strict=True)
        )


def _counted(sizes: list[tuple[int, int]]) -> list[tuple[tuple[int, int], int]]:
    """Equal ones that follow each other, and how many."""
    return [(size, len(list(equal))) for size, equal in itertools.groupby(sizes)]


def pool_numbers(pool: nn.Module, source: int) -> list[int] | None:
    """The description of a pool that reads the value `source`; None: the kernel cannot compute it.

    It can compute max pools, average pools that count padding, and the average of all pixels.
    """
    rounds_up = getattr(pool, "ceil_mode", False)
    if type(pool) is nn.MaxPool2d and not rounds_up and not pool.return_indices:
        kind, settings = native.MAX_POOL, (*_pool_settings(pool), pool.dilation)
    elif type(pool) is nn.AvgPool2d and not rounds_up and pool.divisor_override is None:
        if not pool.count_include_pad and _pairs(pool.padding) != [0, 0]:
            return None
        kind, settings = native.AVERAGE_POOL, (*_pool_settings(pool), 1)
    elif type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1)):
        kind, settings = native.AVERAGE_POOL, (0, 1, 0, 1)
    else:
        return None
    return [kind, source, -1, 0, 0, *(n for s in settings for n in _pairs(s)), 0]


def _pool_settings(pool: nn.MaxPool2d | nn.AvgPool2d) -> tuple[Any, Any, Any]:
    return pool.kernel_size, pool.stride, pool.padding


def _pairs(setting: Any) -> list[int]:
    return [setting, setting] if isinstance(setting, int) else list(setting)
