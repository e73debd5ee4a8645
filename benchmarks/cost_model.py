"""What single layers take in each of their forms, and the cost model that is fitted to it.

    python -m benchmarks.cost_model [--threads 2] [--output docs/forms.md]

Convolutions of usual shapes, in the forms that two groups of filters give, which read channels side
by side or anywhere, are timed one by one. The coefficients are those of the least squares of
relative errors, none of them negative.
"""

import itertools
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.optimize import nnls
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from dspfx.passes.lowering.cost_model import CPU, CostModel, Geometry
from dspfx.passes.lowering.forms import Lowering, describe, forms
from dspfx.passes.lowering.measure import Measured
from dspfx.passes.lowering.sites import sites

# channels, filters, size of the image, taps along a side
SHAPES = (
    *((16, 16, 32, 3), (32, 32, 16, 3), (64, 64, 8, 3)),
    *((64, 64, 56, 3), (128, 128, 28, 3), (256, 256, 14, 3), (512, 512, 7, 3)),
    *((256, 64, 56, 1), (64, 256, 56, 1), (512, 128, 28, 1), (128, 512, 28, 1)),
    *((1024, 256, 14, 1), (256, 1024, 14, 1), (2048, 512, 7, 1), (512, 2048, 7, 1)),
)
BATCHES = (1, 8)
SHARES = (0.45, 0.7)
VECTORS = (1, 4, 8, 16)


OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "forms.md"


@dataclass(frozen=True)
class Timed:
    """One form of one layer.

    Attributes:
        layer: shape, batch, share of the channels that a group reads, and whether side by side.
        form: its description.
        seconds: measured.
        model: what the cost model is told of it; None for the own kernel.
    """

    layer: tuple[tuple[int, int, int, int], int, float, bool]
    form: str
    seconds: float
    model: tuple[Lowering, Geometry] | None


def main(
    threads: Annotated[int, typer.Option(min=1, help="threads torch uses")] = 2,
    output: Annotated[Path, typer.Option(help="where the tables are written")] = OUTPUT,
) -> None:
    """Print and write what the forms take, the fitted coefficients, and how far they are off."""
    torch.set_num_threads(threads)
    timed = measure()
    fits = [fit(timed, vector) for vector in VECTORS]
    coefficients = [
        (
            *(name, model.vector, *(f"{value:.2e}" for value in astuple(model)[:4])),
            f"{error(model, timed):.0%}",
        )
        for name, model in (*(("fitted", model) for model in fits), ("in use", CPU))
    ]
    text = "\n".join(
        [
            "# Forms of a layer",
            "",
            f"Written by `python -m benchmarks.cost_model`; {threads} threads, float32, torch "
            f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}. Speed relative to "
            "the dense convolution over all channels that any group reads; every layer has two "
            "groups, which read the given share of the channels, side by side or anywhere.",
            "",
            tabulate(speeds(timed), HEADER, "github", floatfmt=".2f"),
            "",
            "The coefficients of the cost model, in seconds:",
            "",
            tabulate(coefficients, COEFFICIENTS, "github", disable_numparse=True),
            "",
        ]
    )
    print(text)
    output.write_text(text)


HEADER = (
    *("layer", "batch", "share", "channels", "dense, ms"),
    *("branches", "1 grouped conv", "own kernel", "ideal"),
)
COEFFICIENTS = ("", "vector", "call", "mac", "copy", "gather", "median relative error")


def speeds(timed: list[Timed]) -> list[tuple[Any, ...]]:
    """A row for every layer."""
    rows = []
    for layer, of_layer in itertools.groupby(timed, lambda t: t.layer):
        (channels, filters, size, taps), batch, share, tidy = layer
        forms_of = list(of_layer)
        by_name = {t.form: t.seconds for t in forms_of}
        dense = by_name["dense"]
        several = [t.seconds for t in forms_of if "layers" in t.form]
        one = [t.seconds for t in forms_of if t.form.startswith("1 layer")]
        rows.append(
            (
                f"{channels}->{filters}, {taps}x{taps}, {size}x{size}",
                *(batch, share, "side by side" if tidy else "anywhere", 1e3 * dense),
                *(dense / min(own) if own else "" for own in (several, one)),
                dense / by_name["native"] if "native" in by_name else "",
                min(1.0, 2 * share) / share,
            )
        )
    return rows


def measure() -> list[Timed]:
    """Every form of every layer."""
    measured = Measured(torch.device("cpu"))
    timed = []
    cases = list(itertools.product(SHAPES, BATCHES, SHARES, (True, False)))
    for case in tqdm(cases, disable=None):
        (channels, filters, size, taps), batch, share, tidy = case
        layer = masked(channels, filters, taps, share, tidy)
        x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
        (site,) = sites(nn.Sequential(layer), (x,))
        found = {describe(form): form for form in forms(site.groups, [0] * len(site.groups))}
        modules = {name: site.emit(form) for name, form in found.items()}
        own = site.emit_native()
        modules |= {"native": own} if own is not None else {}
        for name, seconds in measured(modules, x).items():
            told = (found[name], site.geometry) if name in found else None
            timed.append(Timed(case, name, seconds, told))
    measured.save()
    return timed


def masked(channels: int, filters: int, taps: int, share: float, tidy: bool) -> nn.Conv2d:
    """A convolution of two groups, whose filters and channels are side by side where `tidy`."""
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, filters, taps, padding=taps // 2).eval().requires_grad_(False)
    reads = torch.zeros(2, channels, dtype=torch.bool)
    reads[0, : int(channels * share)] = True
    reads[1, channels - int(channels * share) :] = True
    group = torch.arange(filters) * 2 // filters
    if not tidy:
        reads, group = reads[:, torch.randperm(channels)], group[torch.randperm(filters)]
    layer.weight *= reads[group, :, None, None]
    return layer


def fit(timed: list[Timed], vector: int) -> CostModel:
    """The coefficients, for one size of vectors."""
    zero = CostModel(0, 0, 0, 0, vector)
    units = [replace(zero, **{name: 1.0}) for name in ("call", "mac", "copy", "gather")]
    told = [(t.model, t.seconds) for t in timed if t.model is not None]
    work = np.array([[unit.seconds(*model) / s for unit in units] for model, s in told])
    coefficients, _ = nnls(work, np.ones(len(told)))
    return CostModel(*coefficients.tolist(), vector)


def error(model: CostModel, timed: list[Timed]) -> float:
    """The median relative error."""
    told = [(t.model, t.seconds) for t in timed if t.model is not None]
    return float(np.median([abs(model.seconds(*where) / s - 1) for where, s in told]))


if __name__ == "__main__":
    typer.run(main)
