"""Gates: the places where a prepared model can be pruned, and the state that says how far it is.

A `FilterGate` sits inside a convolution and masks its weight, group by group of filters. A
`ChannelGate` sits behind a normalisation and keeps dead channels at exactly zero, so that a shift
or a running mean cannot revive them. Both act in the forward pass: the user's optimiser may write
what it likes into masked weights, it has no effect.

All state is in buffers. It travels with `state_dict`, `deepcopy` and `pickle`, and no gate adds a
parameter to the user's optimiser.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from dspfx.errors import MaskError


class FilterGate(nn.Module):
    """Masks the weight of one convolution with O filters of C input channels each.

    Attributes:
        logits: `[G, O]`, learnable scores of filter o for group g; zero before learning.
        mask: bool `[O, C]`, which input channels each filter reads (C per convolution group).
        input_elements: elements of the layer's input for one sample.
    """

    logits: Tensor
    mask: Tensor

    def __init__(self, groups: int, weight: Tensor, input_elements: int) -> None:
        super().__init__()
        filters, channels = weight.shape[:2]
        self.input_elements = input_elements
        self.register_buffer("logits", weight.new_zeros(min(groups, filters), filters))
        self.register_buffer("mask", weight.new_ones(filters, channels, dtype=torch.bool))

    @property
    def alive(self) -> Tensor:
        """Bool `[O]`: the filters that read anything at all."""
        return self.mask.any(1)

    @property
    def assignment(self) -> Tensor:
        """Int64 `[O]`: the group of every filter, the first of the best-scored ones."""
        return self.logits.argmax(0)

    def forward(self, weight: Tensor) -> Tensor:
        """Zero the masked entries of `weight`, `[O, C, *taps]`."""
        mask = self.mask.reshape(*self.mask.shape, *[1] * (weight.dim() - 2))
        return torch.where(mask, weight, 0.0)

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Take over `mask`, bool `[O, C]`; raises `MaskError` if its shape is another."""
        if mask.shape != self.mask.shape:
            raise MaskError(f"expected {tuple(self.mask.shape)}, got {tuple(mask.shape)}")
        self.mask.copy_(mask)

    @torch.no_grad()
    def assign(self, groups: Tensor) -> None:
        """Make `groups`, int `[O]`, the assignment, as firm as learned logits are."""
        one_hot = nn.functional.one_hot(groups.to(self.logits.device), len(self.logits))
        self.logits.copy_(one_hot.T)

    def extra_repr(self) -> str:
        """How much of the layer the gate still lets through."""
        groups, filters = self.logits.shape
        return f"groups={groups}, filters={filters}, kept={self.mask.float().mean().item():.1%}"


class ChannelGate(nn.Module):
    """Keeps the dead channels of a normalised value at exactly zero.

    Attributes:
        alive: bool `[C]`.
        dim: the dimension of the value that holds the channels.
    """

    alive: Tensor

    def __init__(self, channels: int, dim: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("alive", torch.ones(channels, dtype=torch.bool, device=device))
        self._open = True

    def forward(self, value: Tensor) -> Tensor:
        """Zero the dead channels of `value`; the value itself while all are alive."""
        if self._open:
            return value
        shape = [1] * value.dim()
        shape[self.dim] = -1
        return torch.where(self.alive.reshape(shape), value, 0.0)

    @torch.no_grad()
    def set_alive(self, alive: Tensor) -> None:
        """Take over `alive`, bool `[C]`."""
        self.alive.copy_(alive)
        self._open = bool(self.alive.all())

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._open = bool(self.alive.all())

    def extra_repr(self) -> str:
        """How many channels are alive."""
        return f"alive={int(self.alive.sum())}/{len(self.alive)}"


class _GatedConv(nn.modules.conv._ConvNd):
    """A convolution that reads its weight through a `FilterGate`; dead filters give zero."""

    gate: FilterGate

    @classmethod
    def wrap(cls, conv: nn.modules.conv._ConvNd, gate: FilterGate) -> "_GatedConv":
        """A gated layer that shares the parameters of `conv`."""
        gated = cls.__new__(cls)
        nn.Module.__init__(gated)
        settings = {k: v for k, v in vars(conv).items() if k not in vars(gated)}
        vars(gated).update(settings)
        gated.weight, gated.bias = conv.weight, conv.bias
        gated.gate = gate
        return gated.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of `input` with the gated weight and bias."""
        bias = None if self.bias is None else torch.where(self.gate.alive, self.bias, 0.0)
        # `_conv_forward` is how torch's own convolutions share their padding modes
        return cast(Tensor, cast(Any, self)._conv_forward(input, self.gate(self.weight), bias))


class GatedConv1d(_GatedConv, nn.Conv1d):
    """`nn.Conv1d` with a `FilterGate` as its `gate`."""


class GatedConv2d(_GatedConv, nn.Conv2d):
    """`nn.Conv2d` with a `FilterGate` as its `gate`."""


class GatedConv3d(_GatedConv, nn.Conv3d):
    """`nn.Conv3d` with a `FilterGate` as its `gate`."""


GatedConv = GatedConv1d | GatedConv2d | GatedConv3d

GATED: dict[type[nn.Module], type[_GatedConv]] = {
    nn.Conv1d: GatedConv1d,
    nn.Conv2d: GatedConv2d,
    nn.Conv3d: GatedConv3d,
}


def gated_layers(module: nn.Module) -> dict[str, GatedConv]:
    """The gated layers of `module` by name, in the order in which it registers them."""
    return {name: m for name, m in module.named_modules() if isinstance(m, GatedConv)}
