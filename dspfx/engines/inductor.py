"""The compiler of torch, and the project's own kernel, whose network it compiles as well."""

import torch

from dspfx.engines.engine import Executable, Precision
from dspfx.engines.form import NATIVE, Form
from dspfx.engines.torch_call import TorchCall
from dspfx.errors import CompileError
from dspfx.layers import native


class Inductor:
    """`torch.compile`, the weights frozen into the code on a CPU."""

    name = "inductor"
    slow_to_load = True
    multiple = 8

    def missing(self, device: torch.device) -> str:
        """Never."""
        return ""

    def precisions(self, device: torch.device) -> tuple[Precision, ...]:
        """bfloat16 where there are instructions for it."""
        if device.type == "cuda":
            return ("fp32", "bf16") if torch.cuda.is_bf16_supported() else ("fp32",)
        fast = device.type == "cpu" and (
            torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        )
        return ("fp32", "bf16") if fast else ("fp32",)

    def takes(self, form: Form) -> bool:
        """All but those of the own kernel."""
        return not form.native

    def load(self, form: Form, precision: Precision) -> Executable:
        """Compile `form`; its weights stay parameters where torch cannot freeze them."""
        return compiled(form, bf16=precision == "bf16")


class OwnKernel:
    """The project's kernel for the convolutions that it can compute, and torch for the rest."""

    name = "own"
    slow_to_load = False
    multiple = 1

    def missing(self, device: torch.device) -> str:
        """It is for CPUs, and has to be built."""
        if device.type != "cpu":
            return "computes on CPUs only"
        return "" if native.built() else "could not be built: is there a C++ compiler?"

    def precisions(self, device: torch.device) -> tuple[Precision, ...]:
        """bfloat16 where there are instructions for it."""
        return ("fp32", "bf16") if native.multiplies_bf16() else ("fp32",)

    def takes(self, form: Form) -> bool:
        """Those that are made for it."""
        return form.native

    def load(self, form: Form, precision: Precision) -> Executable:
        """Compile what lies between its runs, unless the form is to be called as it is.

        The runs of a form are in one precision: for bfloat16 it is one of `Forms.in_bf16`.
        """
        bf16 = precision == "bf16"
        if form.name == NATIVE:
            return compiled(form, bf16=bf16)
        return TorchCall(form.model, inductor=False, bf16=bf16)


def compiled(form: Form, *, bf16: bool = False) -> TorchCall:
    """`form` compiled by torch and called once.

    Raises:
        CompileError: torch cannot compile it.
    """
    failure: RuntimeError | None = None
    for freeze in (True, False):
        call = TorchCall(form.model, freeze=freeze, bf16=bf16)
        try:
            call(*form.inputs)
        except RuntimeError as error:
            failure = error
        else:
            return call
    raise CompileError(
        f"torch.compile cannot compile {type(form.model).__name__}: {failure}; call the model as "
        "it is, or export it for another runtime"
    ) from failure
