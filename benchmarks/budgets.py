"""Budgets of latency: what is predicted, and what is measured.

    python -m benchmarks.budgets [--only PATTERN] [--engine NAME]

A ResNet-18, a MobileNetV2 and a DeiT-tiny with random weights, at batch 1, pruned by
`prune_channels(prepared, Budget(latency=..., engine=..., precision=...))`. *Measured again* is
another measurement of the finished network, that pruning has not seen. Of the DeiT only what its
MLPs compute inside can go, so that less is asked of it.
"""

import fnmatch
import time
from pathlib import Path
from typing import Annotated

import timm
import torch
import torchvision
import typer
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import dspfx
from dspfx.pruning.whole_times import WholeTimes
from dspfx.utils.cache import processor

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "budgets.md"
CASES = (("resnet18", 0.5), ("mobilenet_v2", 0.6), ("deit_tiny_patch16_224", 0.8))
PLACES = (
    *(("own", "fp32"), ("onnxruntime", "fp32"), ("onnxruntime", "int8")),
    *(("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8")),
)
HEADER = ("network", "engine", "asked", "predicted", "measured", "again", "MACs kept", "seconds")


def main(
    only: Annotated[str, typer.Option(help="pattern of networks")] = "*",
    engine: Annotated[list[str] | None, typer.Option(help="only these")] = None,
    threads: Annotated[int, typer.Option(min=1, help="threads of every engine")] = 2,
    output: Annotated[Path, typer.Option(help="where the table is written")] = OUTPUT,
) -> None:
    """Print the rows, and write them as Markdown; those of other cases stay."""
    torch.set_num_threads(threads)
    rows = _rows_of(output)
    chosen = [
        (name, kept, *place)
        for name, kept in CASES
        for place in PLACES
        if fnmatch.fnmatchcase(name, only) and (engine is None or place[0] in engine)
    ]
    for case in tqdm(chosen, disable=None):
        found = row(*case)
        rows[found[:2]] = found
        tqdm.write(str(found))
    table = tabulate(rows.values(), HEADER, "github", disable_numparse=True)
    title = f"Written by `python -m benchmarks.budgets`; {processor()}, {threads} threads."
    says = (__doc__ or "").partition("\n\n    python")[2].partition("\n\n")[2]
    output.write_text("\n\n".join(["# Budgets of latency", title, says.strip(), table]) + "\n")


def row(name: str, kept: float, engine: str, precision: str) -> tuple[str, ...]:
    """The row of one case."""
    torch.manual_seed(0)
    prepared = dspfx.prepare(_network(name), torch.randn(1, 3, 224, 224))
    budget = dspfx.Budget(latency=kept, engine=engine, precision=precision)  # type: ignore[arg-type]
    started = time.perf_counter()
    report = dspfx.prune_channels(prepared, budget)
    seconds = time.perf_counter() - started
    assert isinstance(prepared, dspfx.PreparedModule)
    assert report.measured is not None
    again = WholeTimes(budget, [prepared]).fraction([prepared])
    macs = report.emitted.macs / report.before.macs
    shares = (kept, report.achieved, report.measured, again, macs)
    return name, f"{engine}, {precision}", *(f"{share:.1%}" for share in shares), f"{seconds:.0f}"


def _rows_of(page: Path) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The rows of an earlier run, by network and engine."""
    lines = page.read_text().splitlines() if page.is_file() else []
    cells = [
        tuple(c.strip() for c in line.strip("|").split("|")) for line in lines if line[:1] == "|"
    ]
    return {own[:2]: own for own in cells[2:]}


def _network(name: str) -> nn.Module:
    if name in torchvision.models.list_models():
        found: nn.Module = torchvision.models.get_model(name)
    else:
        found = timm.create_model(name)
    return found.eval()


if __name__ == "__main__":
    typer.run(main)
