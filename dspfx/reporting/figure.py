"""One picture of a network, from the data of its report; places are in inches from the top."""

from typing import TYPE_CHECKING, Any

from dspfx.errors import PlotError
from dspfx.reporting import charts, panels
from dspfx.reporting.data import ReportData
from dspfx.utils.formatting import mebibytes, share, short, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DPI = 150


NARROWEST, WIDEST, MARGIN = 9.0, 20.0, 0.35  # inches


HEADER, HEADING = 1.1, 0.65  # inches above the charts, and above the masks


TITLE, TEXT, LEGEND = 14.0, 9.5, 8.0  # points


def figure_of(report: ReportData) -> "Figure":
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


def _head(sheet: "Axes", report: ReportData) -> None:
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


def _head_masks(sheet: "Axes", report: ReportData, y: float) -> None:
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
