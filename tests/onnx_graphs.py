"""What an ONNX file costs, counted from its graph alone."""

import math
from pathlib import Path

import onnx


def macs_of(path: Path) -> int:
    """The multiply-accumulates of all convolutions and matrix products for one sample."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    shapes = {v.name: [d.dim_value or 1 for d in v.type.tensor_type.shape.dim] for v in values}
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    found = 0
    for node in graph.node:
        if node.op_type == "Conv":  # weights are [out, in / groups, *kernel]
            per_output = math.prod(shapes[node.input[1]][1:])
        elif node.op_type in ("Gemm", "MatMul"):
            per_output = shapes[node.input[0]][-1]
        else:
            assert node.op_type not in ("ConvTranspose", "Einsum", "LSTM", "GRU", "RNN")
            continue
        found += math.prod(shapes[node.output[0]]) * per_output
    return found


def parameters_of(path: Path) -> int:
    """How many numbers of floating point the file holds."""
    graph = onnx.load(path).graph
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
    return sum(math.prod(t.dims) for t in graph.initializer if t.data_type in kinds)
