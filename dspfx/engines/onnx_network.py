"""A network as an ONNX file in memory, and how a module's arguments and outputs become tensors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dspfx.engines.exported import as_onnx, exported
from dspfx.errors import ExportError
from dspfx.passes.sandbox.calls import Call, evaluate
from dspfx.utils.pytree import leaves, map_leaves, structure


@dataclass(frozen=True)
class OnnxNetwork:
    """An exported network.

    Attributes:
        file: the ONNX model.
        names: of its inputs, in order.
        fits: whether positional arguments are such as it was exported for, but for their shapes.
        outputs: what the module returned for the example.
    """

    file: bytes
    names: tuple[str, ...]
    fits: Callable[[tuple[Any, ...]], bool]
    outputs: Any

    @staticmethod
    def of(model: nn.Module, inputs: tuple[Any, ...]) -> "OnnxNetwork":
        """`model` exported with a batch that may change, if its code allows that.

        Raises:
            ExportError: it cannot be exported, or not as a function of its inputs alone.
        """
        flat, tensors = _OfTensors(model, inputs), _tensors(inputs)
        try:
            program = exported(flat, tensors, dynamic_batch=True)
        except ExportError:
            program = exported(flat, tensors, dynamic_batch=False)
        graph = as_onnx(program).model_proto
        outputs = evaluate(model, Call(inputs))
        names = tuple(value.name for value in graph.graph.input)
        counts = len(names), len(graph.graph.output)
        if counts != (len(tensors), len(_tensors(outputs))):
            raise ExportError("its inputs or outputs are others in ONNX than in torch")
        example = _kind(inputs)
        return OnnxNetwork(
            graph.SerializeToString(), names, lambda args: _kind(args) == example, outputs
        )

    def tensors(self, args: tuple[Any, ...]) -> list[Tensor] | None:
        """The tensors among `args`, in order; None if they are others than it was exported for."""
        if not self.fits(args):
            return None
        return [tensor.detach().contiguous() for tensor in _tensors(args)]

    def returned(self, computed: Sequence[Tensor]) -> Any:
        """What the module returns, of which `computed` are the tensors."""
        return _filled(self.outputs, computed)


class _OfTensors(nn.Module):
    """A module as a function of tensors that returns tensors; other arguments are the example's."""

    def __init__(self, model: nn.Module, example: tuple[Any, ...]) -> None:
        super().__init__()
        self.model = model
        self.example = example
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _tensors(self.model(*_filled(self.example, tensors)))


def _tensors(tree: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in leaves(tree) if isinstance(leaf, Tensor))


def _filled(tree: Any, tensors: Sequence[Tensor]) -> Any:
    """`tree` with `tensors` in place of its own, in order."""
    given: Iterator[Tensor] = iter(tensors)
    return map_leaves(lambda leaf: next(given) if isinstance(leaf, Tensor) else leaf, tree)


def _kind(args: tuple[Any, ...]) -> Any:
    """All of `args` but the shapes and values of tensors."""
    plain = [
        (Tensor, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else (type(leaf), leaf)
        for leaf in leaves(args)
    ]
    return structure(args), plain
