"""What the tables of models share: a process for each of them, FLOPs and differences."""

import math
import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.zoo import Case
from dspfx.utils.pytree import leaves

T = TypeVar("T")


def examined(
    cases: list[Case],
    examine: Callable[[Case], T],
    failed: Callable[[Case, str], T],
    *,
    workers: int,
    seconds: float,
) -> Iterator[T]:
    """What `examine` finds out about each of `cases`, as it is found, each in its own process.

    Args:
        examine: runs in a fork of this process; what it returns has to be picklable.
        failed: stands for it where `examine` raised, took too long or brought the process down.
        workers: models examined at a time.
        seconds: that each may take.
    """
    waiting = list(reversed(cases))
    running: dict[Any, tuple[Case, Any, float]] = {}
    context = multiprocessing.get_context("fork")
    while waiting or running:
        while waiting and len(running) < workers:
            case = waiting.pop()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_examine, args=(examine, case, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = case, process, time.monotonic() + seconds
        soonest = min(end for _, _, end in running.values()) - time.monotonic()
        ready = multiprocessing.connection.wait(list(running), max(soonest, 0.0))
        late = [r for r, (_, _, end) in running.items() if end <= time.monotonic()]
        for receiver in dict.fromkeys([*ready, *late]):
            case, process, _ = running.pop(receiver)
            yield _result(case, receiver if receiver in ready else None, failed, seconds)
            process.kill()
            process.join()


def _examine(examine: Callable[[Case], T], case: Case, sender: Any) -> None:
    try:
        sender.send((True, examine(case)))
    except Exception as error:
        sender.send((False, f"{type(error).__name__}: {error}"))


def _result(case: Case, receiver: Any, failed: Callable[[Case, str], T], seconds: float) -> T:
    if receiver is None:
        return failed(case, f"took more than {seconds:.0f} s")
    try:
        found, result = receiver.recv()
    except EOFError:
        return failed(case, "its process ended, for want of memory perhaps")
    return result if found else failed(case, " ".join(str(result).split()))


def flops(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> dict[str, dict[Any, int]]:
    """FLOPs of every module by its path, `Global` for all, and by the operator that took them.

    Attention and recurrent layers are taken apart into operators that torch counts.
    """
    with _counted_operators(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **(kwargs or {}))
    counts: dict[str, dict[Any, int]] = counter.get_flop_counts()
    return counts


@contextmanager
def _counted_operators() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        enabled, *_ = torch.backends.mkldnn.set_flags(False)
        stack.callback(torch.backends.mkldnn.set_flags, enabled)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def relative_difference(expected: Any, actual: Any) -> float:
    """The largest difference of any output, relative to its largest value; NaN if none is there."""
    worst = -1.0
    for a, b in zip(leaves(expected), leaves(actual), strict=True):
        if not isinstance(a, Tensor) or not a.is_floating_point() or not a.numel():
            continue
        if a.shape != b.shape:
            return float("inf")
        difference = float((a - b).abs().max()) / max(float(a.abs().max()), 1e-30)
        worst = float("inf") if math.isnan(difference) else max(worst, difference)
    return worst if worst >= 0 else float("nan")
