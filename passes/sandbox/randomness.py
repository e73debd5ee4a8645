"""Random generators: detect draws that a graph cannot repeat (Python, NumPy), and pin seeds."""

import copy
import pickle
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_SEED = 6_917_529  # arbitrary


def generators_of(root: nn.Module) -> list[Any]:
    """Torch's, Python's and numpy's generators that the modules of `root` have as attributes."""
    return generators_among(value for m in root.modules() for value in vars(m).values())


def generators_among(values: Iterable[Any]) -> list[Any]:
    """The random number generators among `values`."""
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if (numpy := sys.modules.get("numpy")) is not None:
        kinds += (numpy.random.Generator, numpy.random.RandomState)
    found: dict[type, bool] = {}  # by class: asking each of many values takes long
    for value in (values := list(values)):
        kind = type(value)
        if kind not in found:
            found[kind] = isinstance(value, kinds)
    return [value for value in values if found[type(value)]]


def drawn_so_far(own: Iterable[Any]) -> list[bytes]:
    """The states of Python's, numpy's and the generators `own`: they change with every draw."""
    states = [_state(generator) for generator in (*_everybodys(), *own)]
    return [pickle.dumps(x.tolist() if isinstance(x, torch.Tensor) else x) for x in states]


@contextmanager
def nothing_drawn(own: Iterable[Any]) -> Iterator[None]:
    """Raise a `TypeError` if Python's, numpy's or the generators `own` have been drawn from."""
    before = drawn_so_far(own)
    yield
    if drawn_so_far(own) != before:
        raise TypeError("it draws random numbers that are not torch's own")


def drawn_by_torch() -> list[bytes]:
    """The states of torch's own generators: they change with every draw."""
    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch leaves it so
    on_gpus = torch.cuda.default_generators if begun else ()
    return [g.get_state().numpy().tobytes() for g in (torch.default_generator, *on_gpus)]


@contextmanager
def generators_kept(own: Iterable[Any] = ()) -> Iterator[None]:
    """Restore the states of Python's, numpy's and `own` generators afterwards."""
    before = [(generator, _state(generator)) for generator in (*_everybodys(), *own)]
    try:
        yield
    finally:
        for generator, state in before:
            _set_state(generator, state)


@contextmanager
def fixed_seeds(device: torch.device) -> Iterator[None]:
    """All generators, torch's for the CPU and `device`, draw the same whenever this is entered."""
    on_gpu = device.type == "cuda"
    with generators_kept(), torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(_SEED)
        if on_gpu:
            torch.cuda.default_generators[device.index or 0].manual_seed(_SEED)
        for generator in _everybodys():
            generator.seed(_SEED)
        yield


def _everybodys() -> list[Any]:
    """The modules whose functions draw from a generator of their own."""
    numpy = sys.modules.get("numpy")
    return [random] if numpy is None else [random, numpy.random]


def _state(generator: Any) -> Any:
    if hasattr(generator, "getstate"):
        return generator.getstate()
    if hasattr(generator, "get_state"):
        return generator.get_state()
    return copy.deepcopy(generator.bit_generator.state)


def _set_state(generator: Any, state: Any) -> None:
    if hasattr(generator, "setstate"):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state
