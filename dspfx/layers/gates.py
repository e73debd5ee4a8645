"""Gates: the masks of a prepared model, and the state that says how far it is pruned.

A `FilterGate` sits inside a layer and masks its weight, group by group of filters. A
`ChannelGate` follows a normalisation and keeps dead channels at exactly zero, so that a shift
or a running mean cannot revive them. Both act in the forward pass: whatever the user's
optimiser writes into masked weights has no effect.

All state is in buffers. It travels with `state_dict`, `deepcopy` and `pickle`, and no gate adds a
parameter to the user's optimiser.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from dspfx.errors import MaskError
from dspfx.layers.weights import filters_first


class FilterGate(nn.Module):
    """Masks the weight of one layer with O filters of C input channels each.

    Attributes:
        logits: `[G, O]`, learnable scores of filter o for group g; zero before learning.
        mask: bool `[O, C]`, which input channels each filter reads (C per structural group).
        input_elements: elements of the layer's input for one sample.
        open: nothing is masked.
    """

    logits: Tensor
    mask: Tensor

    def __init__(self, groups: int, layer: nn.Module, input_elements: int) -> None:
        super().__init__()
        weight = filters_first(layer)
        filters, channels = weight.shape[:2]
        self.input_elements = input_elements
        self.register_buffer("logits", weight.new_zeros(min(groups, filters), filters))
        self.register_buffer("mask", weight.new_ones(filters, channels, dtype=torch.bool))
        self.open = True

    @property
    def alive(self) -> Tensor:
        """Bool `[O]`: the filters that read anything at all."""
        return self.mask.any(1)

    @property
    def assignment(self) -> Tensor:
        """Int64 `[O]`: the group of every filter, the first of the best-scored ones."""
        return self.logits.argmax(0)

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> None:
        """Take over `mask`, bool `[O, C]`; raises `MaskError` if its shape is another."""
        if mask.shape != self.mask.shape:
            raise MaskError(f"expected {tuple(self.mask.shape)}, got {tuple(mask.shape)}")
        self.mask.copy_(mask)
        self.open = bool(self.mask.all())

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and read the mask again: data parallelism copies that of one process."""
        if not self.mask.is_meta:
            self.open = bool(self.mask.all())
        return super().train(mode)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.open = bool(self.mask.all())

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
        open: all are alive.
    """

    alive: Tensor

    def __init__(self, channels: int, dim: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("alive", torch.ones(channels, dtype=torch.bool, device=device))
        self.open = True

    def forward(self, value: Tensor) -> Tensor:
        """Zero the dead channels of `value`; the value itself while all are alive."""
        if not torch.compiler.is_compiling() and self.open:
            return value
        shape = [1] * value.dim()
        shape[self.dim] = -1
        return torch.where(self.alive.reshape(shape), value, 0.0)

    @torch.no_grad()
    def set_alive(self, alive: Tensor) -> None:
        """Take over `alive`, bool `[C]`."""
        self.alive.copy_(alive)
        self.open = bool(self.alive.all())

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and read the channels again, see `FilterGate.train`."""
        if not self.alive.is_meta:
            self.open = bool(self.alive.all())
        return super().train(mode)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.open = bool(self.alive.all())

    def extra_repr(self) -> str:
        """How many channels are alive."""
        return f"alive={int(self.alive.sum())}/{len(self.alive)}"
