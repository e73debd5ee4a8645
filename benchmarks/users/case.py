"""How models of other libraries are listed: what makes each, and what it is called with."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import Case

Inputs = tuple[Any, ...] | dict[str, Any]
Draw = Callable[[torch.Generator, int], Inputs]
Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class UsersModel:
    """How one model is made, and what it is called with.

    Attributes:
        make: builds it, with whatever weights.
        draw: inputs of the first size, given 0, or of the second, given 1.
    """

    make: Make
    draw: Draw


MODELS: dict[Case, UsersModel] = {}


def images(first: int, second: int = 0, channels: int = 3, dims: int = 2) -> Draw:
    """Two images of a side of `first`; three, of another height and width if there is a second."""

    def draw(generator: torch.Generator, size: int) -> Inputs:
        side = [first] * dims
        if size and second:
            side = [second] * (dims - 1) + [second if dims > 2 else second + first // 2]
        return (torch.rand(2 + size, channels, *side, generator=generator),)

    return draw


def tokens(first: int, second: int, vocabulary: int = 100) -> Draw:
    """Sentences of two lengths, the first of them padded at its end."""

    def draw(generator: torch.Generator, size: int) -> Inputs:
        shape = 2 + size, (first, second)[size]
        ids = torch.randint(2, vocabulary, shape, generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        return {"input_ids": ids, "attention_mask": mask}

    return draw


def features(*shapes: tuple[int, ...]) -> Draw:
    """A tensor of the first shape or of the second."""
    return lambda generator, size: (torch.rand(shapes[size], generator=generator),)


def add(library: str, family: str, draw: Draw, **makers: Make) -> None:
    """List models of one family, which are called alike."""
    for name, make in makers.items():
        MODELS[Case(library, family, name)] = UsersModel(make, draw)


def attribute(module: str, name: str, *args: Any, **settings: Any) -> Make:
    """What builds the model that `name` of `module` makes of the arguments."""

    def make() -> nn.Module:
        model: nn.Module = getattr(importlib.import_module(module), name)(*args, **settings)
        return model

    return make
