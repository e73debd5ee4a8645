"""Repair without training: what is left of the accuracy, and what a few images bring back.

    python -m benchmarks.repair [--only PATTERN] [--seed N] [--images N]

The networks of [Accuracy](accuracy.md), trained on Fashion-MNIST-20k, pruned by a share of the MACs
of their gated layers, and not trained afterwards. *Channels* are whole ones, by `prune_channels`;
*groups* drop inputs, by `cluster_groups` and `prune` without whole filters; both weigh energy by
`input_moments`. `recalibrate` and `compensate` see the same training images, no labels; *both* is
`compensate`, then `recalibrate`. Torch-Pruning takes channels of the least magnitude, at
most as many MACs are left, and its batch norms are recalibrated on the same images. Top-1 on all
10,000 test images, percent, the mean over seeds.
"""

import copy
import fnmatch
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import dspfx
from benchmarks.accuracy.groups import prepared_for
from benchmarks.accuracy.protocol import accuracy, fashion_mnist, generator
from benchmarks.accuracy.runs import dense_network
from benchmarks.accuracy.scenarios import SCENARIOS
from benchmarks.accuracy.setting import Run, dense_macs, macs_of
from benchmarks.accuracy.torch_pruning_channels import by_magnitude

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "repair.md"
NETWORKS = tuple(name for name in ("resnet20", "mobile", "vit") if name in SCENARIOS)
PRUNED = (30, 50)
GROUPS, BATCH = 4, 64
REPAIRS: dict[str, tuple[Callable[[nn.Module, list[Tensor]], object], ...]] = {
    "nothing": (),
    "recalibrate": (dspfx.recalibrate,),
    "compensate": (dspfx.compensate,),
    "both": (dspfx.compensate, dspfx.recalibrate),
}
HEADER = ("network", "dense", "pruned", "what went", *REPAIRS, "Torch-Pruning", "seeds")


def main(
    only: Annotated[str, typer.Option(help="pattern of networks")] = "*",
    seed: Annotated[list[int] | None, typer.Option(help="only these")] = None,
    images: Annotated[int, typer.Option(min=1, help="to repair with")] = 512,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    output: Annotated[Path, typer.Option(help="where the table is written")] = OUTPUT,
) -> None:
    """Print the rows, and write them as Markdown; those of other networks stay."""
    torch.set_num_threads(threads)
    rows = _rows_of(output)
    for name in tqdm([n for n in NETWORKS if fnmatch.fnmatchcase(n, only)], disable=None):
        found = [_figures(name, s, images) for s in seed or (0, 1, 2)]
        for (pruned, what), first in found[0].items():
            means = {k: f"{mean(f[pruned, what][k] for f in found):.2f}" for k in first}
            dense, *others = means.values()
            row = SCENARIOS[name].title.partition(",")[0], dense, f"{pruned} %", what, *others
            rows[row[0], row[2], row[3]] = (*row, str(len(found)))
            tqdm.write(str((*row, len(found))))
    table = tabulate(rows.values(), HEADER, "github", disable_numparse=True)
    title = f"Written by `python -m benchmarks.repair`; {images} images."
    says = (__doc__ or "").partition("\n\n    python")[2].partition("\n\n")[2]
    output.write_text("\n\n".join(["# Repair without training", title, says.strip(), table]) + "\n")


def _figures(name: str, seed: int, images: int) -> dict[tuple[int, str], dict[str, float]]:
    """The accuracies of one network, by how much of it went and what."""
    scenario = SCENARIOS[name]
    data = fashion_mnist(scenario.images)
    dense = dense_network(scenario, data, seed).eval()
    run = Run(scenario, data, dense, generator("repair", name, seed))
    batches = list(data.train_x[:images].cpu().split(BATCH))
    whole, gated = dense_macs(dense)
    of_dense = accuracy(dense, data)
    found = {}
    for pruned in PRUNED:
        macs = whole - gated * pruned // 100
        peer = by_magnitude(dense, macs, run)
        dspfx.recalibrate(peer, batches)
        of_peer = accuracy(peer, data)
        for what, prune in (("channels", _channels), ("groups", _groups)):
            prepared = prepared_for(run, GROUPS)
            prune(prepared, dspfx.Budget(macs=macs / whole, count="masks"), batches)
            if macs_of(prepared) > macs:
                raise AssertionError(f"{name}, {pruned} %: {macs_of(prepared)} MACs are left")
            own = {"dense": of_dense}
            for repair, steps in REPAIRS.items():
                repaired = copy.deepcopy(prepared)
                for step in steps:
                    step(repaired, batches)
                own[repair] = accuracy(repaired, data)
            found[pruned, what] = own | {"Torch-Pruning": of_peer}
    return found


def _channels(prepared: nn.Module, budget: dspfx.Budget, batches: list[Tensor]) -> None:
    dspfx.prune_channels(prepared, budget, moments=dspfx.input_moments(prepared, batches))


def _groups(prepared: nn.Module, budget: dspfx.Budget, batches: list[Tensor]) -> None:
    moments = dspfx.input_moments(prepared, batches)
    dspfx.cluster_groups(prepared, moments=moments)
    dspfx.prune(prepared, budget, moments=moments, drop_filters=False)


def _rows_of(page: Path) -> dict[tuple[str, ...], tuple[str, ...]]:
    """The rows of an earlier run, by network, share, and what went."""
    lines = page.read_text().splitlines() if page.is_file() else []
    cells = [
        tuple(c.strip() for c in line.strip("|").split("|")) for line in lines if line[:1] == "|"
    ]
    return {(own[0], own[2], own[3]): own for own in cells[2:]}


if __name__ == "__main__":
    typer.run(main)
