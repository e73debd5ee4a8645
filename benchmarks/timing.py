"""Comparing the speed of several callables fairly: in one process, in turns, by medians."""

import statistics
import time
from collections.abc import Callable, Mapping

REPEATS = 21
WARM_UP_CALLS = 3
WARM_UP_SECONDS = 0.3


def medians(calls: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, float]:
    """The median milliseconds that each of `calls` takes.

    Each is warmed up until allocator, caches and clock rate have settled. Then they are timed in
    turns, so that a disturbance of the machine meets all of them alike; every second round goes
    backwards, so that none always follows the same other.
    """
    for call in calls.values():
        _warm_up(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        names = list(calls) if turn % 2 == 0 else list(reversed(calls))
        for name in names:
            times[name].append(_milliseconds(calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _warm_up(call: Callable[[], object]) -> None:
    started, done = time.perf_counter(), 0
    while done < WARM_UP_CALLS or time.perf_counter() - started < WARM_UP_SECONDS:
        call()
        done += 1


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)
