"""`plot`: one picture of a network, drawn from its report.

Everything is placed in inches from the top, so that nothing overlaps however many layers there are.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from dspfx.errors import PlotError
from dspfx.reporting.figure import (
    figure_of,
)
from dspfx.reporting.report import Report, report
from dspfx.utils.atomic_write import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(model: nn.Module | Report, path: str | os.PathLike[str] | None = None) -> "Figure":
    """Draw a prepared or compact model: its masks by groups, its widths, its MACs.

    Args:
        model: from `dspfx.prepare`, as it is masked now, or from `dspfx.convert`; or its report.
        path: where to write the picture too; the suffix says how, for instance `.png` or `.svg`.

    Returns:
        A figure that `matplotlib.pyplot` does not manage: it need not be closed.

    Raises:
        PlotError: matplotlib is missing, or writes no such files; or `path` cannot be written.
        ConvertError: `model` comes from neither `dspfx.prepare` nor `dspfx.convert`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> figure = dspfx.plot(prepared)
        >>> figure.savefig(Path(folder) / "masks.png")
    """
    figure = figure_of(model if isinstance(model, Report) else report(model))
    if path is not None:
        _write(figure, Path(path))
    return figure


def _write(figure: "Figure", path: Path) -> None:
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        endings = ", ".join(f".{suffix}" for suffix in sorted(known))
        raise PlotError(f"{path.name} does not say what to write; it has to end with {endings}")
    with replacing(path, PlotError) as temporary:
        figure.savefig(temporary)
