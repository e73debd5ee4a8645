"""What engines have in common that read ONNX, by a package of their own name, on CPUs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import metadata

import torch

from dspfx.engines.child import missing_package, runs_in_a_child
from dspfx.engines.engine import Precision
from dspfx.engines.form import Form
from dspfx.engines.onnx_call import TOLERANCE, OnnxCall, Run, check_float32


class OnFiles(ABC):
    """An engine that reads ONNX.

    Attributes:
        name: of it and its package.
    """

    name: str
    slow_to_load = False

    @property
    def multiple(self) -> int:
        """Of channels, as many as a register of the processor holds in float32."""
        wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        return 16 if wide else 8

    def version(self) -> str:
        """Its name, and the version of its package."""
        return f"{self.name} {metadata.version(self.name)}"

    def missing(self, device: torch.device) -> str:
        """Its package, or a CPU."""
        return "computes on CPUs only" if device.type != "cpu" else missing_package(self.name)

    def takes(self, form: Form) -> bool:
        """All forms of ordinary layers."""
        return not form.native

    def load(self, form: Form, precision: Precision) -> OnnxCall:
        """Open the network, in a process of its own first."""
        check_float32(form.model)
        network = form.onnx
        runs_in_a_child(self.name, network, form.inputs)
        run = self.opened(network.file, network.names, precision)
        return OnnxCall(form.model, network, run, TOLERANCE[precision])

    @abstractmethod
    def opened(self, file: bytes, names: Sequence[str], precision: Precision) -> Run:
        """What computes the network in `file`, whose inputs have such `names`."""
