"""Convolutions of groups of filters on the project's own kernel: index lists instead of gathers."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dspfx.layers import native
from dspfx.layers.native import packing
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
        activation: one of `packing.ACTIVATIONS`.
        added: of a residual, or None.
    """

    def __init__(
        self,
        settings: packing.Settings,
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
        self.register_buffer("weight", packing.packed([g.weight for g in groups], self.block))
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
            *(*self.settings, packing.ACTIVATIONS.index(self.activation)),
        )
        return result

    def numbers(self, source: int, residual: int) -> list[int]:
        """The description of this layer for the kernel, if it reads those values of a run."""
        settings = [number for setting in self.settings for number in setting]
        activation = packing.ACTIVATIONS.index(self.activation)
        kind = packing.CONVOLUTION
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

    def _unpacked(self) -> packing.Layer:
        weight: Any = self.weight
        indices: Any = self.indices
        (layer,) = packing.unpacked(
            weight, indices, packing.as_text([self.numbers(0, 1 if self.adds else -1)])
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


def _counted(sizes: list[tuple[int, int]]) -> list[tuple[tuple[int, int], int]]:
    """Equal ones that follow each other, and how many."""
    return [(size, len(list(equal))) for size, equal in itertools.groupby(sizes)]
