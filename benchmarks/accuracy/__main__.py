"""The command line of the accuracy benchmark."""

from typing import Annotated

import torch
import typer

from benchmarks.accuracy.latency import measure
from benchmarks.accuracy.methods import METHODS, TIMED, UNTRAINED
from benchmarks.accuracy.runs import DENSE, LONGER, Job, run_missing
from benchmarks.accuracy.scenarios import SCENARIOS
from benchmarks.accuracy.tables import write

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Accuracy against peers.")
PRUNED = (50, 65, 80, 90, 95)
PRUNED_UNTRAINED = (30, 50)
PRUNED_TIMED = (65, 80, 85)
TRAINED = [name for name in METHODS if name not in UNTRAINED | TIMED]
SEEDS = (0, 1, 2)


@app.command()
def run(
    scenario: Annotated[str, typer.Option(help=", ".join(SCENARIOS))] = "resnet20",
    method: Annotated[list[str] | None, typer.Option(help="only these")] = None,
    pruned: Annotated[list[int] | None, typer.Option(help="percent of the gated MACs")] = None,
    untrained: Annotated[bool, typer.Option(help="only batch norms are recalibrated")] = False,
    timed: Annotated[bool, typer.Option(help="pruned to a share of the time")] = False,
    seed: Annotated[list[int] | None, typer.Option(help="only these")] = None,
    workers: Annotated[int, typer.Option(help="jobs at a time, one thread each")] = 2,
) -> None:
    """Train what has no result yet; a second call goes on where the first was stopped."""
    group = UNTRAINED if untrained else TIMED if timed else TRAINED
    names = method or list(group)
    budgets = pruned or (PRUNED_UNTRAINED if untrained else PRUNED_TIMED if timed else PRUNED)
    jobs = []
    for s in seed or SEEDS:
        if group is TRAINED and method is None:
            jobs += [Job(scenario, name, s, 0) for name in (DENSE, LONGER)]
        jobs += [Job(scenario, name, s, p) for p in budgets for name in names]
    run_missing(jobs, workers)


@app.command()
def latency(
    scenario: Annotated[str, typer.Option(help=", ".join(SCENARIOS))] = "resnet20",
    seed: Annotated[int, typer.Option(help="whose networks are timed")] = 0,
    batch: Annotated[int, typer.Option(help="images in a call")] = 8,
    threads: Annotated[int, typer.Option(help="of every runtime")] = 2,
    method: Annotated[list[str] | None, typer.Option(help="only these, and dense")] = None,
) -> None:
    """Time the networks that were trained, in turns."""
    torch.set_num_threads(threads)
    options = "".join(f' --method "{name}"' for name in method or [])
    command = f"python -m benchmarks.accuracy latency --scenario {scenario} --batch {batch}"
    measure(scenario, seed, batch, method, command + options)


@app.command()
def tables() -> None:
    """Write docs/accuracy.md and its pictures."""
    write()


@app.callback()
def main() -> None:
    """Accuracy of pruned networks at equal MACs and equal training."""


if __name__ == "__main__":
    app()
