"""Accuracy over time: pruned networks, each in its fastest engine and precision.

    python -m benchmarks.front run [--seed 0]    # times what has no time yet
    python -m benchmarks.front page              # docs/front.md, docs/pictures/front.svg

The networks are those of `python -m benchmarks.accuracy`, ResNet-20 on 20,000 images of
Fashion-MNIST, built again from their shapes; their accuracies are means of all seeds there are, in
float32. A network of 8 bits may lose a little of it, see `python -m benchmarks.quantization`.
"""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import dspfx
from benchmarks.accuracy.results import Result, made_by
from benchmarks.accuracy.results import read as accuracies
from benchmarks.accuracy.runs import DENSE, LONGER
from benchmarks.accuracy.scenarios import SCENARIOS
from benchmarks.accuracy.shapes import rebuilt
from dspfx.utils.cache import processor

SCENARIO, IMAGE = "resnet20", (3, 32, 32)
RIVALS = ("channels, magnitude", "channels, magnitude, higher rate")
WHOLE, GROUPS = "whole channels, gradually", "channels and groups, gradually"
TWO_GROUPS, OWN_INPUTS = "channels and 2 groups, gradually", "channels and own inputs, gradually"
OURS = (WHOLE, OWN_INPUTS, GROUPS, TWO_GROUPS)
NAMES = {
    DENSE: "dense",
    LONGER: "dense, trained as long as the others",
    RIVALS[0]: "Torch-Pruning",
    RIVALS[1]: "Torch-Pruning, higher rate",
    WHOLE: "dspfx, whole channels",
    OWN_INPUTS: "dspfx, own inputs",
    GROUPS: "dspfx, 4 groups",
    TWO_GROUPS: "dspfx, 2 groups",
}
BATCHES, PRECISIONS = (1, 8), ("fp32", "int8")
ENGINES = ("openvino", "onnxruntime", "own")
FILE = Path(__file__).parent / "results" / "front.jsonl"
DOCS = Path(__file__).resolve().parents[1] / "docs"
HEAD = (
    "The networks are those of [accuracy.md](accuracy.md), ResNet-20 on 20,000 images of "
    "Fashion-MNIST, built again from their shapes and timed by `python -m benchmarks.front run`, "
    "each in the fastest engine that `dspfx.compile` finds, the project's own kernel included. "
    "Accuracies are means of three seeds, in float32; 8 bits may cost a little more."
)
app = typer.Typer(add_completion=False, no_args_is_help=True)


@dataclass(frozen=True)
class Timed:
    """One network at one batch and precision, in the engine that was its fastest.

    Attributes:
        method, pruned, seed: of benchmarks.accuracy.
        batch, precision, engine, milliseconds: what was timed.
        processor, made: where, when and by what.
    """

    method: str
    pruned: int
    seed: int
    batch: int
    precision: str
    engine: str
    milliseconds: float
    processor: str
    made: dict[str, str]

    @property
    def key(self) -> tuple[str, int, int, int, str, str]:
        """What makes two lines the same."""
        return self.method, self.pruned, self.seed, self.batch, self.precision, self.processor


@dataclass(frozen=True)
class Point:
    """A kind of network at a batch: its accuracy, its time, and where it takes that."""

    method: str
    pruned: int
    accuracy: float
    milliseconds: float
    where: str


@app.command()
def run(
    seed: Annotated[int, typer.Option(help="whose networks are timed")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="threads of every engine")] = 2,
) -> None:
    """Time what has no time yet."""
    torch.set_num_threads(threads)
    done = {line.key for line in read()}
    for result in tqdm(_of_seed(seed)):
        for batch in BATCHES:
            for precision in PRECISIONS:
                key = *(result.method, result.pruned, seed, batch, precision), processor()
                if key not in done:
                    line = _timed(result, batch, precision)
                    with FILE.open("a") as file:
                        file.write(json.dumps(asdict(line)) + "\n")
                    tqdm.write(f"{key}: {line.milliseconds:.3f} {line.engine}")


@app.command()
def page() -> None:
    """Write the page and the picture."""
    lines = [line for line in read() if line.processor == processor()]
    sections = []
    figure, axes = plt.subplots(len(PRECISIONS), len(BATCHES), figsize=(10, 8), squeeze=False)
    for row, precisions in enumerate((PRECISIONS[:1], PRECISIONS)):
        for column, batch in enumerate(BATCHES):
            points = points_of(lines, batch, precisions)
            title = f"batch {batch}, {' or '.join(precisions)}"
            _draw(axes[row][column], points, title)
            sections.append(
                f"## {title[0].upper()}{title[1:]}\n\n{_table(points)}\n\n{gaps(points)}"
            )
    axes[-1][-1].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(DOCS / "pictures" / "front.svg")
    head = [
        "# Accuracy over time",
        f"Written by `python -m benchmarks.front page`; {processor()}, 2 threads. {HEAD}",
        "![Accuracy over time](pictures/front.svg)",
    ]
    (DOCS / "front.md").write_text("\n\n".join([*head, *sections]) + "\n")


def read() -> list[Timed]:
    """What was timed so far."""
    lines = FILE.read_text().splitlines() if FILE.is_file() else []
    return [Timed(**json.loads(line)) for line in lines]


def points_of(lines: Iterable[Timed], batch: int, precisions: tuple[str, ...]) -> list[Point]:
    """Every kind of network at `batch`, in the fastest of `precisions`; the fastest first."""
    found: dict[tuple[str, int], Timed] = {}
    for line in lines:
        if line.batch == batch and line.precision in precisions:
            key = line.method, line.pruned
            if key not in found or line.milliseconds < found[key].milliseconds:
                found[key] = line
    results = accuracies().values()
    points = []
    for (method, pruned), line in found.items():
        own = [r.accuracy for r in results if _is(r, method, pruned)]
        where = f"{line.engine}, {line.precision}"
        points.append(Point(method, pruned, statistics.mean(own), line.milliseconds, where))
    return sorted(points, key=lambda point: point.milliseconds)


def gaps(points: list[Point]) -> str:
    """How far the front of dspfx is above, or below, every network on that of the rival.

    Once as the networks are, the most accurate one that takes no longer; and once in a straight
    line between two of them, for a budget may be anything.
    """
    ours, rivals = _front(points, OURS), _front(points, RIVALS)
    times, accuracies_ = [p.milliseconds for p in ours], [p.accuracy for p in ours]
    rows = []
    for rival in rivals:
        as_fast = [point.accuracy for point in ours if point.milliseconds <= rival.milliseconds]
        between = float(np.interp(rival.milliseconds, times, accuracies_))
        gap = f"{max(as_fast) - rival.accuracy:+.2f}" if as_fast else "none as fast"
        line = f"{between - rival.accuracy:+.2f}" if as_fast else ""
        rows.append((f"{rival.milliseconds:.3f}", f"{rival.accuracy:.2f}", gap, line))
    header = ("Torch-Pruning, ms", "top-1", "dspfx, no slower", "dspfx, between two networks")
    return tabulate(rows, header, "github", disable_numparse=True)


def _front(points: list[Point], methods: tuple[str, ...]) -> list[Point]:
    """Those of `methods` of which none faster is as accurate; the fastest first."""
    found: list[Point] = []
    for point in points:
        if point.method in methods and (not found or point.accuracy > found[-1].accuracy):
            found.append(point)
    return found


def _of_seed(seed: int) -> list[Result]:
    wanted = (DENSE, LONGER, *RIVALS, *OURS)
    found = accuracies().values()
    return [r for r in found if (r.scenario, r.seed) == (SCENARIO, seed) and r.method in wanted]


def _is(result: Result, method: str, pruned: int) -> bool:
    return (result.scenario, result.method, result.pruned) == (SCENARIO, method, pruned)


def _timed(result: Result, batch: int, precision: str) -> Timed:
    x = torch.randn(batch, *IMAGE, generator=torch.Generator().manual_seed(0))
    model: nn.Module = rebuilt(SCENARIOS[SCENARIO], result.shape)
    compact = (
        model
        if isinstance(model, dspfx.CompactModule)
        else dspfx.convert(dspfx.prepare(model, x.repeat(2, 1, 1, 1)))
    )
    more = {"batches": [torch.randn(64, *IMAGE)]} if precision == "int8" else {}
    fast = dspfx.compile(compact, x, engines=ENGINES, precision=precision, **more)  # type: ignore[arg-type]
    seconds, chosen = fast.report.chosen.seconds, fast.report.chosen
    assert seconds is not None
    key = result.method, result.pruned, result.seed, batch, precision
    made = made_by("python -m benchmarks.front run")
    return Timed(*key, chosen.engine, round(1e3 * seconds, 4), processor(), made)


def _table(points: list[Point]) -> str:
    rows = [
        (NAMES[p.method], f"{p.pruned} %", f"{p.accuracy:.2f}", f"{p.milliseconds:.3f}", p.where)
        for p in points
    ]
    header = ("network", "pruned", "top-1", "ms", "in")
    return tabulate(rows, header, "github", disable_numparse=True)


def _draw(axes: plt.Axes, points: list[Point], title: str) -> None:
    for name in dict.fromkeys(NAMES.values()):
        own = [point for point in points if NAMES[point.method] == name]
        xs, ys = [p.milliseconds for p in own], [p.accuracy for p in own]
        axes.plot(xs, ys, "o", label=name)
    axes.set(title=title, xlabel="ms", ylabel="top-1")


if __name__ == "__main__":
    app()
