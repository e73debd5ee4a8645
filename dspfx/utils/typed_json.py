"""Dataclasses as JSON, read back with every type checked: files are not trusted."""

import dataclasses
import math
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

LARGEST = 2**63 - 1


def to_json(value: Any) -> Any:
    """Dataclasses become dicts, tuples lists; the rest is JSON as it is."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    return value


def from_json(kind: Any, value: Any, where: str = "") -> Any:
    """What `to_json` made `value` of.

    Args:
        kind: a type made of dataclasses, `tuple`, `dict[str, ...]`, `str`, `int`, `float`, `bool`,
            `None`, `|` and `Any`, which stands for JSON as it is.
        value: JSON.
        where: the path of `value`, for messages.

    Raises:
        ValueError: `value` is something else; the message names the place.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, where)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (arg for arg in args if arg is not type(None))
        return None if value is None else from_json(inner, value, where)
    if origin is tuple:
        return _tuple(args, _expect(list, value, where), where)
    if origin is dict:
        items = _expect(dict, value, where).items()
        return {key: from_json(args[1], item, f"{where}.{key}") for key, item in items}
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    value = _expect(kind, value, where)
    if kind is int and not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{where[1:]} is no number of 64 bits")
    return value


def _record(kind: Any, value: Any, where: str) -> Any:
    given, hints = _expect(dict, value, where), get_type_hints(kind)
    own = dataclasses.fields(kind)
    names = {field.name for field in own}
    needed = {field.name for field in own if field.default is dataclasses.MISSING}
    if not needed <= given.keys() <= names:  # what has a default may be missing in an older file
        raise ValueError(f"{where[1:] or 'it'} has {sorted(given)} where {sorted(names)} belong")
    return kind(**{name: from_json(hints[name], given[name], f"{where}.{name}") for name in given})


def _tuple(args: tuple[Any, ...], items: list[Any], where: str) -> tuple[Any, ...]:
    kinds = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
    if len(kinds) != len(items):
        raise ValueError(f"{where[1:]} has {len(items)} items where {len(kinds)} belong")
    if set(kinds) <= {int} and all(type(item) is int for item in items):  # lists of channels
        if items and not -LARGEST <= min(items) <= max(items) <= LARGEST:
            raise ValueError(f"{where[1:]} holds no numbers of 64 bits")
        return tuple(items)
    return tuple(
        from_json(kind, item, f"{where}[{number}]")
        for number, (kind, item) in enumerate(zip(kinds, items, strict=True))
    )


def _expect(kind: type, value: Any, where: str) -> Any:
    if type(value) is not kind:
        raise ValueError(
            f"{where[1:] or 'it'} is of type {type(value).__name__} where {kind.__name__} belongs"
        )
    return value
