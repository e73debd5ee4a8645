"""A call of a network in an engine that reads ONNX: proved at every new shape, or the module's."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.engines.agreement import worst_difference
from dspfx.engines.onnx_network import OnnxNetwork
from dspfx.engines.torch_call import TorchCall
from dspfx.errors import CompileError

# of an engine from the module, relative to an output's largest value; quantised values may fall on
# either side of a step
TOLERANCE = {"fp32": 1e-3, "bf16": 0.2, "int8": 0.2}
Run = Callable[[Sequence[Tensor]], list[Tensor]]


class OnnxCall:
    """Computes what `model` does by `run`.

    At the first call with tensors of new shapes both are computed and compared. Where `run` fails
    or differs, and where the arguments are others than were exported, `model` is called, compiled
    by torch.

    Args:
        model: the module.
        network: it, exported.
        run: the tensors among the outputs from those among the arguments.
        tolerance: the largest difference allowed, relative to the largest value of the output.
    """

    def __init__(self, model: nn.Module, network: OnnxNetwork, run: Run, tolerance: float) -> None:
        self.model = model
        self._network = network
        self._run = run
        self._tolerance = tolerance
        self._proved: dict[tuple[torch.Size, ...], bool] = {}
        self._lock = threading.Lock()
        self._otherwise = TorchCall(model)

    def __call__(self, *args: Any) -> Any:
        """The module's outputs, without gradients."""
        tensors = self._network.tensors(args)
        if tensors is None:
            return self._otherwise(*args)
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._proved:
            self.why_not(*args)
        if not self._proved[shapes]:
            return self._otherwise(*args)
        return self._network.returned(self._run(tensors))

    def unproved(self, *args: Any) -> Any:
        """What `run` computes, whatever that is, for arguments as they were exported for."""
        tensors = self._network.tensors(args)
        assert tensors is not None
        return self._network.returned(self._run(tensors))

    def why_not(self, *args: Any) -> str:
        """Why `run` does not serve such arguments; empty if it does."""
        tensors = self._network.tensors(args)
        assert tensors is not None
        shapes = tuple(tensor.shape for tensor in tensors)
        with self._lock:
            why = self._compare(tensors, args)
            self._proved[shapes] = not why
        return why

    def _compare(self, tensors: Sequence[Tensor], args: tuple[Any, ...]) -> str:
        with torch.no_grad():
            expected = self.model(*args)
        try:
            found = self._network.returned(self._run(tensors))
            worst = worst_difference(expected, found)
        except Exception as error:  # of somebody else's runtime
            return first_line(error)
        return "" if worst <= self._tolerance else f"its outputs differ by {worst:.1e}"


def check_float32(model: nn.Module) -> None:
    """Refuse a module whose own precision is another one.

    Raises:
        CompileError: it is.
    """
    types = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    if types - {torch.float32}:
        raise CompileError("computes in float32; the model does not")


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return said[0] if said else type(error).__name__
