"""How long the reference networks take, dense and compact, eager and compiled.

    python -m benchmarks.reference_nets [--reference DIR] [--threads 2] [--repeats 21]

Dense is the network before pruning, at full width; compact is what `dspfx.convert` makes of the
authors' masks. Compiled is `dspfx.compile`: inductor with frozen weights.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import dspfx
from benchmarks.reference import DEFAULT_FOLDER, Reference, find, load
from dspfx.timing import medians

BATCHES = (1, 8, 64)


def main(
    reference: Annotated[Path, typer.Option(help="folder of the networks")] = DEFAULT_FOLDER,
    threads: Annotated[int, typer.Option(min=1, help="threads torch uses")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="timed rounds")] = 21,
) -> None:
    """Print the milliseconds of every network and batch size."""
    torch.set_num_threads(threads)
    try:
        networks = [load(path) for path in find(reference)]
    except dspfx.DataError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    cases = [(network, batch) for network in networks for batch in BATCHES]
    rows = [
        (network.name, batch, *measure(network, batch, repeats))
        for network, batch in tqdm(cases, "compiling and timing", disable=None)
    ]
    header = ("network", "batch", *CALLS, "dense compiled / compact compiled")
    print(f"milliseconds, medians of {repeats}, {threads} threads, torch {torch.__version__}")
    print(tabulate(rows, header, floatfmt=".2f"))


CALLS = ("dense eager", "dense compiled", "compact eager", "compact compiled")


def measure(network: Reference, batch: int, repeats: int) -> tuple[float, ...]:
    """Milliseconds of the four `CALLS`, and the ratio of the compiled two."""
    torch.compiler.reset()  # or torch would compile for all batch sizes at once
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    dense, compact = network.dense(), dspfx.convert(network.prepared())
    models = (_eager(dense), dspfx.compile(dense, x), _eager(compact), dspfx.compile(compact, x))
    calls = {name: partial(model, x) for name, model in zip(CALLS, models, strict=True)}
    times = {name: 1e3 * seconds for name, seconds in medians(calls, repeats).items()}
    return (*times.values(), times["dense compiled"] / times["compact compiled"])


def _eager(model: nn.Module) -> Callable[..., Any]:
    return torch.no_grad()(model.forward)


if __name__ == "__main__":
    typer.run(main)
