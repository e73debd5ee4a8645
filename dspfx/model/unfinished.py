"""What has begun to change a prepared model and is not done, kept as a field of its modules.

A model that is converted before that is not what its user asked for, though it is equal.
"""

import warnings
from collections.abc import Iterable

from torch import nn

from dspfx.errors import DspfxWarning
from dspfx.model.module import PreparedModule

EARLY = (
    "converted before it was done: {states}. Train on until it is, or go on from here if that is "
    "what you want: the compact model equals the prepared one as it is now"
)


def note_unfinished(model: nn.Module, tool: str, state: str | None) -> None:
    """Note in the prepared modules of `model` how far `tool` has come; None if it is done."""
    for module in model.modules():
        if isinstance(module, PreparedModule):
            others = {name: text for name, text in module.unfinished_pruning if name != tool}
            own = {} if state is None else {tool: state}
            module.unfinished_pruning = tuple((others | own).items())


def note_steps(model: nn.Module, tool: str, done: int, total: int) -> None:
    """Note that `tool` has done so many of its steps, until these are all."""
    note_unfinished(model, tool, None if done >= total else f"{done} of {total} steps")


def warn_if_unfinished(modules: Iterable[PreparedModule]) -> None:
    """Warn, once for all `modules`, of what has not come to its end in them."""
    found = dict.fromkeys(pair for module in modules for pair in module.unfinished_pruning)
    if found:
        states = "; ".join(f"{tool} has done {state}" for tool, state in found)
        warnings.warn(EARLY.format(states=states), DspfxWarning, stacklevel=3)
