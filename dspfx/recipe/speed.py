"""How long networks take: dense as it is, and dense and compact in their fastest engines."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from dspfx.compile import compile
from dspfx.convert import convert
from dspfx.engines.report import CompileReport
from dspfx.prepare import prepare
from dspfx.recipe.networks.outputs import logits_of
from dspfx.utils.timing import in_blocks

EAGER, DENSE, COMPACT = "dense, eager", "dense, compiled", "compact, compiled"


@dataclass(frozen=True)
class Speed:
    """Median times of one call.

    Attributes:
        batch: images in it.
        threads: that torch uses.
        milliseconds: by the name of the network, each in its fastest engine.
        reports: of the engines, by the name of the network.
        accuracies: on test images, in these engines, where there are any.
    """

    batch: int
    threads: int
    milliseconds: dict[str, float]
    reports: Mapping[str, CompileReport] = field(default_factory=dict)
    accuracies: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        tables = [f"{name}\n\n{report}" for name, report in self.reports.items()]
        rows = [
            (name, self._engine(name), f"{ms:.2f}", *self._accuracy(name))
            for name, ms in self.milliseconds.items()
        ]
        head = f"batch of {self.batch}, {self.threads} threads"
        header = (head, "", "ms", *(["accuracy"] if self.accuracies else []))
        lines = [tabulate(rows, header, disable_numparse=True)]
        if COMPACT in self.milliseconds:
            ratio = self.milliseconds[DENSE] / self.milliseconds[COMPACT]
            lines.append(f"compact is {ratio:.2f} times as fast, each in its fastest engine")
        return "\n\n".join([*tables, "\n".join(lines)])

    def _accuracy(self, name: str) -> list[str]:
        return [f"{self.accuracies[name]:.2%}"] if name in self.accuracies else []

    def _engine(self, name: str) -> str:
        return str(self.reports[name].chosen) if name in self.reports else ""


def speed(
    dense: nn.Module,
    compact: nn.Module | None,
    x: Tensor,
    *,
    engines: Sequence[str] | None = None,
    precision: Any = "fp32",
    batches: Sequence[Tensor] | None = None,
    test: Callable[[int], Iterable[tuple[Tensor, Tensor]]] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Speed:
    """Time `dense`, and `compact` if there is one, on the images `x`.

    Args:
        dense: in evaluation mode from here on.
        compact: from `dspfx.convert`.
        x: `[N, C, H, W]`, on the device of both.
        engines, precision, batches: see `dspfx.compile`.
        test: gives images and labels in batches of a size, for an accuracy.
        say: called with a line on what is being done.
    """
    dense.eval()
    if precision in ("int8", "auto"):  # which takes what dspfx has converted
        dense = convert(prepare(dense, x))
    calls: dict[str, Callable[[], Any]] = {EAGER: partial(_without_gradients, dense, x)}
    reports, accuracies = {}, {}
    for name, model in ((DENSE, dense), (COMPACT, compact)):
        if model is not None:
            say(f"timing the engines: {name.partition(',')[0]}")
            fast = compile(model, x, engines=engines, precision=precision, batches=batches)
            calls[name], reports[name] = partial(fast, x), fast.report
            if test is not None:
                accuracies[name] = _accuracy_of(fast, test(len(x)))
    found = {name: 1e3 * seconds for name, seconds in in_blocks(calls).items()}
    return Speed(len(x), torch.get_num_threads(), found, reports, accuracies)


def _accuracy_of(call: Callable[[Tensor], Any], batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    right = count = 0
    for x, y in batches:
        right += int((logits_of(call(x)).argmax(1) == y).sum())
        count += len(y)
    return right / count


def _without_gradients(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return model(x)
