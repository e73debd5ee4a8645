"""Two charts over one row of names: the filters and the multiply-accumulates of every layer."""

import math
from typing import TYPE_CHECKING, Any

from dspfx.reporting.data import ReportData
from dspfx.reporting.panels import EM, INK, PALE
from dspfx.utils.formatting import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE, AFTER, RULE = "#c4cad3", "#1b4f7a", "#e6e9ed"
LABEL = 7.5  # points
SCALE = 0.8  # inches left of a chart, for its numbers
CHART, GAP = 1.35, 0.15  # inches: the height of a chart, and between two
A_LAYER, A_LABEL = 0.19, 0.125  # inches: from one layer to the next, from one name at the least
LONGEST = 28  # characters of a name


def width_of(report: ReportData) -> float:
    """The inches that charts with a name for every layer take."""
    return SCALE + A_LAYER * len(report.layers)


def height_of(report: ReportData) -> float:
    """The inches that the charts take, with the names below."""
    longest = max((len(name) for name in _names(report)), default=0)
    return 2 * CHART + GAP + longest * LABEL * EM


def draw_charts(figure: "Figure", report: ReportData, x: float, y: float, width: float) -> None:
    """Draw both.

    Args:
        figure: of its final size.
        report: of a model.
        x, y: the upper left corner, in inches from that of `figure`.
        width: of all, in inches.
    """
    room = width - SCALE
    filters, macs = (_axes(figure, x + SCALE, y + n * (CHART + GAP), room) for n in range(2))
    _draw_filters(filters, report)
    _draw_macs(macs, report)
    for axes, counted in ((filters, "filters"), (macs, "MACs")):
        axes.set_ylabel(counted, color=INK, size=LABEL + 1)
        axes.yaxis.set_label_coords((0.1 - SCALE) / room, 0.5)
        axes.set_xlim(-0.8, len(report.layers) - 0.2)
        axes.set_xticks([])
    _name_layers(macs, report, room / max(1, len(report.layers)))
    _explain(filters)


def _names(report: ReportData) -> list[str]:
    return [shortened(layer.name, LONGEST) for layer in report.layers]


def _axes(figure: "Figure", x: float, y: float, width: float) -> "Axes":
    across, down = figure.get_size_inches()
    axes = figure.add_axes((x / across, 1 - (y + CHART) / down, width / across, CHART / down))
    axes.set_facecolor("white")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.tick_params(axis="y", colors=INK, labelsize=LABEL, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(PALE)
    return axes


def _draw_filters(axes: "Axes", report: ReportData) -> None:
    """Widths differ by powers of two: a line from before to after, on a logarithmic scale."""
    before = [layer.filters[0] for layer in report.layers]
    after = [layer.filters[1] for layer in report.layers]
    axes.set_yscale("symlog", base=2, linthresh=1)  # layers may vanish
    axes.vlines(range(len(before)), after, before, color=BEFORE, linewidth=2.2, zorder=1)
    style: dict[str, Any] = {"linestyle": "none", "markersize": 4.5}
    axes.plot(before, marker="_", color=PALE, markeredgewidth=1.6, **style)
    axes.plot(after, marker="o", color=AFTER, **style)
    # more than a factor of two apart: there is a power of two in between
    low, high = 0.7 * max(1, min(after, default=1)), 1.42 * max(1, max(before, default=1))
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    ticks = [2**power for power in powers][:: math.ceil(len(powers) / 6)]
    vanished = 0 in after
    axes.set_yticks([0, *ticks] if vanished else ticks)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.set_ylim(0 if vanished else low, high)


def _draw_macs(axes: "Axes", report: ReportData) -> None:
    from matplotlib.ticker import EngFormatter  # noqa: PLC0415

    for costs, color in (("before", BEFORE), ("after", AFTER)):
        macs = [getattr(layer, costs).macs for layer in report.layers]
        axes.bar(range(len(macs)), macs, width=0.7, color=color, label=costs)
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.margins(y=0.03)


def _name_layers(axes: "Axes", report: ReportData, pitch: float) -> None:
    """Every name, or every second and so on where they would overlap."""
    step = math.ceil(A_LABEL / pitch)
    names = _names(report)[::step]
    ticks = range(0, len(report.layers), step)
    axes.set_xticks(ticks, names, rotation=90, size=LABEL, parse_math=False)
    axes.tick_params(axis="x", length=2, color=PALE, pad=2)
    for layer, label in zip(report.layers[::step], axes.get_xticklabels(), strict=True):
        label.set_color(INK if layer.gated else PALE)
        label.set_fontstyle("normal" if layer.gated else "italic")


def _explain(axes: "Axes") -> None:
    """The legend of both charts, above the first."""
    from matplotlib.patches import Patch  # noqa: PLC0415

    axes.legend(
        handles=[
            Patch(color=BEFORE, label="before"),
            Patch(color=AFTER, label="after"),
            Patch(alpha=0, label="slanted names: layers without a gate"),
        ],
        loc="lower right",
        bbox_to_anchor=(1, 1.0),
        borderaxespad=0.2,
        ncols=3,
        frameon=False,
        fontsize=LABEL,
        labelcolor=INK,
        handlelength=1.0,
        columnspacing=1.2,
    )
