"""`Branches`: a layer of groups of filters, emitted as ordinary layers side by side."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dspfx.utils.arrays import IntArray

# (first, count): consecutive channels; None: all of them; a name: the buffer of their numbers
Selection = tuple[int, int] | str | None


class Branches(nn.Module):
    """Layers that each read some of the channels; their outputs, put together and in order.

    y = cat(layer_i(x[:, inputs_i]))[:, order]. The layers are called `0`, `1`, ...

    Args:
        layers: convolutions, or linear layers, which have their channels last.
        inputs: for each layer the channels that it reads; None for all of them as they are.
        order: position in the concatenation of every channel of the output; None if they are
            in order.
        channels: how many the input has.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        inputs: Sequence[IntArray | None],
        order: IntArray | None,
        channels: int,
    ) -> None:
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)
        self.channels = channels
        self.dim = -1 if isinstance(layers[0], nn.Linear) else 1
        device = next(layers[0].parameters()).device
        self.inputs = [
            self._hold(f"inputs_{number}", channels, own, device)
            for number, own in enumerate(inputs)
        ]
        written = sum(_width(layer) for layer in layers)
        self.order = self._hold("order_of_outputs", written, order, device)

    def _hold(
        self, name: str, count: int, wanted: IntArray | None, device: torch.device
    ) -> Selection:
        """How to take the channels `wanted` out of `count`."""
        if wanted is None or np.array_equal(wanted, np.arange(count)):
            return None
        first = int(wanted[0])
        if np.array_equal(wanted, np.arange(first, first + len(wanted))):
            return first, len(wanted)
        self.register_buffer(name, torch.from_numpy(wanted).to(device))
        return name

    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        """`[N, C, *]` to `[N, O, *]`; channels come last where the layers are linear.

        Transposed convolutions may be asked for an `output_size`, as torch's own.
        """
        sizes = () if output_size is None else (output_size,)
        layers: list[nn.Module] = [getattr(self, str(i)) for i in range(len(self.inputs))]
        outputs = [
            layer(self._take(x, own), *sizes)
            for layer, own in zip(layers, self.inputs, strict=True)
        ]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, self.dim)
        return self._take(y, self.order)

    def _take(self, x: Tensor, channels: Selection) -> Tensor:
        if channels is None:
            return x
        if isinstance(channels, str):
            return torch.index_select(x, self.dim, getattr(self, channels))
        return torch.narrow(x, self.dim, *channels)

    def read_by(self, number: int) -> IntArray:
        """The channels of the input that layer `number` reads, in its order."""
        return self._numbers(self.inputs[number], self.channels)

    def written(self) -> IntArray:
        """For every channel of the output its position in the concatenation."""
        return self._numbers(self.order, sum(_width(layer) for layer in self.children()))

    def _numbers(self, channels: Selection, count: int) -> IntArray:
        if channels is None:
            return np.arange(count)
        if isinstance(channels, str):
            numbers: IntArray = getattr(self, channels).cpu().numpy()
            return numbers
        return np.arange(channels[0], sum(channels))

    def extra_repr(self) -> str:
        """What each layer reads, in `print`."""
        return f"inputs={self.inputs}, order={self.order}"


def _width(layer: nn.Module) -> int:
    """The channels that a layer writes."""
    return int(getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0))
