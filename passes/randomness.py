"""Random numbers that are not torch's: a graph cannot draw them anew."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def drawn_so_far() -> tuple[Any, ...]:
    """What Python's and numpy's generators will draw next; the same as long as nobody draws."""
    numpy = sys.modules.get("numpy")
    state = () if numpy is None else numpy.random.get_state()
    return random.getstate(), *(x.tobytes() if hasattr(x, "tobytes") else x for x in state)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Python's and numpy's generators draw afterwards what they would have drawn."""
    numpy = sys.modules.get("numpy")
    own, others = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(own)
        if numpy is not None:
            numpy.random.set_state(others)


def start_all_anew() -> None:
    """Let torch, Python and numpy draw the same numbers as after any other call of this."""
    torch.manual_seed(0)
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
