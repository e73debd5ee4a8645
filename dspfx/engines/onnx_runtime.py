"""ONNX Runtime, by its own package."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspfx.engines.child import runs_in_a_child
from dspfx.engines.engine import Executable, Precision
from dspfx.engines.form import Form
from dspfx.engines.on_files import OnFiles
from dspfx.engines.onnx_call import TOLERANCE, OnnxCall, check_float32


class OnnxRuntime(OnFiles):
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"

    def precisions(self, device: torch.device) -> tuple[Precision, ...]:
        """It has no bfloat16 on x86 CPUs."""
        return ("fp32", "int8")

    def load(self, form: Form, precision: Precision) -> Executable:
        """Open a session, in a process of its own first."""
        import onnxruntime  # noqa: PLC0415 (an optional package)

        check_float32(form.model)
        network, threads = form.onnx, torch.get_num_threads()
        runs_in_a_child(self.name, network, form.inputs)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(
            network.file, options, providers=["CPUExecutionProvider"]
        )

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            feed = {n: t.numpy() for n, t in zip(network.names, tensors, strict=True)}
            outputs: list[Any] = session.run(None, feed)
            return [torch.from_numpy(output) for output in outputs]

        return OnnxCall(form.model, network, run, TOLERANCE[precision])
