"""Training or evaluation: the mode of every module by itself."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn

from dspfx.model.module import TwoModeModule


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module of `model` is afterwards in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        _set_modes(modes)


@contextmanager
def only_training(model: nn.Module, chosen: Collection[nn.Module]) -> Iterator[None]:
    """Context: all of `model` is in evaluation mode, except `chosen`; afterwards as before."""
    with modes_kept(model):
        _set_modes({module: module in chosen for module in model.modules()})
        yield


def put_all(model: nn.Module, mode: bool) -> None:
    """Put every module into `mode` without calling the model's own `train`.

    That one may use modules which are no longer there.
    """
    _set_modes(dict.fromkeys(model.modules(), mode))


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        if isinstance(module, TwoModeModule):
            TwoModeModule.train(module, mode)  # it has a graph for either
    for module, mode in modes.items():
        module.training = mode
