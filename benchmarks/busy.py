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
from dspfx.recipe.networks.cifar_resnet import CifarResNet

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "busy.md"
BATCHES, KEPT = (1, 8), 0.36
BLOCKS, SETTLE, CALLS = 5, 10, 60
POLICY = "OMP_WAIT_POLICY"
POLICIES = {"spin (the default)": {}, f"sleep ({POLICY}=PASSIVE)": {POLICY: "PASSIVE"}}
SITUATIONS = ("alone", "busy")
COMPUTE = "print(flush=True)\nwhile True: pass"


def measure(threads: int) -> dict[str, dict[str, list[float]]]:
    """By network and situation, the milliseconds of every call with the policy of this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = CifarResNet(20).eval()
    calls: dict[str, Callable[[], Any]] = {}
    for batch in BATCHES:
        x = torch.randn(batch, 3, 32, 32)
        prepared = dspfx.prepare(model, x)
        dspfx.cluster_groups(prepared)
        dspfx.prune(prepared, dspfx.Budget(macs=KEPT, count="masks"))
        networks = {"dense": model, f"{KEPT:.0%} of the MACs": dspfx.convert(prepared)}
        for name, network in networks.items():
            fast = dspfx.compile(network, x)
            calls[f"{name}, batch {batch} ({fast.report.chosen})"] = partial(fast, x)
    times: dict[str, dict[str, list[float]]] = {
        name: {situation: [] for situation in SITUATIONS} for name in calls
    }
    for _ in range(BLOCKS):
        for situation in SITUATIONS:
            with _others(threads if situation == "busy" else 0):
                for name, call in calls.items():
                    times[name][situation] += _milliseconds(call)
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


def _milliseconds(call: Callable[[], Any]) -> list[float]:
    times = []
    for _ in range(SETTLE + CALLS):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return times[SETTLE:]


def _text(times: list[float]) -> str:
    late = statistics.quantiles(times, n=10)[-1]
    return f"{statistics.median(times):.2f} / {statistics.mean(times):.2f} / {late:.2f}"


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
    given = {name: value for name, value in os.environ.items() if name != POLICY}
    rows = []
    for policy, variables in POLICIES.items():
        done = subprocess.run(
            command, env=given | variables, stdout=subprocess.PIPE, text=True, check=True
        )
        for name, times in json.loads(done.stdout.splitlines()[-1]).items():
            rows.append((name, policy, *(_text(times[situation]) for situation in SITUATIONS)))
    header = ("network", "threads that wait", *SITUATIONS)
    text = "\n".join(
        [
            "# On busy cores",
            "",
            f"Written by `python -m benchmarks.busy`; a ResNet-20, {threads} threads on "
            f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, torch "
            f"{torch.__version__}. Milliseconds of a call: median, mean and ninth decile of "
            f"{BLOCKS * CALLS}; *alone* and, in turns with it, *busy*: beside {threads} other "
            "processes that compute without a pause. What `dspfx.compile` chose is in brackets.",
            "",
            tabulate(sorted(rows), header, tablefmt="github", disable_numparse=True),
            "",
        ]
    )
    print(text)
    output.write_text(text)


if __name__ == "__main__":
    typer.run(main)
