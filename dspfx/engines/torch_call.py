"""A call of a module in torch: compiled by inductor with frozen weights, or as it is."""

import threading
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.passes.lowering.measure import can_be_packed
from dspfx.utils.pytree import map_leaves
from dspfx.utils.torch_warnings import without_cuda_home

_COMPILING = threading.Lock()  # torch's settings are those of the process


class TorchCall:
    """Computes what `model` does, by torch; compiled at the first call with inputs of new shapes.

    Args:
        model: in evaluation mode.
        inductor: compile it; else it is called as it is.
        freeze: make its weights constants of the compiled code, on a CPU.
        bf16: compute products in bfloat16 where torch's autocast says so; inputs and outputs stay.
    """

    def __init__(
        self, model: nn.Module, *, inductor: bool = True, freeze: bool = True, bf16: bool = False
    ) -> None:
        without_cuda_home()
        self.model = model
        self._bf16 = bf16
        # its weights are frozen: only what is new in the inputs needs a look
        guards: Any = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        self._call: Callable[..., Any] = model
        if inductor:
            self._call = torch.compile(_with_code_of_its_own(model), options=guards)
        tensors = (*model.parameters(), *model.buffers())
        self._device = tensors[0].device if tensors else torch.device("cpu")
        on_cpu = all(buffer.device.type == "cpu" for buffer in model.buffers())
        freezing = freeze and on_cpu and can_be_packed(model.parameters())
        self._settings = {"freezing": freezing}
        self._met: set[tuple[object, ...]] = set()

    def __call__(self, *args: Any) -> Any:
        """The module's outputs, without gradients."""
        shapes = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else None for x in args)
        with torch.no_grad(), self._precision():
            if shapes in self._met:
                return self._returned(self._call(*args))
            with _COMPILING:  # one thread compiles, those that wait for the same find it done
                # options of torch.compile come too late: dynamo asks for them before inductor
                with torch._inductor.config.patch(self._settings):
                    result = self._call(*args)
                self._met.add(shapes)
            return self._returned(result)

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self._device.type, torch.bfloat16) if self._bf16 else nullcontext()

    def _returned(self, outputs: Any) -> Any:
        return map_leaves(_in_float32, outputs) if self._bf16 else outputs


def _in_float32(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 else leaf


def _with_code_of_its_own(model: nn.Module) -> Callable[..., Any]:
    """A function that calls `model`, and whose code object nobody else has.

    Torch keeps what it compiled with the code object of a function, and all modules of a class
    share theirs: without guards on modules, one would be taken for the other.
    """

    def call(*args: Any) -> Any:
        return model(*args)

    return types.FunctionType(
        call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__
    )
