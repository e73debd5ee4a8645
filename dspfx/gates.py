"""Gates: the places where a prepared model can be pruned, and the state that says how far it is.

A `FilterGate` sits inside a layer and masks its weight, group by group of filters. A
`ChannelGate` sits behind a normalisation and keeps dead channels at exactly zero, so that a shift
or a running mean cannot revive them. Both act in the forward pass: the user's optimiser may write
what it likes into masked weights, it has no effect.

All state is in buffers. It travels with `state_dict`, `deepcopy` and `pickle`, and no gate adds a
parameter to the user's optimiser.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dspfx.errors import MaskError
from dspfx.filters import filters_first, spread
from dspfx.weighted import WeightedConv1d, WeightedConv2d, WeightedConv3d


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
        """Set the mode, and look at the mask anew: data parallelism copies that of one process."""
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
        """Set the mode, and look at the channels anew, see `FilterGate.train`."""
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


class GatedLayer(nn.Module):
    """A layer of torch's that reads its weight through a `FilterGate`; dead filters give zero."""

    gate: FilterGate
    weight: Any  # a parameter
    bias: Any  # a parameter, or None
    plain: ClassVar[type[nn.Module]]

    @classmethod
    def wrap(cls, layer: nn.Module, gate: FilterGate) -> Self:
        """A gated layer that shares parameters, parametrisations and hooks with `layer`."""
        kind = _with_properties(cls, layer) if parametrize.is_parametrized(layer) else cls
        gated: Self = kind.__new__(kind)
        own = {kind: dict(vars(layer)[kind]) for kind in ("_parameters", "_buffers", "_modules")}
        vars(gated).update(vars(layer) | own)
        gated.gate = gate
        return gated.train(layer.training)

    def masked(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The weight, or a computed one, and the bias: zero where masked, as they are if open."""
        weight = self.weight if weight is None else weight
        if not torch.compiler.is_compiling() and self.gate.open:  # or each pruning recompiles
            return weight, self.bias
        weight = torch.where(spread(self, self.gate.mask), weight, 0.0)
        bias = None if self.bias is None else torch.where(self.gate.alive, self.bias, 0.0)
        return weight, bias


def _with_properties(gated: type[nn.Module], parametrised: nn.Module) -> Any:
    """A subclass of `gated` that computes what `parametrised` computes whenever it is read."""
    left_out = ("__module__", "__doc__", "__dict__", "__weakref__")
    own = {name: it for name, it in vars(type(parametrised)).items() if name not in left_out}
    return type(f"Parametrized{gated.__name__}", (gated,), own)


class _GatedConv(GatedLayer):
    def forward(self, input: Tensor) -> Tensor:
        """The convolution of `input` with the gated weight and bias."""
        # `_conv_forward` is how torch's own convolutions share their padding modes
        return cast(Tensor, cast(Any, self)._conv_forward(input, *self.masked()))


class _GatedWeighted(GatedLayer):
    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        """The convolution of `input` with `weight`, gated, and the gated bias."""
        return cast(Tensor, cast(Any, self)._conv_forward(input, *self.masked(weight)))


class _GatedTransposed(GatedLayer):
    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        """The transposed convolution of `input` with the gated weight and bias."""
        own: Any = self
        sizes = own.stride, own.padding, own.kernel_size
        extra = own._output_padding(input, output_size, *sizes, input.dim() - 2, own.dilation)
        how = own.stride, own.padding, extra, own.groups, own.dilation
        return cast(Tensor, _TRANSPOSED[self.plain](input, *self.masked(), *how))


_TRANSPOSED: dict[type[nn.Module], Any] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}


class GatedConv1d(_GatedConv, nn.Conv1d):
    """`nn.Conv1d` with a `FilterGate` as its `gate`."""

    plain = nn.Conv1d


class GatedConv2d(_GatedConv, nn.Conv2d):
    """`nn.Conv2d` with a `FilterGate` as its `gate`."""

    plain = nn.Conv2d


class GatedConv3d(_GatedConv, nn.Conv3d):
    """`nn.Conv3d` with a `FilterGate` as its `gate`."""

    plain = nn.Conv3d


class GatedConvTranspose1d(_GatedTransposed, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with a `FilterGate` as its `gate`."""

    plain = nn.ConvTranspose1d


class GatedConvTranspose2d(_GatedTransposed, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with a `FilterGate` as its `gate`."""

    plain = nn.ConvTranspose2d


class GatedConvTranspose3d(_GatedTransposed, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with a `FilterGate` as its `gate`."""

    plain = nn.ConvTranspose3d


class GatedWeightedConv1d(_GatedWeighted, WeightedConv1d):
    """`WeightedConv1d` with a `FilterGate` as its `gate`."""

    plain = WeightedConv1d


class GatedWeightedConv2d(_GatedWeighted, WeightedConv2d):
    """`WeightedConv2d` with a `FilterGate` as its `gate`."""

    plain = WeightedConv2d


class GatedWeightedConv3d(_GatedWeighted, WeightedConv3d):
    """`WeightedConv3d` with a `FilterGate` as its `gate`."""

    plain = WeightedConv3d


class GatedLinear(GatedLayer, nn.Linear):
    """`nn.Linear` with a `FilterGate` as its `gate`."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """The product of `input` with the gated weight, and the gated bias."""
        return F.linear(input, *self.masked())


GATED: dict[type[nn.Module], type[GatedLayer]] = {
    kind.plain: kind
    for kind in (
        *(GatedConv1d, GatedConv2d, GatedConv3d),
        *(GatedConvTranspose1d, GatedConvTranspose2d, GatedConvTranspose3d),
        *(GatedWeightedConv1d, GatedWeightedConv2d, GatedWeightedConv3d),
        GatedLinear,
    )
}
LAYERS = frozenset((*GATED, *GATED.values()))  # gated or not


def gated_layers(module: nn.Module) -> dict[str, GatedLayer]:
    """The gated layers of `module` by name, in the order in which it registers them."""
    return {name: m for name, m in module.named_modules() if isinstance(m, GatedLayer)}
