"""What the modules of a model were constructed with, as far as their attributes tell.

The graph of a model shows what its code reads. What runs untraced, a layer of torch's own or a
module of the user's, reads attributes besides, and `extra_repr` need not show them.
"""

from typing import Any

from torch import nn

from dspfx.layers.gated import GatedLayer

Settings = dict[str, dict[str, str]]
"""By the name of a module, and of an attribute."""

_LEFT_OUT = {"training", "inplace", "device"}  # no part of what a module computes


def settings(model: nn.Module) -> Settings:
    """The public attributes of all modules of `model` but dspfx's that are plain values.

    These are numbers, words, None, functions by their names, and tuples and lists of such. Paths
    and other texts may differ between machines, and are left out; so is None where a module is not
    of torch's own: it may stand for what the first call will find.
    """
    named = {name: _settings(module) for name, module in model.named_modules()}
    return {name: own for name, own in named.items() if own}


def other_setting(here: Settings, there: Settings) -> str | None:
    """The first attribute that both have and that differs, in words; what one lacks is new."""
    for name, own in here.items():
        for attribute, value in own.items():
            saved = there.get(name, {}).get(attribute, value)
            if saved != value:
                return f"'{name}' has {attribute}={value[:200]} and had {attribute}={saved[:200]}"
    return None


def _settings(module: nn.Module) -> dict[str, str]:
    origin = type(module).__module__
    if origin.startswith("dspfx.") and not isinstance(module, GatedLayer):
        return {}
    return {
        name: repr(_plain(value))
        for name, value in vars(module).items()
        if name not in _LEFT_OUT and name[0] != "_" and _is_plain(value)
        if value is not None or origin.startswith(("torch.nn.", "dspfx."))
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return value.isidentifier()
    return value is None or type(value) in (bool, int, float) or _is_named(value)


def _is_named(value: Any) -> bool:
    return callable(value) and isinstance(getattr(value, "__name__", None), str)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value.__name__ if _is_named(value) else value
