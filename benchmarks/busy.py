"""What a call takes on cores that others want as well.

    python -m benchmarks.busy [--output docs/busy.md]

What is left of a ResNet-20 in each engine, in float32: alone, beside one and two processes that
compute without a pause, each engine in blocks of its own; and call by call in turns with the other
engines in one process, whose threads may still spin.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate
from torch import nn

import dspfx
from dspfx.recipe.networks.cifar_resnet import CifarResNet
from dspfx.utils.cache import processor

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "busy.md"
ENGINES, BATCHES, KEPT = ("own", "onnxruntime", "openvino"), (1, 8), 0.3
BLOCKS, SETTLE, CALLS = 3, 20, 200
BUSY = (0, 1, 2)  # other processes
IN_TURNS = "in turns"
COMPUTE = "print(flush=True)\nwhile True: pass"
HEAD = (
    "What is left of a ResNet-20 at {kept:.0%} of the MACs, by whole channels, in float32. "
    "Milliseconds of a call: median, 99th percentile and mean of {calls}. *Alone*; beside *1 busy* "
    "and *2 busy* processes that compute without a pause, each engine in blocks of its own, in "
    "turns; and *in turns*: call by call after the other engines, in one process."
)


def compact_network() -> nn.Module:
    """A ResNet-20 without what is pruned; its weights are random."""
    torch.manual_seed(0)
    prepared = dspfx.prepare(CifarResNet(20).eval(), torch.randn(2, 3, 32, 32))
    dspfx.prune_channels(prepared, dspfx.Budget(macs=KEPT))
    return dspfx.convert(prepared)


def measure(network: nn.Module, batch: int) -> dict[str, dict[str | int, list[float]]]:
    """By engine and situation, the milliseconds of every call."""
    x = torch.randn(batch, 3, 32, 32)
    calls = {name: partial(dspfx.compile(network, x, engines=[name]), x) for name in ENGINES}
    times: dict[str, dict[str | int, list[float]]] = {
        name: {situation: [] for situation in (*BUSY, IN_TURNS)} for name in calls
    }
    for _ in range(BLOCKS):
        for count in BUSY:
            with _others(count):
                for name, call in calls.items():
                    times[name][count] += _milliseconds({name: call})[name]
        for name, found in _milliseconds(calls).items():
            times[name][IN_TURNS] += found
    return times


@contextlib.contextmanager
def _others(count: int) -> Iterator[None]:
    """So many processes that compute."""
    command = [sys.executable, "-c", COMPUTE]
    busy = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in busy:
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in busy:
            process.kill()
            process.communicate()


def _milliseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Of each of `calls`, which are called in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(SETTLE + CALLS):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - started))
    return {name: found[SETTLE:] for name, found in times.items()}


def _text(times: list[float]) -> str:
    late = statistics.quantiles(times, n=100)[-1]
    return f"{statistics.median(times):.3f} / {late:.2f} / {statistics.mean(times):.3f}"


def main(
    output: Annotated[Path, typer.Option(help="where the table is written")] = OUTPUT,
    threads: Annotated[int, typer.Option(min=1, help="of each network")] = 2,
) -> None:
    """Print a table, and write it as Markdown."""
    torch.set_num_threads(threads)
    network = compact_network()
    rows = [
        (name, batch, *map(_text, times.values()))
        for batch in BATCHES
        for name, times in measure(network, batch).items()
    ]
    header = ("engine", "batch", "alone", "1 busy", "2 busy", IN_TURNS)
    title = (
        f"Written by `python -m benchmarks.busy`; {processor()}, {threads} threads on "
        f"{os.cpu_count()} cores."
    )
    head = HEAD.format(kept=KEPT, calls=BLOCKS * CALLS)
    table = tabulate(rows, header, tablefmt="github", disable_numparse=True)
    text = "\n\n".join(["# On busy cores", title, head, table]) + "\n"
    print(text)
    output.write_text(text)


if __name__ == "__main__":
    typer.run(main)
