"""Batches, as users give them, to calls of a model."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from dspfx.model.module import CompactModule, PreparedModule


def call_with(model: nn.Module, batch: Any) -> None:
    """Call `model` with a batch: a tensor, a tuple or list of inputs, or a dict of them by name.

    Of a tuple that is longer than the model has required inputs, the first ones are taken.
    """
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch[: _inputs(model)])
    else:
        model(batch)


def _inputs(model: nn.Module) -> int | None:
    """How many positional inputs to give: the required ones, or else one; None for any number."""
    if isinstance(model, PreparedModule | CompactModule):
        return len(model.example_inputs)
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in parameters if p.kind in kinds]
    required = sum(p.default is p.empty for p in positional)
    return min(max(1, required), len(positional))
