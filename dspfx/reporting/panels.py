"""Masks as small pictures: a panel for every gated layer, in rows on a sheet.

Filters go down and input channels across, both in the order in which the compact network stores
them; what is gone lies after what is left. A layer of 2048 channels gets as many pixels as one of
16: every pixel has the mean colour of what lies below it, so that no channel is left out.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dspfx.passes.transforms.grouped_masks import GroupedMask
from dspfx.utils.arrays import FloatArray
from dspfx.utils.formatting import change, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# of the palette of Okabe and Ito, which colour-blind readers can tell apart
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
GONE, UNREAD, INK, PALE = "#d3d7dd", "#ffffff", "#22262b", "#6b7280"
PIXELS = 256  # across a panel
PITCH = 1.6  # inches from one panel to the next, at the least
LEFT, ABOVE, BELOW, BESIDE = 0.19, 0.2, 0.34, 0.16  # inches around a panel
NAME, NOTE = 8.0, 7.0  # points
SMALLEST = 0.75  # of the size of a name, before it is shortened
EM = 0.62 / 72  # inches that a character takes, for each point of its size


def height_of(count: int, width: float) -> float:
    """The inches that `count` panels take in rows of `width` inches."""
    columns, pitch = _grid(width)
    return math.ceil(count / columns) * _height(pitch)


def draw_panels(
    sheet: "Axes", masks: tuple[GroupedMask, ...], x: float, y: float, width: float
) -> None:
    """Draw all panels.

    Args:
        sheet: axes in inches, y downwards.
        masks: one for each panel.
        x, y: where the first row begins.
        width: of a row.
    """
    columns, pitch = _grid(width)
    for number, mask in enumerate(masks):
        row, column = divmod(number, columns)
        _panel(sheet, mask, x + column * pitch, y + row * _height(pitch), pitch)


def _grid(width: float) -> tuple[int, float]:
    """How many panels stand in a row, and the inches from one to the next."""
    columns = max(1, int(width / PITCH))
    return columns, (width + BESIDE) / columns


def _side(pitch: float) -> float:
    return pitch - LEFT - BESIDE


def _height(pitch: float) -> float:
    return ABOVE + _side(pitch) + BELOW


def _panel(sheet: "Axes", mask: GroupedMask, x: float, y: float, pitch: float) -> None:
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    side, left, top = _side(pitch), x + LEFT, y + ABOVE
    kept = sum(len(group.filters) for group in mask.groups)
    filters = change(mask.filters, kept, "→")
    inputs = change(mask.channels, len(mask.held), "→")
    style: dict[str, Any] = {"color": INK, "parse_math": False}
    fits = (pitch - 0.1) / (1.1 * EM * NAME)  # characters; bold ones are wider
    name = shortened(mask.name, int(fits / SMALLEST))
    size = NAME * min(1.0, fits / max(1, len(name)))
    sheet.text(x, top - 0.06, name, size=size, weight="bold", **style)
    style["size"] = NOTE
    middle = left + side / 2, top + side / 2
    sheet.text(middle[0], top + side + 0.05, f"{inputs} inputs", ha="center", va="top", **style)
    style |= {"rotation": 90, "ha": "right", "va": "center"}
    sheet.text(left - 0.04, middle[1], f"{filters} filters", **style)
    sheet.imshow(raster(mask), extent=(left, left + side, top + side, top), aspect="auto")
    frame = Rectangle((left, top), side, side, fill=False, edgecolor=PALE, linewidth=0.6)
    sheet.add_patch(frame)


def raster(mask: GroupedMask) -> npt.NDArray[np.uint8]:
    """A mask as an image, `[PIXELS, PIXELS, 3]`."""
    place = np.zeros(mask.channels, np.int64)
    place[list(mask.held)] = np.arange(len(mask.held))
    # a row for each group, and one for all that is left
    rows = np.zeros((len(mask.groups) + 1, mask.filters))
    columns = np.zeros((len(mask.groups) + 1, mask.channels))
    start = 0
    for number, group in enumerate(mask.groups):
        rows[number, start : start + len(group.filters)] = 1
        columns[number, place[list(group.inputs)]] = 1
        start += len(group.filters)
    rows[-1, :start] = columns[-1, : len(mask.held)] = 1
    painted = [_rgb(colour_of(number)) - _rgb(UNREAD) for number in range(len(mask.groups))]
    paint = np.stack([*painted, _rgb(UNREAD) - _rgb(GONE)])
    image = np.einsum("gp,gq,gc->pqc", _means(rows), _means(columns), paint, optimize=True)
    pixels: npt.NDArray[np.uint8] = np.rint(image + _rgb(GONE)).astype(np.uint8)
    return pixels


def colour_of(group: int) -> str:
    """The colour of a group by its number."""
    return PALETTE[group % len(PALETTE)]


def _means(steps: FloatArray) -> FloatArray:
    """`[R, n]` to `[R, PIXELS]`: the mean of each row over the stretch that a pixel covers."""
    count = steps.shape[1]
    below = np.concatenate([np.zeros((len(steps), 1)), np.cumsum(steps, 1)], 1)
    edges = np.linspace(0, count, PIXELS + 1)
    at_edges = np.stack([np.interp(edges, np.arange(count + 1), row) for row in below])
    means: FloatArray = np.diff(at_edges, axis=1) * (PIXELS / count)
    return means


def _rgb(colour: str) -> FloatArray:
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], np.float64)
