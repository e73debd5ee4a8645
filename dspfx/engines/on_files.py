"""What engines have in common that read ONNX, by a package of their own name, on CPUs."""

import torch

from dspfx.engines.child import missing_package
from dspfx.engines.form import Form


class OnFiles:
    """An engine that reads ONNX.

    Attributes:
        name: of it and its package.
    """

    name: str
    slow_to_load = False

    def missing(self, device: torch.device) -> str:
        """Its package, or a CPU."""
        return "computes on CPUs only" if device.type != "cpu" else missing_package(self.name)

    def takes(self, form: Form) -> bool:
        """All forms of ordinary layers."""
        return not form.native
