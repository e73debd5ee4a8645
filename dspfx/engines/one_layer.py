"""A layer by itself as an ONNX file, between two thin ones, so that it runs as in a network.

Engines keep activations in layouts of their own, and convert them where a network begins and ends.
So the layer stands between one that makes its channels from a single one, and one that makes a
single channel of what it writes. What those two take is known from files without the layer.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dspfx.engines.engine import Precision
from dspfx.utils.arrays import IntArray

INPUT, OUTPUT = "x", "y"
_OPSET, _IR = 18, 9  # any that the engines know


@dataclass(frozen=True)
class OneLayer:
    """A convolution or linear layer, and what it is given.

    Attributes:
        filters, channels: of it.
        shape: of its input, without the channels: the batch, then positions.
        conv: the attributes of ONNX's Conv; None for a linear layer.
        structural_groups: of a convolution; a depthwise one has as many as channels.
        reads: of each of its groups of filters, which of the `channels` it gathers; none if all
            filters read all channels as they come.
    """

    filters: int
    channels: int
    shape: tuple[int, ...]
    conv: Mapping[str, Sequence[int]] | None
    structural_groups: int = 1
    reads: tuple[tuple[int, ...], ...] = ()

    def file(self, precision: Precision) -> bytes:
        """The ONNX file; of `"int8"` with pairs of QuantizeLinear and DequantizeLinear."""
        written = _Writer(self._point(), precision == "int8")
        x = written.layer(INPUT, 1, self.channels)
        if self.reads:
            shares = np.array_split(np.arange(self.filters), len(self.reads))
            parts = [
                written.layer(written.gathered(x, own), len(own), len(filters), self.conv)
                for own, filters in zip(self.reads, shares, strict=True)
            ]
            x = written.joined(parts)
        else:
            x = written.layer(x, self.channels, self.filters, self.conv, self.structural_groups)
        written.layer(x, self.filters, 1, output=OUTPUT)
        return written.file(self.input_shape())

    def around(self, precision: Precision) -> bytes:
        """The two thin layers alone, around the channels that it reads."""
        written = _Writer(self._point(), precision == "int8")
        written.layer(written.layer(INPUT, 1, self.channels), self.channels, 1, output=OUTPUT)
        return written.file(self.input_shape())

    def input_shape(self) -> tuple[int, ...]:
        """Of the file's input, which has a single channel."""
        batch, *positions = self.shape
        return (batch, *positions, 1) if self.conv is None else (batch, 1, *positions)

    def _point(self) -> tuple[int, ...] | None:
        """The taps of a thin layer: of a convolution, a single one."""
        return None if self.conv is None else (1,) * (len(self.shape) - 1)

    def after(self) -> "OneLayer":
        """One that reads what this one writes, for `around`."""
        batch, *positions = self.shape
        if self.conv is not None:
            pads = self.conv["pads"]
            padding = [a + b for a, b in zip(pads, pads[len(positions) :], strict=False)]
            taps = zip(self.conv["kernel_shape"], self.conv["dilations"], strict=True)
            reach = [dilation * (taps - 1) for taps, dilation in taps]
            free = [n + p - r - 1 for n, p, r in zip(positions, padding, reach, strict=True)]
            positions = [n // s + 1 for n, s in zip(free, self.conv["strides"], strict=True)]
        return OneLayer(self.filters, self.filters, (batch, *positions), self.conv)


@dataclass
class _Writer:
    """Writes a network of layers that follow each other; `point` see `OneLayer._point`."""

    point: tuple[int, ...] | None
    rounds: bool
    nodes: list[Any] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)

    def layer(
        self,
        x: str,
        channels: int,
        filters: int,
        conv: Mapping[str, Sequence[int]] | None = None,
        groups: int = 1,
        *,
        output: str | None = None,
    ) -> str:
        """What a layer makes of `x`; a convolution of single positions if it has no attributes."""
        given = self.rounded(x) if self.rounds else x
        if self.point is None:
            product = self.node("MatMul", given, self.weight((channels, filters), 1))
            return self.node("Add", product, self.tensor(np.zeros(filters, np.float32)), to=output)
        taps = self.point if conv is None else conv["kernel_shape"]
        weight = self.weight((filters, channels // groups, *taps), 0)
        bias = self.tensor(np.zeros(filters, np.float32))
        return self.node("Conv", given, weight, bias, to=output, group=groups, **(conv or {}))

    def gathered(self, x: str, channels: Sequence[int]) -> str:
        """The `channels` of `x`."""
        indices = self.tensor(np.array(channels, np.int64))
        given = self.rounded(x) if self.rounds else x
        return self.node("Gather", given, indices, axis=self._axis())

    def joined(self, parts: Sequence[str]) -> str:
        """All `parts` side by side."""
        return self.node("Concat", *parts, axis=self._axis()) if len(parts) > 1 else parts[0]

    def rounded(self, x: str) -> str:
        """`x` in integers of 8 bits and back."""
        how = self.tensor(np.array(0.02, np.float32)), self.tensor(np.array(128, np.uint8))
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, *how), *how)

    def weight(self, shape: tuple[int, ...], axis: int) -> str:
        """Random numbers, in integers of 8 bits if all are to be rounded."""
        generator = np.random.default_rng(0)
        if not self.rounds:
            scale = 1 / math.sqrt(math.prod(shape))
            return self.tensor(scale * generator.standard_normal(shape, dtype=np.float32))
        integers = self.tensor(generator.integers(-127, 128, shape, dtype=np.int8))
        scales = self.tensor(np.full(shape[axis], 0.01, np.float32))
        zeros = self.tensor(np.zeros(shape[axis], np.int8))
        return self.node("DequantizeLinear", integers, scales, zeros, axis=axis)

    def node(self, kind: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        """The name of what a node computes."""
        from onnx import helper  # noqa: PLC0415 (an optional package)

        name = to or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"n_{name}", **attributes))
        return name

    def tensor(self, value: IntArray | np.ndarray) -> str:
        """The name of a constant."""
        from onnx import numpy_helper  # noqa: PLC0415 (an optional package)

        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(value, name))
        return name

    def file(self, shape: tuple[int, ...]) -> bytes:
        """The network for an input of `shape`."""
        from onnx import TensorProto, helper  # noqa: PLC0415 (an optional package)

        x = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape)
        y = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [None] * len(shape))
        graph = helper.make_graph(self.nodes, "layer", [x], [y], self.tensors)
        opsets = [helper.make_opsetid("", _OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR)
        found: bytes = model.SerializeToString()
        return found

    def _axis(self) -> int:
        return -1 if self.point is None else 1
