"""ONNX Runtime and OpenVINO on an exported model, and what they have made of it."""

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from small import X
from torch import nn

import dspfx


def runtimes(model: nn.Module, path: Path, dynamic_size: bool = True) -> dict[str, Any]:
    """Callables that run the exported model elsewhere, and where its convolutions are computed."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    dspfx.export(model, X, path / "m.onnx", dynamic_size=dynamic_size)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path / "optimized.onnx")
    options.log_severity_level = 3
    session = ort.InferenceSession(path / "m.onnx", options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(path / "optimized.onnx").graph.node
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path / "m.onnx", "CPU", settings)
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    said = [
        {key: info[key].astype(str) for key in ("layerType", "runtimePrecision")} for info in infos
    ]
    return {
        "onnxruntime": lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]),
        "openvino": lambda x: torch.from_numpy(compiled({"x": x.numpy()})[0]),
        "onnxruntime's": collections.Counter(node.op_type for node in optimized),
        "openvino's": collections.Counter(tuple(each.values()) for each in said),
    }
