"""`plot`: one picture of a network, drawn from its report.

Everything is placed in inches from the top, so that nothing overlaps however many layers there are.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from dspfx import charts, panels
from dspfx.archive import replacing
from dspfx.errors import PlotError
from dspfx.report import Report, report
from dspfx.units import mebibytes, share, short, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
NARROWEST, WIDEST, MARGIN = 9.0, 20.0, 0.35  # inches
HEADER, HEADING = 1.1, 0.65  # inches above the charts, and above the masks
TITLE, TEXT, LEGEND = 14.0, 9.5, 8.0  # points


def plot(model: nn.Module | Report, path: str | os.PathLike[str] | None = None) -> "Figure":
    """Draw a prepared or compact model: its masks by groups, its widths, its MACs.

    Args:
        model: from `dspfx.prepare`, as it is masked now, or from `dspfx.convert`; or its report.
        path: where to write the picture too; the suffix says how, for instance `.png` or `.svg`.

    Returns:
        A figure that `matplotlib.pyplot` knows nothing of: nobody has to close it.

    Raises:
        PlotError: matplotlib is missing, or writes no such files; or `path` cannot be written.
        ConvertError: `model` comes from neither `dspfx.prepare` nor `dspfx.convert`.
    """
    figure = figure_of(model if isinstance(model, Report) else report(model))
    if path is not None:
        _write(figure, Path(path))
    return figure


def figure_of(report: Report) -> "Figure":
    """The picture of `report`.

    Raises:
        PlotError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise PlotError("pictures need matplotlib: pip install 'dspfx[plot]'") from error
    width = min(max(NARROWEST, 2 * MARGIN + charts.width_of(report)), WIDEST)
    inner = width - 2 * MARGIN
    masks = HEADER + charts.height_of(report) + HEADING
    height = masks + panels.height_of(len(report.masks), inner) + MARGIN
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    figure.suppressComposite = True  # else a vector format makes one picture of all panels
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.axis("off")
    sheet.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    _head(sheet, report)
    charts.draw_charts(figure, report, MARGIN, HEADER, inner)
    if report.masks:
        _head_masks(sheet, report, masks - HEADING / 2)
        panels.draw_panels(sheet, report.masks, MARGIN, masks, inner)
    return figure


def _head(sheet: "Axes", report: Report) -> None:
    """What it is, and the totals."""
    before, after = report.before, report.after
    sizes = (mebibytes(report.bytes_of(cost)) for cost in (before, after))
    facts = [
        f"MACs {short(before.macs)} → {short(after.macs)}",
        f"parameters {short(before.parameters)} → {short(after.parameters)}",
        f"{report.dtype} {' → '.join(sizes)}",
        f"{sum(layer.gated for layer in report.layers)} of {len(report.layers)} layers gated",
    ]
    title = (
        f"{shortened(report.model, 24)}: {share(after.macs, before.macs)} of the MACs, "
        f"{share(after.parameters, before.parameters)} of the parameters"
    )
    style: dict[str, Any] = {"color": panels.INK, "parse_math": False, "va": "baseline"}
    sheet.text(MARGIN, MARGIN + 0.15, title, size=TITLE, weight="bold", **style)
    sheet.text(MARGIN, MARGIN + 0.42, "  ·  ".join(facts), size=TEXT, **style)


def _head_masks(sheet: "Axes", report: Report, y: float) -> None:
    """What the panels show, and the colours in them."""
    from matplotlib.patches import Patch  # noqa: PLC0415

    most = max(len(mask.groups) for mask in report.masks)
    entries = [(f"group {n}", colour) for n, colour in enumerate(panels.PALETTE[:most], 1)]
    entries += [("not read", panels.UNREAD), ("removed", panels.GONE)]
    again = ", colours repeat" if most > len(panels.PALETTE) else ""
    title = f"Masks of the gated layers{again}"
    sheet.text(MARGIN, y, title, size=TEXT, weight="bold", color=panels.INK, va="center")
    patches = [
        Patch(facecolor=colour, edgecolor=panels.PALE, linewidth=0.6, label=label)
        for label, colour in entries
    ]
    sheet.legend(
        handles=patches,
        loc="center right",
        bbox_to_anchor=(sheet.get_xlim()[1] - MARGIN + 0.1, y),
        bbox_transform=sheet.transData,
        ncols=len(patches),
        frameon=False,
        fontsize=LEGEND,
        labelcolor=panels.INK,
        handlelength=1.0,
        handleheight=1.0,
        columnspacing=1.2,
    )


def _write(figure: "Figure", path: Path) -> None:
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        endings = ", ".join(f".{suffix}" for suffix in sorted(known))
        raise PlotError(f"{path.name} does not say what to write; it has to end with {endings}")
    with replacing(path, PlotError) as temporary:
        figure.savefig(temporary)
