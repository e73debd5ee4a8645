"""A compact module as a program of `torch.export`, and that as an ONNX model of standard operators.

Files and the engines that read ONNX are made from the same program.
"""

import importlib.util
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dspfx.errors import ExportError, PrepareError
from dspfx.layers.group_conv import GroupConv2d
from dspfx.layers.group_conv_run import GroupConvRun
from dspfx.model.absent import Withheld, made_of_values, withholding
from dspfx.passes.sandbox.calls import Call, choose_inputs, evaluate
from dspfx.passes.transforms.verify import difference
from dspfx.utils.pytree import map_leaves

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram  # takes seconds to import

LARGEST_ONNX = 2**31  # bytes
BATCH = "batch"
_SIZES = {  # by the rank of a tensor and the dimension
    3: {2: "length"},
    4: {2: "height", 3: "width"},
    5: {2: "depth", 3: "height", 4: "width"},
}


def exported(
    model: nn.Module, example_inputs: Any, *, dynamic_batch: bool, dynamic_size: bool = False
) -> ExportedProgram:
    """`model` as a program of `torch.export`.

    Args:
        model: in evaluation mode; it is left as it is.
        example_inputs: a tensor, a tuple of positional inputs or a dict of inputs by name.
        dynamic_batch: the first dimension of all tensors may change.
        dynamic_size: all dimensions from the third on may.

    Raises:
        ExportError: it holds the own kernel, has no graph, or fixes its batch or its sizes.
    """
    _check_standard(model)
    try:
        call = choose_inputs(model, example_inputs, as_given=not dynamic_batch).call
    except PrepareError as error:
        raise ExportError(str(error)) from error
    call = call.map(_without_values)
    shapes = _dynamic_shapes(model, call, dynamic_batch, dynamic_size)
    with withholding(model) as withheld:
        program = _program(model, call, shapes)
        if first := tuple(withheld):
            withheld.clear()
            _check_withheld(model, call, shapes, withheld)
    if first:
        _check_calls(model, program, call, first, dynamic_batch, dynamic_size)
    return program


def _check_standard(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, GroupConv2d | GroupConvRun):
            raise ExportError(
                f"'{name}' runs on the project's own kernel, which no other program has; export "
                "the model that dspfx.convert returned, not the one that dspfx.compile chose"
            )


def _without_values(leaf: Any) -> Any:
    """A floating-point tensor of the same shape and type, without its values."""
    plain = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return torch.zeros_like(leaf) if plain else leaf


def _dynamic_shapes(model: nn.Module, call: Call, batch: bool, size: bool) -> dict[str, Any] | None:
    """For every argument by name, and every tensor in it, which dimensions may change, and how.

    The first one is the batch of all tensors; others are related as the model's code makes them.
    """
    if not (batch or size):
        return None
    named: dict[str, Any] = {}
    for name, value in call.by_name(model).items():
        named |= value if name.startswith("**") else {name.lstrip("*"): value}
    first = {0: torch.export.Dim(BATCH)} if batch else {}

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return None
        sizes = range(2, leaf.dim()) if size else ()
        return {**first, **dict.fromkeys(sizes, torch.export.Dim.DYNAMIC)}

    shapes: dict[str, Any] = map_leaves(of, named)
    return shapes


def _program(model: nn.Module, call: Call, shapes: dict[str, Any] | None) -> ExportedProgram:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # recurrent layers keep a list of their weights; torch restores it
            warnings.filterwarnings("ignore", "The tensor attributes .*_flat_weights")
            return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes)
    except Exception as error:  # torch raises many kinds, none of its own
        raise ExportError(
            f"torch.export cannot export {type(model).__name__}: {error}; if it fixes the size of "
            "its batch, pass dynamic_batch=False, if it fixes that of images, dynamic_size=False; "
            "if its code depends on the values of tensors, export the children that do not"
        ) from error


def _check_withheld(
    model: nn.Module, call: Call, shapes: dict[str, Any] | None, withheld: list[Withheld]
) -> None:
    """Trace `model` again, with what is withheld as further outputs, and see what it is made of."""

    def and_withheld(_: nn.Module, __: Any, outputs: Any) -> Any:
        return outputs, [each.value for each in withheld]

    hook = model.register_forward_hook(and_withheld)
    try:
        program = _program(model, call, shapes)
    finally:
        hook.remove()
    if depend := made_of_values(program, len(withheld)):
        raise _not_without(withheld[depend[0]], "which depends on the values of the inputs")


def _check_calls(
    model: nn.Module,
    program: ExportedProgram,
    call: Call,
    withheld: tuple[Withheld, ...],
    dynamic_batch: bool,
    dynamic_size: bool,
) -> None:
    """Run `model`, whose parts check that they are given nothing, and compare the program."""
    if dynamic_size:
        raise _not_without(withheld[0], "which may depend on their sizes (dynamic_size=False)")
    calls = [call, call.map(_one_more)] if dynamic_batch else [call]
    for tried in calls:
        try:
            expected = evaluate(model, tried)
        except Exception as error:
            raise _not_without(withheld[0], f"outside a trace, too ({error})") from error
        with torch.no_grad():
            actual = program.module()(*tried.args, **tried.kwargs)
        if difference(expected, actual) is None:
            raise _not_without(withheld[0], "without which the outputs are others")


def _one_more(leaf: Any) -> Any:
    batched = isinstance(leaf, Tensor) and leaf.dim() > 0
    return torch.cat([leaf, leaf[:1]]) if batched else leaf


def _not_without(withheld: Withheld, why: str) -> ExportError:
    return ExportError(
        f"while it is traced, the model gives its part '{withheld.part}' a tensor for "
        f"'{withheld.argument}', {why}; the part was prepared without any. Prepare the model with "
        "an example for which it gives one, such as a mask that masks something, or leave the "
        "input that it is made of out of example_inputs"
    )


def as_onnx(program: ExportedProgram) -> "ONNXProgram":
    """`program` as an ONNX model of the `ai.onnx` domain alone, its dimensions named.

    Raises:
        ExportError: a package is missing, torch cannot write an operator, one file cannot hold
            the weights, or the model writes into its buffers or inputs.
    """
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise ExportError(f"ONNX files need {' and '.join(missing)}: pip install 'dspfx[deploy]'")
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > LARGEST_ONNX:
        raise ExportError(f"one ONNX file holds 2 GiB, the model has {size:,} bytes")
    try:
        model = torch.onnx.export(program, dynamo=True, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"the ONNX exporter of torch cannot export it: {error}") from error
    assert model is not None
    _check_a_function(model.exported_program)
    model.rename_axes(_names_of_axes(model.model.graph.inputs))
    foreign = {node.domain for node in model.model.graph.all_nodes()} - {"", "ai.onnx"}
    if foreign or model.model.functions:
        raise ExportError(f"the model has operators that are not standard, of {foreign}")
    return model


def _check_a_function(program: ExportedProgram | None) -> None:
    """Refuse what does more than returning outputs, which a file would leave out."""
    assert program is not None
    signature = program.graph_signature
    if written := sorted({*signature.buffers_to_mutate.values()}):
        raise ExportError(
            f"the model writes into its buffer '{written[0]}' when it is called, which an ONNX "
            "file does not keep; call it in torch"
        )
    if signature.user_inputs_to_mutate:
        raise ExportError("the model overwrites its inputs, which an ONNX file does not")


def _names_of_axes(inputs: Iterable[Any]) -> dict[Any, str]:
    """Names for the dimensions of `inputs` that may change, by those that the exporter gave."""
    names: dict[Any, str] = {}
    for given in inputs:
        shape = list(given.shape or ())
        for dim, axis in enumerate(shape):
            if isinstance(axis, int) or str(axis) in names:
                continue
            plain = BATCH if dim == 0 else _SIZES.get(len(shape), {}).get(dim, f"size_{dim}")
            taken = plain != BATCH and plain in names.values()
            names[str(axis)] = f"{given.name}_{plain}" if taken else plain
    return names
