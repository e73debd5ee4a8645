"""Run the cases, or write the tables."""

import fnmatch
import itertools
import os
import subprocess
import sys
from typing import Annotated

import torch
import typer

from benchmarks.latency import results, tables
from benchmarks.latency.measure import Case, measure
from benchmarks.latency.zoo import networks

BATCHES, PRECISIONS, KEEP = (1, 8), ("fp32", "bf16", "int8"), (0.5, 0.3)
app = typer.Typer(add_completion=False, no_args_is_help=True)
Only = Annotated[str, typer.Option(help="Pattern of the networks' names.")]
Batch = Annotated[list[int], typer.Option(help="Sizes of a batch.")]
Precision = Annotated[list[str], typer.Option(help="fp32, bf16, int8.")]
Keep = Annotated[list[float], typer.Option(help="Shares of the MACs.")]
Engine = Annotated[list[str] | None, typer.Option(help="Those that race; all if left out.")]
Threads = Annotated[int, typer.Option(min=1, help="Of every engine.")]
TimeLimit = 900  # seconds of a case


@app.command()
def run(
    only: Only = "*",
    batch: Batch = list(BATCHES),  # noqa: B006
    precision: Precision = list(PRECISIONS),  # noqa: B006
    keep: Keep = list(KEEP),  # noqa: B006
    threads: Threads = 2,
    engine: Engine = None,
) -> None:
    """Time the cases that are not in the results, each in a process of its own."""
    torch.set_num_threads(threads)
    done = {results.key_of(line) for line in results.read()}
    for network, kept, size, type_ in itertools.product(networks(), keep, batch, precision):
        if network.masked is not None and kept != keep[0]:
            continue  # the authors' masks keep what they keep
        case = Case(network, size, type_, kept)
        if fnmatch.fnmatchcase(network.name, only) and results.key_of(case.key) not in done:
            words = [network.name, str(size), type_, str(kept), str(threads), *(engine or ())]
            command = [sys.executable, "-m", "benchmarks.latency", "one", *words]
            try:
                subprocess.run(command, check=False, timeout=TimeLimit, env=dict(os.environ))
            except subprocess.TimeoutExpired:
                print(f"{' '.join(words)}: over {TimeLimit} s", file=sys.stderr)


@app.command(hidden=True)
def one(
    name: str,
    batch: int,
    precision: str,
    keep: float,
    threads: int,
    engines: Annotated[list[str] | None, typer.Argument()] = None,
) -> None:
    """Time one case, and add it to the results."""
    torch.set_num_threads(threads)
    network = next(network for network in networks() if network.name == name)
    line = measure(Case(network, batch, precision, keep, tuple(engines) if engines else None))
    results.append(line)
    found = {n: round(v["ms"], 3) if "ms" in v else v for n, v in line["variants"].items()}
    print(name, batch, precision, keep, found, flush=True)


@app.command(name="tables")
def write_tables() -> None:
    """Write docs/latency.md."""
    tables.write()


if __name__ == "__main__":
    app()
