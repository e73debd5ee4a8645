"""Convolutions whose weight is an input, for layers whose code computes it.

Weight standardisation is one example. The parameters stay in the user's module, and the graph
computes the weight from them.
"""

from torch import Tensor, nn


class WeightedConv1d(nn.Conv1d):
    """`nn.Conv1d` with its weight as a second input."""

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        """The convolution of `input` with `weight`, `[O, C/S, *taps]`, the own one if left out."""
        weight = self.weight if weight is None else weight
        result: Tensor = self._conv_forward(input, weight, self.bias)
        return result


class WeightedConv2d(nn.Conv2d):
    """`nn.Conv2d` with its weight as a second input."""

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        """The convolution of `input` with `weight`, `[O, C/S, *taps]`, the own one if left out."""
        weight = self.weight if weight is None else weight
        result: Tensor = self._conv_forward(input, weight, self.bias)
        return result


class WeightedConv3d(nn.Conv3d):
    """`nn.Conv3d` with its weight as a second input."""

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        """The convolution of `input` with `weight`, `[O, C/S, *taps]`, the own one if left out."""
        weight = self.weight if weight is None else weight
        result: Tensor = self._conv_forward(input, weight, self.bias)
        return result


WEIGHTED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: WeightedConv1d,
    nn.Conv2d: WeightedConv2d,
    nn.Conv3d: WeightedConv3d,
}


def is_weighted(layer: nn.Module) -> bool:
    """Whether `layer` is given its weight."""
    return isinstance(layer, tuple(WEIGHTED.values()))
