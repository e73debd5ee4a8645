"""`compile`: a model and the shapes it will see, to a fast callable.

1. The network is loaded in every engine that is there: the project's own kernel, inductor, ONNX
   Runtime and OpenVINO; as it was converted, with every layer dense, and where the own kernel
   cannot compute some layer also with each layer in its fastest form.
2. Each is compared with the model, and timed as a whole, since changes of layout between layers
   cost time as well. The fastest is returned, so that none is slower than dense.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dspfx.engines.engine import Engine, Precision
from dspfx.engines.engines import engines_named
from dspfx.engines.form import AS_CONVERTED, DENSE, Form
from dspfx.engines.forms import Forms, forms_of
from dspfx.engines.race import Entry, Race
from dspfx.engines.report import Candidate, CompileReport
from dspfx.errors import CompileError
from dspfx.layers.group_conv_run import GroupConvRun
from dspfx.model.deployable import check_deployable
from dspfx.model.parts import compact_parts_of
from dspfx.passes.sandbox.calls import (
    Call,
    as_inputs,
    check_accepted,
    fresh,
    parameter_dtype_and_device,
)
from dspfx.quantization.quantize import quantize
from dspfx.utils.pytree import leaves, map_leaves

AGREEMENT = 0.99
EXACT = 1e-3  # the largest relative difference of a candidate in the model's own precision


class Compiled:
    """A model compiled for inference; called with the model's positional arguments.

    Attributes:
        model: what was compiled, in the form that was chosen.
        report: what was measured and chosen.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> compact = dspfx.convert(prepared)
        >>> fast = dspfx.compile(compact, x, engines=["inductor"])
        >>> fast(x).shape  # without gradients, from any thread
        torch.Size([2, 4, 8, 8])
    """

    def __init__(self, entry: Entry, report: CompileReport) -> None:
        self.model = entry.form.model
        self.report = report
        self._call = entry.call

    def __call__(self, *args: Any) -> Any:
        """The model's outputs, computed without gradients."""
        return self._call(*args)


def compile(
    model: nn.Module,
    example_inputs: Any,
    *,
    engines: Sequence[str] | None = None,
    precision: Precision | Literal["auto"] = "fp32",
    batches: Iterable[Any] | None = None,
    agreement: float = AGREEMENT,
) -> Compiled:
    """Compile an evaluation-mode model for inference in the fastest engine.

    What is fastest is measured, on the device of the example inputs and with the current number of
    threads. Times of layers are remembered on disk, in the folder that the environment variable
    `DSPFX_CACHE_DIR` names, else in the user's cache. An engine that is not installed, refuses the
    model or crashes costs a line in the report.

    Args:
        model: a compact module, or any module in evaluation mode; it is left as it is.
        example_inputs: a tensor, or a tuple of positional inputs. The callable takes other shapes
            as well, as far as the model does; it was chosen for these.
        engines: the names of those that may be used, of `"own"`, `"inductor"`, `"onnxruntime"` and
            `"openvino"`; all that are there if left out.
        precision: `"fp32"`, as the model is; `"bf16"`, products in bfloat16; `"int8"`, of the model
            quantised by `dspfx.quantize`; or `"auto"`, the fastest of these that agrees with the
            model. A model that is quantised already is computed as such.
        batches: for `"int8"` and `"auto"`, inputs for which it is quantised, and on which the
            candidates are compared with the model: tensors, or tuples of positional inputs, of any
            number of samples.
        agreement: for `"auto"`, the least share of decisions that have to be the model's, such as
            of the classes of all samples of `batches`.

    Returns:
        A callable with the model's positional arguments; `print(compiled.report)` shows what was
        measured and chosen, and the agreement and the largest difference of every candidate.

    Raises:
        CompileError: the model is not converted, is in training mode, does not accept the example
            inputs or the batches; or no engine can run it, or none at this precision.
        QuantizeError: it cannot be quantised, or not by such batches.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> report = dspfx.prune_channels(prepared, dspfx.Budget(macs=0.5))
        >>> compact = dspfx.convert(prepared)
        >>> fast = dspfx.compile(compact, x)
        >>> bool(torch.allclose(fast(x), compact(x), atol=1e-4))
        True
    """
    named = engines_named(engines)
    precisions = _precisions(precision)
    inputs = fresh(as_inputs(example_inputs))
    check_deployable(model, "compile", CompileError)
    expected = check_accepted(model, Call(inputs), CompileError)
    given = None if batches is None else [as_inputs(batch) for batch in batches]
    samples = [(fresh(inputs), expected)] if given is None else _samples(model, inputs, given)
    _, device = parameter_dtype_and_device(model)
    missing = {engine.name: why for engine in named if (why := engine.missing(device))}
    there = [engine for engine in named if engine.name not in missing]
    found = forms_of(model, inputs)
    forms = _at_precisions(model, found, precisions, given)
    if precision == "int8" and given is not None:
        _ = forms["int8"][0].model  # what is wrong with the batches is said here

    def accepts(candidate: Candidate) -> bool:
        if candidate.precision == "fp32":
            return (candidate.difference or 0.0) <= EXACT
        return precision != "auto" or (candidate.agreement or 0.0) >= agreement

    race = Race(inputs, samples, accepts)
    candidates, best = race.run(_starters(there, forms, device))
    if best is None:
        raise CompileError(_nobody(candidates, missing, precision))
    runs = [module for module in best.form.model.modules() if isinstance(module, GroupConvRun)]
    winograd = tuple(name for run in runs for name in run.by_winograd())
    report = CompileReport(
        tuple(candidates), best.candidate, tuple(found.choices), winograd, missing
    )
    return Compiled(best, report)


def _precisions(asked: str) -> tuple[Precision, ...]:
    if asked not in (*get_args(Precision), "auto"):
        raise CompileError(f"precision={asked!r} is none of fp32, bf16, int8, auto")
    return get_args(Precision) if asked == "auto" else (asked,)


def _at_precisions(
    model: nn.Module,
    found: Forms,
    precisions: Sequence[Precision],
    batches: list[tuple[Any, ...]] | None,
) -> dict[Precision, Sequence[Form]]:
    """The forms that take part, by the precision in which they are computed."""
    if any(part.quantization is not None for _, part in compact_parts_of(model)):
        return {"int8": found.all[:1]}
    forms: dict[Precision, Sequence[Form]] = dict.fromkeys(precisions, found.all)
    if "bf16" in forms:
        forms["bf16"] = found.in_bf16
    if "int8" in forms:
        if batches is None:
            raise CompileError("int8 has to be calibrated: give batches=, some inputs")
        ordinary = [form for form in found.all if form.name in (AS_CONVERTED, DENSE)]
        forms["int8"] = [
            Form(form.name, partial(_quantised, form, batches), form.inputs) for form in ordinary
        ]
    return forms


def _quantised(form: Form, batches: list[tuple[Any, ...]]) -> nn.Module:
    return quantize(form.model, batches)


def _starters(
    engines: Sequence[Engine], forms: Mapping[Precision, Sequence[Form]], device: torch.device
) -> Iterator[tuple[Engine, Form, Precision]]:
    """Who takes part, those that load quickly first."""
    for engine in engines:
        for precision, own in forms.items():
            if precision in engine.precisions(device):
                yield from ((engine, form, precision) for form in own if engine.takes(form))


def _samples(
    model: nn.Module, inputs: tuple[Any, ...], batches: list[tuple[Any, ...]]
) -> list[tuple[tuple[Any, ...], Any]]:
    """`batches` cut into the size of `inputs`, for which engines were loaded, and the outputs.

    Raises:
        CompileError: they hold fewer samples, or `model` does not accept them.
    """
    size, cut = _length(inputs), []
    if batches:
        columns = zip(*map(leaves, batches), strict=True)
        together = map_leaves(lambda _: _joined(next(columns)), batches[0])
        starts = range(0, _length(together) - size + 1, size)
        cut = [map_leaves(_rows(slice(start, start + size)), together) for start in starts]
    if not cut:
        raise CompileError(f"batches= holds fewer than the {size} samples that the example has")
    return [(own, check_accepted(model, Call(own), CompileError)) for own in cut]


def _joined(column: tuple[Any, ...]) -> Any:
    first = column[0]
    return torch.cat(column) if isinstance(first, Tensor) and first.dim() else first


def _length(inputs: tuple[Any, ...]) -> int:
    """The length of the first tensor; 1 without any."""
    tensors = (leaf for leaf in leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim())
    return next((len(tensor) for tensor in tensors), 1)


def _rows(rows: slice) -> Any:
    return lambda leaf: leaf[rows] if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _nobody(candidates: Sequence[Candidate], missing: dict[str, str], precision: str) -> str:
    """Why there is nothing to return."""
    lines = [f"  {name}: {why}" for name, why in missing.items()]
    lines += [f"  {candidate}: {candidate.note}" for candidate in candidates]
    if not lines:
        return f'no engine that may be used computes in precision="{precision}" here'
    what = "\n".join(lines)
    return f"no engine runs the model; call it as it is, or export it for another runtime:\n{what}"
