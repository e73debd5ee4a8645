"""OpenVINO, by its own package."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspfx.engines.engine import Precision
from dspfx.engines.on_files import OnFiles
from dspfx.engines.onnx_call import Run

MOST_SHAPES = 8  # for which a network is compiled by itself, which is faster than for any shape
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
_TYPES = {"f32": torch.float32, "f64": torch.float64, "i64": torch.int64, "i32": torch.int32}
_TYPES |= {"boolean": torch.bool, "u8": torch.uint8, "i8": torch.int8}


class OpenVino(OnFiles):
    """OpenVINO on the CPU."""

    name = "openvino"

    def precisions(self, device: torch.device) -> tuple[Precision, ...]:
        """bfloat16 where the processor has instructions for it."""
        import openvino  # noqa: PLC0415 (an optional package)

        known = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return ("fp32", "bf16", "int8") if "BF16" in known else ("fp32", "int8")

    def opened(self, file: bytes, names: Sequence[str], precision: Precision) -> Run:
        """The network, compiled when it is called."""
        return _Network(file, names, _HINTS[precision])


class _Network:
    """A network that is compiled for every shape by itself, up to a number of them."""

    def __init__(self, file: bytes, names: Sequence[str], hint: str) -> None:
        import openvino  # noqa: PLC0415 (an optional package)

        self._openvino: Any = openvino
        self._file, self._names = file, names
        self._core = openvino.Core()
        self._settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._compiled: dict[tuple[torch.Size, ...] | None, Any] = {}
        self._lock = threading.Lock()
        self._requests = threading.local()

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, in memory of their own."""
        shapes = tuple(tensor.shape for tensor in tensors)
        request = self._request(shapes)
        shared = self._openvino.Tensor
        for i, tensor in enumerate(tensors):
            request.set_input_tensor(i, shared(tensor.numpy(), shared_memory=True))
        outputs: list[Tensor | None] = []
        for i, port in enumerate(request.model_outputs):
            if port.partial_shape.is_dynamic:
                outputs.append(None)
                continue
            empty = torch.empty(list(port.shape), dtype=_TYPES[port.element_type.get_type_name()])
            request.set_output_tensor(i, shared(empty.numpy(), shared_memory=True))
            outputs.append(empty)
        request.infer()
        return [
            torch.from_numpy(request.get_output_tensor(i).data.copy()) if own is None else own
            for i, own in enumerate(outputs)
        ]

    def _request(self, shapes: tuple[torch.Size, ...]) -> Any:
        """This thread's own, of the network compiled for `shapes`, or for all of them."""
        compiled = self._compiled.get(shapes) or self._compile(shapes)
        requests: dict[int, Any] = self._requests.__dict__.setdefault("own", {})
        if id(compiled) not in requests:
            requests[id(compiled)] = compiled.create_infer_request()
        return requests[id(compiled)]

    def _compile(self, shapes: tuple[torch.Size, ...]) -> Any:
        with self._lock:
            own = None if len(self._compiled) >= MOST_SHAPES else shapes
            if own not in self._compiled:
                model = self._core.read_model(self._file)
                if own is not None:
                    model.reshape({n: list(s) for n, s in zip(self._names, own, strict=True)})
                self._compiled[own] = self._core.compile_model(model, "CPU", self._settings)
            return self._compiled[own]
