"""Comparing the speed of several callables fairly: in one process, in turns, by medians."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name")

ROUNDS = 21
WARM_UP_CALLS = 3


def medians(
    calls: Mapping[Name, Callable[[], object]],
    rounds: int = ROUNDS,
    *,
    warm_up: float = 0.3,
    round_takes: float = 0.0,
    settle: float = 0.0,
) -> dict[Name, float]:
    """The median seconds that one call of each of `calls` takes.

    Each is warmed up until allocator, caches and clock rate have settled. Then they are timed in
    turns, so that a disturbance of the machine meets all of them alike; every second round goes
    backwards, so that none always follows the same other.

    Args:
        calls: by name.
        rounds: how many times each is timed.
        warm_up: seconds for which each is called before.
        settle: seconds for which each is called untimed before it is timed, in every round: other
            runtimes' threads go on spinning for a while.
        round_takes: calls that are shorter than this many seconds are repeated within a round.
    """
    count = {
        name: max(1, round(round_takes / _warmed_up(call, warm_up))) for name, call in calls.items()
    }
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            if settle:
                _warmed_up(calls[name], settle)
            times[name].append(_seconds(calls[name], count[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def block(call: Callable[[], object], calls: int, warm_up: float = 0.0) -> float:
    """The median seconds of `calls` calls in a row, warmed up before."""
    _warmed_up(call, warm_up)
    return statistics.median(_seconds(call, 1) for _ in range(calls))


def in_blocks(
    calls: Mapping[Name, Callable[[], object]],
    *,
    rounds: int = 3,
    least: int = 25,
    least_time: float = 0.2,
    warm_up: float = 0.1,
) -> dict[Name, float]:
    """The median seconds that one call of each of `calls` takes, each timed in blocks of its own.

    Threads of one runtime that still spin take the cores of the next: where runtimes differ, calls
    in turns measure that. So each is called for a while by itself, in turns of blocks; every
    second round goes backwards.

    Args:
        calls: by name.
        rounds: blocks of each.
        least: calls of a block, at least.
        least_time: seconds that a block takes, at least.
        warm_up: seconds of untimed calls before a block.
    """
    times: dict[Name, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            takes = _warmed_up(calls[name], warm_up)
            count = max(least, math.ceil(least_time / takes))
            times[name] += [_seconds(calls[name], 1) for _ in range(count)]
    return {name: statistics.median(values) for name, values in times.items()}


def _warmed_up(call: Callable[[], object], seconds: float) -> float:
    """About how long a call takes in the end."""
    started, done, last = time.perf_counter(), 0, 0.0
    while done < WARM_UP_CALLS or time.perf_counter() - started < seconds:
        last = _seconds(call, 1)
        done += 1
    return max(last, 1e-7)


def _seconds(call: Callable[[], object], count: int) -> float:
    """The seconds of one call out of `count`, work on an accelerator finished."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return (time.perf_counter() - start) / count
