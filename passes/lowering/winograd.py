"""Algorithm selection: which layers Winograd's algorithm makes faster, measured inside their run.

It halves the products, and has to write transformed rows: layers of many channels gain, those of
few channels or of small groups lose.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dspfx.layers.group_conv_run import GroupConvRun
from dspfx.passes.lowering.measure import layer_medians

Choice = Mapping[str, tuple[int, ...]]


def measured_choice(model: nn.Module, inputs: tuple[Any, ...]) -> Choice:
    """For every run in `model` the layers to compute by Winograd's algorithm, by number.

    Args:
        model: in evaluation mode; it is run once.
        inputs: positional inputs.
    """
    with torch.no_grad():
        return {
            name: _faster(run, given) for name, (run, given) in _called_runs(model, inputs).items()
        }


def choose(model: nn.Module, choice: Choice) -> None:
    """Change the runs in `model` accordingly."""
    for path, chosen in choice.items():
        run = model.get_submodule(path)
        assert isinstance(run, GroupConvRun)
        model.set_submodule(path, run.transformed(chosen))


def _called_runs(
    model: nn.Module, inputs: tuple[Any, ...]
) -> dict[str, tuple[GroupConvRun, tuple[Any, ...]]]:
    """The runs and what they are given."""
    found: dict[str, tuple[GroupConvRun, tuple[Any, ...]]] = {}
    hooks = [
        run.register_forward_pre_hook(lambda m, args, name=name: found.update({name: (m, args)}))
        for name, run in model.named_modules()
        if isinstance(run, GroupConvRun)
    ]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _faster(run: GroupConvRun, given: tuple[Any, ...]) -> tuple[int, ...]:
    candidates = run.transformable()
    if not candidates:
        return ()
    direct, transformed = layer_medians((run.transformed(()), run.transformed(candidates)), given)
    return tuple(number for number in candidates if transformed[number] < direct[number])
