"""`export`: a compact model to a file that other programs run.

The layers of a compact model are ordinary ones, whatever groups they have, so that what is written
consists of standard operators: an ONNX model of the `ai.onnx` domain alone, a program of
`torch.export`, or a package of machine code by AOTInductor.
"""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from dspfx.errors import ExportError, PrepareError
from dspfx.layers.group_conv import GroupConv2d, GroupConvRun
from dspfx.model.absent import Withheld, made_of_values, withholding
from dspfx.model.deployable import check_deployable
from dspfx.passes.sandbox.calls import Call, choose_inputs, evaluate
from dspfx.passes.transforms.verify import difference
from dspfx.utils.atomic_write import replacing
from dspfx.utils.pytree import map_leaves

Format = Literal["onnx", "export", "aoti"]
SUFFIXES: Mapping[str, Format] = {".onnx": "onnx", ".aoti.pt2": "aoti", ".pt2": "export"}
LARGEST_ONNX = 2**31  # bytes
BATCH = "batch"
_SIZES = {  # by the rank of a tensor and the dimension
    3: {2: "length"},
    4: {2: "height", 3: "width"},
    5: {2: "depth", 3: "height", 4: "width"},
}


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
) -> None:
    """Write `model` to a file that runs without dspfx and without the Python code of the model.

    Args:
        model: from `dspfx.convert`, or any other module in evaluation mode; it is left as it is.
        example_inputs: a tensor, a tuple of positional inputs or a dict of inputs by name. Their
            shapes and types are the model's, apart from the batch; their values do not matter and
            are not stored.
        path: of the file, which is replaced in one step when all is written.
        format: `"onnx"`, one file for ONNX Runtime, OpenVINO and others, of standard operators;
            `"export"`, for `torch.export.load`; `"aoti"`, machine code for the processor or GPU
            that the model is on, for `torch._inductor.aoti_load_package` in Python and
            `AOTIModelPackageLoader` in C++. If left out, the suffix of `path` says it: `.onnx`,
            `.pt2` or `.aoti.pt2`.
        dynamic_batch: the first dimension of all tensors is one that may change.
        dynamic_size: all dimensions from the third on, such as height and width, may change, as
            far as the model's code lets them.

    Raises:
        ExportError: the model is not converted, is in training mode, holds the own kernel that
            `dspfx.compile` puts in, has no graph, or fixes its batch or its sizes; the suffix of
            `path` is another; a package is missing; or the file cannot be written. There is no
            file then.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> compact = dspfx.convert(prepared)
        >>> dspfx.export(compact, x, Path(folder) / "small.pt2")
        >>> program = torch.export.load(Path(folder) / "small.pt2")
        >>> bool(torch.allclose(program.module()(x), compact(x)))
        True
    """
    path = Path(path)
    write = _WRITERS[_format(path, format)]
    _check(model)
    try:
        call = choose_inputs(model, example_inputs).call.map(_without_values)
    except PrepareError as error:
        raise ExportError(str(error)) from error
    shapes = _dynamic_shapes(model, call, dynamic_batch, dynamic_size)
    with withholding(model) as withheld:
        program = _program(model, call, shapes)
        if first := tuple(withheld):
            withheld.clear()
            _check_withheld(model, call, shapes, withheld)
    if first:
        _check_calls(model, program, call, first, dynamic_batch, dynamic_size)
    with replacing(path, ExportError) as temporary:
        write(program, temporary)


def _format(path: Path, given: str | None) -> Format:
    if given is None:
        found = next((f for suffix, f in SUFFIXES.items() if path.name.endswith(suffix)), None)
        if found is None:
            raise ExportError(
                f"the suffix of {path.name} does not say in which format; those that do are "
                f"{', '.join(SUFFIXES)}, or pass format="
            )
        return found
    if given not in get_args(Format):
        raise ExportError(f"format={given!r} is none of {', '.join(get_args(Format))}")
    if given != "onnx" and path.suffix != ".pt2":
        raise ExportError(f"{path.name} has to end with .pt2 for format={given!r}")
    return given  # type: ignore[return-value]


def _check(model: nn.Module) -> None:
    check_deployable(model, "export", ExportError)
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


def _write_onnx(program: ExportedProgram, path: Path) -> None:
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
    model.rename_axes(_names_of_axes(model.model.graph.inputs))
    foreign = {node.domain for node in model.model.graph.all_nodes()} - {"", "ai.onnx"}
    if foreign or model.model.functions:
        raise ExportError(f"the model has operators that are not standard, of {foreign}")
    model.save(path, external_data=False)


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


def _write_program(program: ExportedProgram, path: Path) -> None:
    try:
        torch.export.save(program, path)
    except NotImplementedError as error:
        raise ExportError(
            f"torch.export cannot write what the model returns: {error}; register the class, or "
            "return a tuple or a dict"
        ) from error


def _write_package(program: ExportedProgram, path: Path) -> None:
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # of the compiler, of inductor or of the file system
        raise ExportError(f"AOTInductor cannot compile it: {error}") from error


_WRITERS: Mapping[Format, Callable[[ExportedProgram, Path], None]] = {
    "onnx": _write_onnx,
    "export": _write_program,
    "aoti": _write_package,
}
