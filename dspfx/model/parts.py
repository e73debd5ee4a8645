"""Models in parts: where the code of the whole cannot be traced, its children are prepared.

A detector decides by the values of its tensors what to do next; there is no graph of it. Its
backbone and heads have one. `prepare` then returns a copy of the user's own module in which these
children are `PreparedModule`s; every verb works on all of them together. A model that was traced
whole is its own only part, with an empty name.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dspfx.errors import ConvertError
from dspfx.model.module import CompactModule, NarrowModule, PreparedModule
from dspfx.model.tensors import named_tensors
from dspfx.utils.wrappers import unwrapped


@dataclass(frozen=True)
class Part:
    """A prepared child of a model.

    Attributes:
        name: its path in the model.
        module: the child.
    """

    name: str
    module: PreparedModule

    def full_name(self, name: str) -> str:
        """The path in the model of what the part knows as `name`."""
        return full_name(self.name, name)


def full_name(part: str, name: str) -> str:
    """The path of what the part at the path `part` knows as `name`."""
    return ".".join(n for n in (part, name) if n)


def parts_of(model: nn.Module) -> list[Part]:
    """The outermost prepared modules of `model`, each once.

    Raises:
        ConvertError: there are none, or narrow ones.
    """
    parts = [Part(name, module) for name, module in _outermost(model, PreparedModule)]
    if narrow_parts_of(model):
        raise ConvertError(
            f"{type(model).__name__} is narrow, and made to be trained; dspfx.widen(narrow, "
            "prepared) puts what it has learned into the prepared model: go on with that one"
        )
    if not parts:
        raise ConvertError(
            f"{type(model).__name__} was never prepared or is compact already; call "
            "dspfx.prepare(model) first"
        )
    return parts


def compact_parts_of(model: nn.Module) -> list[tuple[str, CompactModule]]:
    """The compact modules of `model` with their paths."""
    return list(_outermost(model, CompactModule))


def tensors_outside(model: nn.Module, parts: tuple[Part, ...]) -> dict[str, Tensor]:
    """The tensors of `model` that are not of any of its `parts`, by name."""
    paths = tuple(part.name for part in parts)
    return {
        name: tensor
        for name, tensor in named_tensors(model).items()
        if not any(not path or name.startswith(f"{path}.") for path in paths)
    }


def narrow_parts_of(model: nn.Module) -> dict[str, NarrowModule]:
    """The narrow modules of `model` by their paths."""
    return dict(_outermost(model, NarrowModule))


def _outermost(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    seen: list[str] = []
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, kind) and not any(name.startswith(f"{s}.") for s in seen):
            seen.append(name)
            yield name, module
            if not name:
                return


def exchanged(model: nn.Module, parts: Mapping[Any, nn.Module]) -> nn.Module:
    """A copy of `model` in which every part is taken for another form of it."""
    copies: dict[int, Any] = {id(part): form for part, form in parts.items()}
    twin: nn.Module = copy.deepcopy(model, copies)
    return twin
