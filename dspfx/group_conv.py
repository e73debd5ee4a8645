"""A layer of groups of filters on the project's own kernel: one call, lists instead of gathers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dspfx import native

Numbers = npt.NDArray[np.int64]


class GroupConv2d(nn.Module):
    """y[:, filters_g] = act(conv2d(x[:, inputs_g], weight_g) + bias + residual), for every group g.

    Args:
        conv: its kernel size, stride, padding and dilation are taken over.
        groups: for each the output channels that it writes, int `[f]`, and those of the input that
            it reads, int `[c]`.
        weight: `[O, C, kh, kw]`, of which only what groups read is taken.
        bias: `[O]`, or None.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        groups: Sequence[tuple[Numbers, Numbers]],
        weight: Tensor,
        bias: Tensor | None,
    ) -> None:
        super().__init__()
        self.settings = [
            list(conv.kernel_size),
            list(conv.stride),
            [int(p) for p in conv.padding],
            list(conv.dilation),
        ]
        self.block = native.filters_in_a_block()
        self.activation = "none"
        packed = [
            _packed(weight[torch.from_numpy(f)][:, torch.from_numpy(c)], self.block)
            for f, c in groups
        ]
        sizes = [[len(filters), len(inputs)] for filters, inputs in groups]
        self.register_buffer("weight", torch.cat(packed))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("sizes", torch.tensor(sizes))
        self.register_buffer("filters", _joined([filters for filters, _ in groups]))
        self.register_buffer("inputs", _joined([inputs for _, inputs in groups]))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Where it is unpickled the operator may not be known yet."""
        native.define()
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[N, C, H, W]`, and a residual like the output, to `[N, O, H', W']`."""
        result: Tensor = torch.ops.dspfx.group_conv2d(
            *(x, self.weight, self.bias, self.sizes, self.filters, self.inputs, residual),
            *(*self.settings, self.block, native.ACTIVATIONS.index(self.activation)),
        )
        return result

    def whole(self, channels: int) -> Tensor:
        """The weight that this was made of, `[O, channels, kh, kw]`, zeros filled in."""
        packed: Any = self.weight
        sizes: Any = self.sizes
        filters: Any = self.filters
        inputs: Any = self.inputs
        weight: Tensor = packed.new_zeros(len(filters), channels, *self.settings[0])
        taps = self.settings[0][0] * self.settings[0][1]
        for count, reads in sizes.tolist():
            blocks = -(-count // self.block)
            size = blocks * self.block * reads * taps
            own = packed[:size].reshape(blocks, reads * taps, self.block).transpose(1, 2)
            own = own.reshape(blocks * self.block, reads, *self.settings[0])[:count]
            weight[filters[:count, None], inputs[None, :reads]] = own
            packed, filters, inputs = packed[size:], filters[count:], inputs[reads:]
        return weight

    def extra_repr(self) -> str:
        """The groups and settings, in `print`."""
        sizes: Any = self.sizes
        groups = ", ".join(f"{reads}->{filters}" for filters, reads in sizes.tolist())
        kernel, stride, padding, dilation = self.settings
        return (
            f"{groups}, kernel={kernel}, stride={stride}, padding={padding}, "
            f"dilation={dilation}, activation={self.activation}"
        )


def _packed(weight: Tensor, block: int) -> Tensor:
    """`[f, c, kh, kw]` in blocks of filters, `[ceil(f / block), c * kh * kw, block]`, flat."""
    filters = weight.detach().flatten(1)
    missing = -len(filters) % block
    filled = torch.cat([filters, filters.new_zeros(missing, filters.shape[1])])
    blocks = len(filled) // block
    return filled.reshape(blocks, block, filters.shape[1]).transpose(1, 2).flatten()


def _joined(lists: list[Numbers]) -> Tensor:
    return torch.from_numpy(np.concatenate(lists).astype(np.int64))
