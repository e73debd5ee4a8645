"""ONNX Runtime, by its own package."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspfx.engines.child import missing_package, runs_in_a_child
from dspfx.engines.engine import Executable, Precision
from dspfx.engines.form import NATIVE, NATIVE_ALONE, Form
from dspfx.engines.onnx_call import TOLERANCE, OnnxCall, check_float32


class OnnxRuntime:
    """ONNX Runtime on the CPU."""

    name = "onnxruntime"
    slow_to_load = False

    def missing(self, device: torch.device) -> str:
        """Its package, or a CPU."""
        return "computes on CPUs only" if device.type != "cpu" else missing_package("onnxruntime")

    def precisions(self, device: torch.device) -> tuple[Precision, ...]:
        """It has no bfloat16 on x86 CPUs."""
        return ("fp32", "int8")

    def takes(self, form: Form) -> bool:
        """All of ordinary layers."""
        return form.name not in (NATIVE, NATIVE_ALONE)

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
