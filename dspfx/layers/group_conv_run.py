"""Runs: layers on the project's own kernel that are computed without tensors in between."""

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.layers import native
from dspfx.layers.group_conv import GroupConv2d
from dspfx.layers.native import packing
from dspfx.layers.native.words import in_words


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
        self.layers = packing.as_text(numbers)
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
        found: list[int] = []
        if self._weight_type() != torch.float32:
            return found
        for number, ((kind, *_), settings, _) in enumerate(packing.described(self.layers)):
            kernel, stride, _, dilation = settings
            rows = kernel[0] == 3 and dilation[0] == 1 and stride == [1, 1]
            if kind not in packing.POOLS and rows:
                found.append(number)
        return found

    def transformed(self, chosen: Collection[int]) -> "GroupConvRun":
        """The same, but `chosen`, of the `transformable` layers, are by Winograd's algorithm.

        Their weights are transformed, and rounded again.
        """
        twin = copy.deepcopy(self)
        weights: list[Tensor] = []
        numbers = packing.as_numbers(self.layers)
        for number, layer in enumerate(self._unpacked()):
            if layer.kind in packing.POOLS:
                continue
            by_winograd = number in chosen
            kind = packing.WINOGRAD if by_winograd else packing.CONVOLUTION
            numbers[number][0] = kind
            own = [weight for _, _, weight in layer.groups]
            weights += [packing.transformed(w) for w in own] if by_winograd else own
        indices: Any = self.indices
        twin.weight = packing.packed(weights, int(indices[0]))
        twin.layers = packing.as_text(numbers)
        return twin

    def in_bf16(self) -> "GroupConvRun":
        """The same in bfloat16, as which weights and what lies between layers are rounded.

        Sums are of float32. It takes and returns float32, and no layer is by Winograd's algorithm.
        Channels between layers are ordered such that those which are read together share words.
        """
        twin = copy.deepcopy(self)
        bias, indices = self.bias, self.indices
        assert isinstance(bias, Tensor)
        assert isinstance(indices, Tensor)
        twin.weight, twin.bias, twin.indices, twin.layers = in_words(
            self._unpacked(), bias, int(indices[0]), self.inputs, self.outputs, torch.bfloat16
        )
        return twin

    def by_winograd(self) -> list[str]:
        """The names of the layers that are computed by Winograd's algorithm."""
        pairs = zip(self.names, packing.as_numbers(self.layers), strict=True)
        return [name for name, (kind, *_) in pairs if kind == packing.WINOGRAD]

    def _unpacked(self) -> list[packing.Layer]:
        weight: Any = self.weight
        indices: Any = self.indices
        return list(packing.unpacked(weight, indices, self.layers))

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """The inputs, each `[N, C, H, W]`, to the values that are returned."""
        results: list[Tensor] = torch.ops.dspfx.group_conv_run(
            self._given(inputs), self.weight, self.bias, self.indices, self.layers, self.outputs
        )
        return results

    def _given(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """In bfloat16, what torch computes before may be of this type as well."""
        if self._weight_type() == torch.float32:
            return list(inputs)
        return [x.float() if x.dtype == torch.bfloat16 else x for x in inputs]

    def _weight_type(self) -> torch.dtype:
        weight: Any = self.weight
        return weight.dtype  # type: ignore[no-any-return]

    def seconds(self, *inputs: Tensor) -> Tensor:
        """Float64 `[layers]`, how long the first thread's share of each layer takes in one call.

        Threads have images of their own where there are enough, and share every layer otherwise.
        Only where the kernel is built.
        """
        result: Tensor = torch.ops.dspfx.group_conv_run_seconds(
            self._given(inputs), self.weight, self.bias, self.indices, self.layers, self.outputs
        )
        return result

    def extra_repr(self) -> str:
        """A line for each layer, in `print`."""
        own = self.by_winograd()
        precision = "" if self._weight_type() == torch.float32 else ", bfloat16"
        return "\n".join(
            f"({name}): {description}{', Winograd' if name in own else ''}{precision}"
            for name, description in zip(self.names, self.descriptions, strict=True)
        )


def pool_numbers(pool: nn.Module, source: int) -> list[int] | None:
    """The description of a pool that reads the value `source`; None: the kernel cannot compute it.

    It can compute max pools, average pools that count padding, and the average of all pixels.
    """
    rounds_up = getattr(pool, "ceil_mode", False)
    if type(pool) is nn.MaxPool2d and not rounds_up and not pool.return_indices:
        kind, settings = packing.MAX_POOL, (*_pool_settings(pool), pool.dilation)
    elif type(pool) is nn.AvgPool2d and not rounds_up and pool.divisor_override is None:
        if not pool.count_include_pad and _pairs(pool.padding) != [0, 0]:
            return None
        kind, settings = packing.AVERAGE_POOL, (*_pool_settings(pool), 1)
    elif type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1)):
        kind, settings = packing.AVERAGE_POOL, (0, 1, 0, 1)
    else:
        return None
    return [kind, source, -1, 0, 0, *(n for s in settings for n in _pairs(s)), 0]


def _pool_settings(pool: nn.MaxPool2d | nn.AvgPool2d) -> tuple[Any, Any, Any]:
    return pool.kernel_size, pool.stride, pool.padding


def _pairs(setting: Any) -> list[int]:
    return [setting, setting] if isinstance(setting, int) else list(setting)
