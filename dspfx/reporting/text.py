"""A `Report` as text, no wider than a terminal."""

import textwrap
from collections.abc import Sequence

from tabulate import tabulate

from dspfx.passes.transforms.summary import LayerSummary
from dspfx.reporting.data import ReportData
from dspfx.utils.formatting import change, mebibytes, share, short, shortened

WIDTH = 100
GAP = 2  # between the columns of a table
INPUTS, COUPLED, REASON = 26, 19, 30


def text_of(report: ReportData) -> str:
    """The table of layers, what could be pruned if the model is prepared, totals and reasons."""
    totals = tabulate(
        totals_of(report),
        ("", "before", "after", "kept"),
        disable_numparse=True,
        colalign=("left", "right", "right", "right"),
    )
    lines = [f"kept at full width: {declined}" for declined in report.declined]
    lines += report.notes
    return "\n".join(
        [
            *(_layers(report), ""),
            *((_possible(report), "") if report.prepared else ()),
            totals,
            *(() if report.prepared else (f"gathers left: {report.gathers}",)),
            *map(_wrapped, lines),
        ]
    )


def totals_of(report: ReportData) -> list[tuple[str, str, str, str]]:
    """What is counted, before, after and kept, in the usual units."""
    before, after = report.before, report.after
    sizes = mebibytes(report.bytes_of(before)), mebibytes(report.bytes_of(after))
    rows = [
        ("whole model, MACs", *_row(before.macs, after.macs)),
        ("whole model, parameters", *_row(before.parameters, after.parameters)),
        (
            f"whole model, size in {report.dtype}",
            *sizes,
            share(after.parameters, before.parameters),
        ),
        ("gated layers only, MACs", *_row(report.gated_before.macs, report.gated_after.macs)),
    ]
    if not report.prepared:
        rows.append(("whole model, MACs as emitted", *_row(before.macs, report.emitted.macs)))
    return rows


def reasons(layer: LayerSummary, *, in_full: bool = True) -> str:
    """Why a layer has no gate, and what keeps its filters in place, or just the node that does."""
    found = [layer.why_not] if layer.why_not else []
    if layer.pin is not None:
        found.append(f"filters stay: {layer.pin if in_full else layer.pin.node}")
    return "; ".join(found)


def _layers(report: ReportData) -> str:
    header = ("layer", "filters", "groups", "inputs of each group", "MACs before", "after")
    rows = [
        (
            layer.name,
            change(*layer.filters),
            str(len(layer.inputs[1])) if layer.gated else "",
            _inputs(layer),
            short(layer.before.macs),
            short(layer.after.macs),
        )
        for layer in report.layers
    ]
    return _table(header, rows, right=2)


def _possible(report: ReportData) -> str:
    """What of every layer could be pruned, with what it is coupled, and why not."""
    header = ("layer", "gated", "free filters", "coupled with", "why not")
    rows = [
        (
            layer.name,
            "yes" if layer.gated else "no",
            f"{layer.free} of {layer.filters[0]}",
            _coupled(layer.coupled),
            textwrap.fill(reasons(layer, in_full=False), REASON),
        )
        for layer in report.layers
    ]
    pins = dict.fromkeys(str(layer.pin) for layer in report.layers if layer.pin is not None)
    explained = "\n".join(_wrapped(f"filters stay: {pin}") for pin in pins)
    return "\n\n".join([_table(header, rows), *([explained] if pins else [])])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: int = 0) -> str:
    """A table whose first column has what room the others leave; the last `right` hold numbers."""
    padded = [title + " " * GAP for title in header]  # as tabulate does it
    widths = [max(map(_width, column)) for column in zip(padded, *rows, strict=True)]
    room = WIDTH - sum(GAP + width for width in widths[1:])
    fitting = [(shortened(name, room), *rest) for name, *rest in rows]
    align = ("left",) * (len(header) - right) + ("right",) * right
    return tabulate(fitting, header, disable_numparse=True, colalign=align)


def _wrapped(line: str) -> str:
    return textwrap.fill(line, WIDTH, subsequent_indent="  ")


def _width(cell: str) -> int:
    return max(map(len, cell.splitlines()), default=0)


def _inputs(layer: LayerSummary) -> str:
    counts = " ".join(map(str, layer.inputs[1])) or "0"
    text = f"{layer.inputs[0]} -> {counts}"
    return text if len(text) <= INPUTS else f"{text[: INPUTS - 3]}..."


def _coupled(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    more = f" +{len(names) - 1}" if len(names) > 1 else ""
    return shortened(names[0], COUPLED - len(more)) + more if names else ""


def _row(before: int, after: int) -> tuple[str, str, str]:
    return short(before), short(after), share(after, before)
