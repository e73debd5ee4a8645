"""docs/accuracy.md with its pictures, from the results files."""

import json
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from tabulate import tabulate

from benchmarks.accuracy import results
from benchmarks.accuracy.latency import LATENCY
from benchmarks.accuracy.methods import METHODS, TIMED, UNTRAINED
from benchmarks.accuracy.results import Result
from benchmarks.accuracy.runs import DENSE, LONGER
from benchmarks.accuracy.scenarios import SCENARIOS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "accuracy.md"
PICTURES = ROOT / "docs" / "pictures"

PROTOCOL = """\
Fashion-MNIST-20k: the first 20,000 training images and all 10,000 test images of Fashion-MNIST,
padded to 32x32; training images are mirrored by chance and shifted by up to 2 pixels. Batches of
128, SGD with momentum 0.9. The dense network is trained for 10 epochs (rate 0.1, weight decay
5e-4), and all methods start from its weights. What learns before it prunes does so for 8 epochs
(rate 0.05) and is then fine-tuned in two cosines of 5 epochs (rate 0.015, weight decay 1e-3); what
does not learn is fine-tuned in cosines of 8, 5 and 5. With 2,000 images all is four times as many
epochs. The network of the last epoch counts.

*Pruned* are so many percent of the MACs of the layers that have gates, of the whole model a little
less. Channels are pruned by Torch-Pruning, over all layers at once. *Learned* groups have the
paper's settings, *learned strongly* a stronger penalty, the stronger the fewer steps there are. *By
the loss*: the gradients of 40 batches of 32 training images decide, without a step of any
optimizer. *Calibrated* methods know the inputs of layers from 1,000 training images
(`dspfx.input_moments`); *regrouped*: once the network has learned, its filters are clustered anew.
*Higher rate*: the first 8 epochs of fine-tuning have the rate that learning has. *Gradually*: in
these 8 epochs `dspfx.GradualPruning` prunes, by what the loss says of channels and of groups.
Groups are clustered there before it begins, or all at random. *By time*: a share of the time that
layers were measured to take remains, and what goes is weighed against its time. *Distilled*: with
the dense network's answers; after its 10 epochs it is no better than what it teaches. Tables have
the mean, the standard deviation and the number of seeds; pictures have what was tried at three
budgets or more.
"""

Cells = dict[tuple[str, int], list[Result]]  # by method and percentage, one for each seed


def write() -> None:
    """Write the page and the pictures."""
    found = results.read().values()
    PICTURES.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, scenario in SCENARIOS.items():
        cells = _cells(r for r in found if r.scenario == name)
        if not any(method in METHODS for method, _ in cells):
            continue
        sections.append(f"## {scenario.title}\n\n{_section(name, cells)}")
    PAGE.write_text(re.sub(r"\n{3,}", "\n\n", f"{_heading()}\n\n" + "\n\n".join(sections) + "\n"))


def _cells(found: Iterable[Result]) -> Cells:
    cells: Cells = {}
    for result in found:
        cells.setdefault((result.method, result.pruned), []).append(result)
    return cells


def _widely_tried(cells: Cells) -> list[str]:
    tried = results.widely_tried(result for found in cells.values() for result in found)
    return [method for method in METHODS if method in tried]


def _section(name: str, cells: Cells) -> str:
    trained = [m for m in METHODS if m not in UNTRAINED | TIMED]
    tried = _widely_tried(cells)
    parts = [_dense_line(cells), _table(cells, trained)]
    if any(method in TIMED for method, _ in cells):
        parts += ["Pruned to a share of the time that layers were measured to take:"]
        parts += [_table(cells, list(TIMED), " of the time")]
    if any(method in UNTRAINED for method, _ in cells):
        parts += ["Not trained after pruning; batch norms are recalibrated:"]
        parts += [_table(cells, list(UNTRAINED))]
    if tried:
        _picture(name, cells, tried)
        parts.append(f"![accuracy over MACs](pictures/accuracy_{name}.png)")
    if times := _times(name, cells):
        parts.append(times)
    return "\n\n".join(parts)


def _dense_line(cells: Cells) -> str:
    texts = [
        f"{method}: {_text(cells[method, 0])}" for method in (DENSE, LONGER) if (method, 0) in cells
    ]
    return f"Top-1, percent. {'; '.join(texts)}." if texts else "Top-1, percent."


def _table(cells: Cells, methods: list[str], of: str = "") -> str:
    columns = sorted({pruned for method, pruned in cells if method in methods})
    rows = [
        (method, *(_text(cells.get((method, p), [])) for p in columns))
        for method in methods
        if any((method, p) in cells for p in columns)
    ]
    kept = [_kept(cells, methods, p) for p in columns]
    header = [
        "pruned",
        *(
            f"{p} %{of or f' ({k:.1%} of all MACs left)'}"
            for p, k in zip(columns, kept, strict=True)
        ),
    ]
    return tabulate(rows, header, "github", disable_numparse=True)


def _kept(cells: Cells, methods: list[str], pruned: int) -> float:
    return max(r.macs / r.dense_macs for m in methods for r in cells.get((m, pruned), []))


def _text(found: list[Result]) -> str:
    """Mean, standard deviation and number of seeds."""
    if not found:
        return ""
    values = [r.accuracy for r in found]
    if len(values) == 1:
        return f"{values[0]:.2f} (1 seed)"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def _picture(name: str, cells: Cells, methods: list[str]) -> None:
    """Accuracy over MACs and, where latencies were measured, over these."""
    latency = _latencies(name)
    figure = Figure(figsize=(11 if latency else 6.5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if latency else 1, squeeze=False)[0]
    dense = [r.accuracy for r in cells.get((DENSE, 0), [])]
    for panel in panels:
        if dense:
            level = statistics.mean(dense)
            panel.axhline(level, color="0.6", linewidth=1, linestyle=":", label="dense")
        panel.set_ylabel("top-1 on the test images, %")
        panel.grid(color="0.92")
    colors = colormaps["tab10" if len(methods) <= 10 else "tab20"]
    for index, method in enumerate(methods):
        found = sorted((p, rs) for (m, p), rs in cells.items() if m == method)
        peer = METHODS[method].start in ("dense", "sparse")
        style = {
            "color": colors(index),
            "marker": "s" if peer else "o",
            "linestyle": "--" if peer else "-",
            "markersize": 4,
            "linewidth": 1.4,
        }
        means = [statistics.mean(r.accuracy for r in rs) for _, rs in found]
        spread = [
            [m - min(r.accuracy for r in rs) for m, (_, rs) in zip(means, found, strict=True)],
            [max(r.accuracy for r in rs) - m for m, (_, rs) in zip(means, found, strict=True)],
        ]
        macs = [statistics.mean(r.macs for r in rs) / 1e6 for _, rs in found]
        panels[0].errorbar(macs, means, spread, label=method, capsize=2, elinewidth=0.8, **style)
        points = [
            (latency[method, p], m)
            for m, (p, _) in zip(means, found, strict=True)
            if (method, p) in latency
        ]
        if points:
            panels[1].plot(*zip(*points, strict=True), label=method, **style)
    panels[0].set_xscale("log")
    panels[0].xaxis.set_major_formatter(ScalarFormatter())
    panels[0].xaxis.set_minor_formatter(ScalarFormatter())
    panels[0].set_xlabel("MACs of one image, millions")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    if latency:
        panels[1].set_xlabel(f"milliseconds, batch of {_batch(name)}, fastest runtime")
    figure.savefig(PICTURES / f"accuracy_{name}.png", dpi=130)


def _times(name: str, cells: Cells) -> str:
    """What the networks of one seed take, beside the accuracy of all seeds; "" if not measured."""
    rows = _timed(name)
    if not rows:
        return ""
    runtimes = list(dict.fromkeys(runtime for row in rows for runtime in row["milliseconds"]))
    lines = []
    for row in sorted(rows, key=lambda row: (row["pruned"], row["method"])):
        pruned, times = row["pruned"], row["milliseconds"]
        shown = (f"{times[r]:.2f}" if r in times else "" for r in runtimes)
        accuracy = _text(cells[row["method"], pruned])
        lines.append((row["method"], f"{pruned} %" if pruned else "", accuracy, *shown))
    made = json.loads(LATENCY.read_text())["made"]
    table = tabulate(
        lines, ["network", "pruned", "top-1", *runtimes], "github", disable_numparse=True
    )
    return (
        f"Milliseconds of a batch of {rows[0]['batch']} in float32, the networks of seed "
        f"{rows[0]['seed']} (`python -m benchmarks.accuracy latency`, {made['date']}, torch "
        f"{made['torch']}); networks with groups run in `dspfx.compile` only. *By time*, "
        f"percent are of the time, else of the MACs.\n\n{table}"
    )


def _latencies(name: str) -> dict[tuple[str, int], float]:
    """Milliseconds in the fastest runtime, by method and percentage."""
    return {
        (row["method"], row["pruned"]): min(row["milliseconds"].values()) for row in _timed(name)
    }


def _timed(name: str) -> list[dict[str, Any]]:
    """The rows of a scenario in the file of latencies."""
    if not LATENCY.is_file():
        return []
    return [row for row in json.loads(LATENCY.read_text())["rows"] if row["scenario"] == name]


def _batch(name: str) -> int:
    return int(_timed(name)[0]["batch"])


def _heading() -> str:
    made = [dict(r.made) for r in results.read().values()]
    versions = sorted(
        {
            f"torch {m['torch']}, Torch-Pruning {m['torch-pruning']}, {m['precision']} on "
            f"{m['processor']}"
            for m in made
        }
    )
    dates = sorted(m["date"] for m in made)
    return (
        "# Accuracy\n\n"
        "Written by `python -m benchmarks.accuracy tables` from "
        "`benchmarks/results/accuracy.jsonl`, which `python -m benchmarks.accuracy run` fills "
        f"({'; '.join(versions)}; {dates[0]} to {dates[-1]}).\n\n{PROTOCOL}"
    )
