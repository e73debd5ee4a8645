"""A `Report` as text, no wider than a terminal."""

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence

from tabulate import tabulate

from dspfx.passes.analysis.channel_ops import Declined
from dspfx.passes.transforms.summary import LayerSummary
from dspfx.reporting.data import ReportData
from dspfx.utils.formatting import change, distinct, mebibytes, share, short, shortened

WIDTH = 100
GAP = 2  # between the columns of a table
INPUTS, COUPLED, REASON = 26, 24, 30
MOST_NODES = 3  # that are named with a reason
FOLLOWS = "follows: its filters read one channel each, and leave with it"


def text_of(report: ReportData) -> str:
    """The table of layers, what could be pruned if the model is prepared, totals and reasons."""
    totals = tabulate(
        totals_of(report),
        ("", "before", "after", "kept"),
        disable_numparse=True,
        colalign=("left", "right", "right", "right"),
    )
    lines = [f"kept at full width: {line}" for line in together(report.declined)]
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


def gate_of(layer: LayerSummary) -> str:
    """Whether a layer has a gate, or none since it follows the layer that it reads."""
    return "yes" if layer.gated else "follows" if layer.follows else "no"


def together(declined: Iterable[Declined]) -> list[str]:
    """A line for each reason and line of source, with the nodes that it holds of."""
    nodes: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for one in declined:
        nodes[one.reason, one.line][one.node] = None
    found = []
    for (reason, line), names in nodes.items():
        more = len(names) - MOST_NODES
        listed = ", ".join(list(names)[:MOST_NODES]) + (f" and {more} more" if more > 0 else "")
        found.append(str(Declined(listed, reason, line)))
    return found


def reasons(layer: LayerSummary, *, in_full: bool = True) -> str:
    """Why a layer has no gate, and what keeps its filters in place, or just the node that does."""
    found = [layer.why_not] if layer.why_not and not layer.follows else []
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
    names = [layer.name for layer in report.layers]
    rows = [
        (
            layer.name,
            gate_of(layer),
            f"{layer.free} of {layer.filters[0]}",
            _coupled(layer.coupled, names),
            textwrap.fill(reasons(layer, in_full=False), REASON),
        )
        for layer in report.layers
    ]
    lines = []
    if any(layer.follows for layer in report.layers):
        lines.append(FOLLOWS)
    pins = [layer.pin for layer in report.layers if layer.pin is not None]
    lines += [f"filters stay: {line}" for line in together(pins)]
    explained = "\n".join(map(_wrapped, lines))
    return "\n\n".join([_table(header, rows), *([explained] if lines else [])])


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


def _coupled(coupled: Sequence[str], names: Sequence[str]) -> str:
    """The first of `coupled`, shortened but unlike all other `names`, and how many more."""
    more = f" +{len(coupled) - 1}" if len(coupled) > 1 else ""
    return distinct(coupled[0], names, COUPLED - len(more)) + more if coupled else ""


def _row(before: int, after: int) -> tuple[str, str, str]:
    return short(before), short(after), share(after, before)
