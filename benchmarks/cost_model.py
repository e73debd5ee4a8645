"""Fit the cost model, which `convert` chooses forms by, to measured layers.

    python -m benchmarks.cost_model [--threads 2]

Convolutions of usual shapes, dense and in the forms that two groups of random channels give, sorted
and not, are timed one by one; the coefficients are those of the least squares of relative errors,
none of them negative.
"""

import itertools
from dataclasses import astuple, replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from scipy.optimize import nnls
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from dspfx.passes.cost_model import CPU, CostModel
from dspfx.passes.lowering import describe, forms
from dspfx.passes.measure import Measured
from dspfx.passes.relower import sites

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


def main(threads: Annotated[int, typer.Option(min=1, help="threads torch uses")] = 2) -> None:
    """Print the fitted coefficients, and how far they are off."""
    torch.set_num_threads(threads)
    times, rows = measure()
    fits = [fit(times, rows, vector) for vector in VECTORS]
    model = min(fits, key=lambda fitted: error(fitted, times, rows))
    print(model)
    table = [
        (
            fitted.vector,
            *(f"{value:.2e}" for value in astuple(fitted)[:4]),
            error(fitted, times, rows),
        )
        for fitted in (*fits, CPU)
    ]
    header = ("vector", "call", "mac", "copy", "gather", "median relative error")
    print(tabulate(table, header, floatfmt=".0%", disable_numparse=(1, 2, 3, 4)))


def measure() -> tuple[npt.NDArray[Any], list[Any]]:
    """The seconds of every form of every layer, and what the model is told of it."""
    measured = Measured(torch.device("cpu"))
    times, rows = [], []
    cases = list(itertools.product(SHAPES, BATCHES, SHARES, (False, True)))
    for (channels, filters, size, taps), batch, share, tidy in tqdm(cases, disable=None):
        layer = masked(channels, filters, taps, share, tidy)
        x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)
        (site,) = sites(nn.Sequential(layer), (x,))
        found = {describe(form): form for form in forms(site.groups, [0] * len(site.groups))}
        modules = {name: site.emit(form) for name, form in found.items()}
        for name, seconds in measured(modules, x).items():
            times.append(seconds)
            rows.append((found[name], site.geometry))
    measured.save()
    return np.array(times), rows


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


def fit(times: npt.NDArray[Any], rows: list[Any], vector: int) -> CostModel:
    """The coefficients, for one size of vectors."""
    zero = CostModel(0, 0, 0, 0, vector)
    units = [replace(zero, **{name: 1.0}) for name in ("call", "mac", "copy", "gather")]
    work = np.array([[unit.seconds(*row) for unit in units] for row in rows])
    coefficients, _ = nnls(work / times[:, None], np.ones(len(times)))
    return CostModel(*coefficients.tolist(), vector)


def error(model: CostModel, times: npt.NDArray[Any], rows: list[Any]) -> float:
    """The median relative error."""
    likely = np.array([model.seconds(*row) for row in rows])
    return float(np.median(np.abs(likely / times - 1)))


if __name__ == "__main__":
    typer.run(main)
