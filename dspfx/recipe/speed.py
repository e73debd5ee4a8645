"""How long networks take: dense as it is, dense compiled, and compiled by dspfx; in turns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from dspfx.compile import compile
from dspfx.utils.timing import medians

ROUNDS = 31


@dataclass(frozen=True)
class Speed:
    """Median times of one call.

    Attributes:
        batch: images in it.
        threads: that torch uses.
        milliseconds: by the name of the network.
    """

    batch: int
    threads: int
    milliseconds: dict[str, float]

    def __str__(self) -> str:
        rows = [(name, f"{ms:.2f}") for name, ms in self.milliseconds.items()]
        head = f"batch of {self.batch}, {self.threads} threads"
        lines = [tabulate(rows, (head, "ms"), disable_numparse=True)]
        if "compact, compiled" in self.milliseconds:
            ratio = self.milliseconds["dense, compiled"] / self.milliseconds["compact, compiled"]
            lines.append(f"compact is {ratio:.2f} times as fast")
        return "\n".join(lines)


def speed(
    dense: nn.Module,
    compact: nn.Module | None,
    x: Tensor,
    *,
    rounds: int = ROUNDS,
    say: Callable[[str], None] = lambda text: None,
) -> Speed:
    """Time `dense`, and `compact` if there is one, on the images `x`.

    Args:
        dense: in evaluation mode from here on.
        compact: from `dspfx.convert`.
        x: `[N, C, H, W]`, on the device of both.
        rounds: how often each is timed.
        say: called with a line on what is being done.
    """
    dense.eval()
    calls: dict[str, Callable[[], Any]] = {"dense, eager": partial(_without_gradients, dense, x)}
    compiled: Mapping[str, nn.Module | None] = {
        "dense, compiled": dense,
        "compact, compiled": compact,
    }
    for name, model in compiled.items():
        if model is not None:
            say(f"compiling: {name.partition(',')[0]}")
            calls[name] = partial(compile(model, x), x)
    times = medians(calls, rounds)
    found = {name: 1e3 * seconds for name, seconds in times.items()}
    return Speed(len(x), torch.get_num_threads(), found)


def _without_gradients(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return model(x)
