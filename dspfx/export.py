"""`export`: a compact model to a file that other programs run.

The layers of a compact model are ordinary ones, whatever groups they have, so that what is written
consists of standard operators: an ONNX model of the `ai.onnx` domain alone, a program of
`torch.export`, or a package of machine code by AOTInductor.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.export import ExportedProgram

from dspfx.engines.exported import as_onnx, exported
from dspfx.errors import ExportError
from dspfx.model.deployable import check_deployable
from dspfx.utils.atomic_write import replacing

Format = Literal["onnx", "export", "aoti"]
SUFFIXES: Mapping[str, Format] = {".onnx": "onnx", ".aoti.pt2": "aoti", ".pt2": "export"}


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
    check_deployable(model, "export", ExportError)
    program = exported(
        model, example_inputs, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size
    )
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


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    as_onnx(program).save(path, external_data=False)


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
