"""What a call takes on cores that other processes want as well.

    python -m benchmarks.busy [--output docs/busy.md]

A ResNet-20 and what is left of it, in milliseconds a call, alone and beside one busy process for
each thread; with threads that spin while they wait, as is the default, and with threads that sleep.
"""

import contextlib
import json
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

import dspfx
from dspfx.models import CifarResNet

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "busy.md"
BATCHES, CALLS, KEPT = (1, 8), 300, 0.36
POLICY = "OMP_WAIT_POLICY"
POLICIES = {"spin (the default)": {}, f"sleep ({POLICY}=PASSIVE)": {POLICY: "PASSIVE"}}
SITUATIONS = ("alone", "busy")


def measure(threads: int) -> dict[str, dict[str, tuple[float, float]]]:
    """By situation and network, what a call takes with the policy of this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = CifarResNet(20).eval()
    calls: dict[str, Callable[[], Any]] = {}
    for batch in BATCHES:
        x = torch.randn(batch, 3, 32, 32)
        prepared = dspfx.prepare(model, x)
        dspfx.cluster_groups(prepared)
        dspfx.prune(prepared, dspfx.Budget(macs=KEPT))
        networks = {"dense": model, f"{KEPT:.0%} of the MACs": dspfx.convert(prepared)}
        for name, network in networks.items():
            calls[f"{name}, batch {batch}"] = partial(dspfx.compile(network, x), x)
    times = {}
    for situation in SITUATIONS:
        with _others(threads if situation == "busy" else 0):
            times[situation] = {name: _quantiles(call) for name, call in calls.items()}
    return times


@contextlib.contextmanager
def _others(count: int) -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def _quantiles(call: Callable[[], Any]) -> tuple[float, float]:
    """The median and the ninth decile, in milliseconds."""
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times), statistics.quantiles(times, n=10)[-1]


def main(
    output: Annotated[Path, typer.Option(help="where the table is written")] = OUTPUT,
    threads: Annotated[int, typer.Option(min=1, help="of each network")] = 2,
    one: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Print a table of all policies, and write it as Markdown; `one` prints this process's."""
    if one:
        print(json.dumps(measure(threads)))
        return
    command = [sys.executable, "-m", "benchmarks.busy", "--one", "--threads", str(threads)]
    rows = []
    for policy, variables in POLICIES.items():
        done = subprocess.run(
            command, env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        for name in found["alone"]:
            times = (found[situation][name] for situation in SITUATIONS)
            rows.append((name, policy, *(f"{median:.2f} / {late:.2f}" for median, late in times)))
    header = ("network", "threads that wait", *SITUATIONS)
    text = "\n".join(
        [
            "# On busy cores",
            "",
            f"Written by `python -m benchmarks.busy`; a ResNet-20, {threads} threads on "
            f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, torch "
            f"{torch.__version__}. Milliseconds of a call, the median and the ninth decile of "
            f"{CALLS}; *busy*: beside {threads} other processes that compute without a pause.",
            "",
            tabulate(sorted(rows), header, tablefmt="github", disable_numparse=True),
            "",
        ]
    )
    print(text)
    output.write_text(text)


if __name__ == "__main__":
    typer.run(main)
