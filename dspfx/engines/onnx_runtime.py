"""ONNX Runtime, by its own package."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspfx.engines.engine import Precision
from dspfx.engines.on_files import OnFiles
from dspfx.engines.onnx_call import Run


class OnnxRuntime(OnFiles):
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"

    def precisions(self, device: torch.device) -> tuple[Precision, ...]:
        """It has no bfloat16 on x86 CPUs."""
        return ("fp32", "int8")

    def opened(self, file: bytes, names: Sequence[str], precision: Precision) -> Run:
        """A session."""
        import onnxruntime  # noqa: PLC0415 (an optional package)

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            feed = {n: t.numpy() for n, t in zip(names, tensors, strict=True)}
            outputs: list[Any] = session.run(None, feed)
            return [torch.from_numpy(output) for output in outputs]

        return run
