"""A `Report` as a page: one file of HTML that asks for nothing else, neither scripts nor fonts."""

import base64
import io
import os
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from dspfx.engines.report import CompileReport, worded
from dspfx.errors import PlotError
from dspfx.passes.transforms.summary import LayerSummary
from dspfx.reporting.data import ReportData
from dspfx.reporting.figure import figure_of
from dspfx.reporting.text import gate_of, reasons, together, totals_of
from dspfx.utils.atomic_write import replacing
from dspfx.utils.formatting import change, share, short

POINT = 96 / 72  # pixels of a browser
MOST_GROUPS = 8  # whose inputs are listed


@dataclass(frozen=True)
class Picture:
    """An SVG as a page holds it; its size in a browser's pixels."""

    base64: str
    width: int
    height: int


def write_page(
    report: ReportData, path: str | os.PathLike[str], measured: CompileReport | None
) -> None:
    """See `Report.to_html`."""
    page = page_of(report, measured)
    with replacing(Path(path), PlotError) as temporary:
        temporary.write_text(page, encoding="utf-8")


def page_of(report: ReportData, measured: CompileReport | None) -> str:
    """The page as text. Whatever comes from the model is escaped.

    Raises:
        PlotError: matplotlib is missing.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = files("dspfx.reporting").joinpath("report_page.html").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        report=report,
        measured=measured,
        picture=_picture(report),
        totals=totals_of(report),
        version=version("dspfx"),
        change=change,
        gate_of=gate_of,
        groups=_groups,
        reasons=reasons,
        share=share,
        short=short,
        together=together,
        worded=worded,
    )


def _picture(report: ReportData) -> Picture:
    figure = figure_of(report)
    width, height = (round(72 * POINT * inches) for inches in figure.get_size_inches())
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    return Picture(base64.b64encode(written.getvalue()).decode(), width, height)


def _groups(layer: LayerSummary) -> str:
    """What the groups of a layer read, for a cell of a table."""
    if not layer.gated:
        return "no gate"
    counts = [str(count) for count in layer.inputs[1][:MOST_GROUPS]]
    more = len(layer.inputs[1]) - MOST_GROUPS
    return " · ".join([*counts, *([f"{more} more"] if more > 0 else [])]) or "none left"
