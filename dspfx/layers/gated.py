"""Torch's layers that read their weight through a `FilterGate`."""

from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dspfx.layers.computed_weight import WeightedConv1d, WeightedConv2d, WeightedConv3d
from dspfx.layers.gates import FilterGate
from dspfx.layers.weights import spread


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
