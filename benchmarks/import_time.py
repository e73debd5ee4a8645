"""How long `import dspfx` takes beside `import torch`, which it contains.

    python -m benchmarks.import_time

Every import is timed in a fresh process, the two in turns; the medians count.
"""

import subprocess
import sys
from statistics import median
from typing import Annotated

import typer
from tabulate import tabulate
from tqdm import trange

MODULES = ("torch", "dspfx")
TIMED = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds(module: str) -> float:
    """The time that a fresh process takes to import `module`; the start of Python not counted."""
    command = [sys.executable, "-c", TIMED.format(module)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout)


def main(
    rounds: Annotated[int, typer.Option(min=1, help="how often each is imported")] = 15,
) -> None:
    """Print the medians, and how they compare."""
    for module in MODULES:  # files are read from the disk once, and compiled to bytecode
        seconds(module)
    taken: dict[str, list[float]] = {module: [] for module in MODULES}
    for _ in trange(rounds, disable=None, leave=False):
        for module in MODULES:
            taken[module].append(seconds(module))
    medians = {module: median(times) for module, times in taken.items()}
    rows = [(f"import {m}", f"{s:.2f}", f"{s / medians['torch']:.2f}") for m, s in medians.items()]
    print(tabulate(rows, ("", "seconds", "over torch"), disable_numparse=True))


if __name__ == "__main__":
    typer.run(main)
