"""Nested inputs and outputs: containers of any class, taken apart and made again.

Beside what torch's pytrees know, these are containers: dataclasses, and subclasses of `dict` and
`list`. One that is a dataclass and a dict, such as the `ModelOutput` of transformers, is made again
from its fields.
"""

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pkgutil import resolve_name
from typing import Any

from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils import _pytree as pytree

Construction = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

_PLAIN = (dict, list, immutable_dict, immutable_list)


def construction(value: Any) -> Construction | None:
    """A class, and the arguments from which it makes a container like `value`.

    None for plain lists, tuples and dicts, and for what is no container.
    """
    kind: Any = type(value)  # what `isinstance` says of a proxy is of its value
    if dataclasses.is_dataclass(kind):
        make: Any = kind
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return make, (), {name: getattr(value, name) for name in names}
    if kind is defaultdict:
        return _default_dict, (_path(value.default_factory), dict(value)), {}
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return kind, tuple(value), {}
    if kind not in _PLAIN and issubclass(kind, dict):
        return kind, (dict(value.items()),), {}
    if kind not in _PLAIN and issubclass(kind, list):
        return kind, (list(value),), {}
    return None


def is_construction(function: Any) -> bool:
    """Whether `function` makes a container of what it is given, as those of `construction` do."""
    return isinstance(function, type) or function is _default_dict


def leaves(tree: Any) -> Iterator[Any]:
    """The leaves of `tree`, in order: all that it holds that is no container."""
    for leaf in pytree.tree_leaves(tree, is_leaf=_is_own):
        if _is_own(leaf):
            yield from leaves(_held(leaf))
        else:
            yield leaf


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with `function` applied to all its `leaves`."""

    def apply(leaf: Any) -> Any:
        made = construction(leaf) if _is_own(leaf) else None
        if made is None:
            return function(leaf)
        kind, args, kwargs = made
        return kind(*map_leaves(function, args), **map_leaves(function, kwargs))

    return pytree.tree_map(apply, tree, is_leaf=_is_own)


def structure(tree: Any) -> Any:
    """What `tree` is but for its leaves: equal for containers of the same classes and keys."""
    kind: Any = type(tree)
    plain = kind is tuple or issubclass(kind, dict | list)
    if not plain and not hasattr(kind, "_fields") and not dataclasses.is_dataclass(kind):
        return None
    held = [(key, structure(value)) for key, value in _held(tree).items()]
    return kind, sorted(getattr(tree, "__dict__", ())), held


def _default_dict(factory: str | None, items: dict[Any, Any]) -> defaultdict[Any, Any]:
    return defaultdict(None if factory is None else resolve_name(factory), items)


def _path(factory: Any) -> str | None:
    """How to find a factory again; a graph holds no classes or functions as arguments.

    Raises:
        TypeError: it has no name, as a lambda.
    """
    if factory is None:
        return None
    path = f"{factory.__module__}:{getattr(factory, '__qualname__', '')}"
    if "<" in path:
        raise TypeError(f"a defaultdict of '{path}', which cannot be found by its name")
    return path


def _is_own(value: Any) -> bool:
    """Whether pytrees do not know the container `value`, or only if its class registers itself."""
    kind = type(value)
    known = kind in (OrderedDict, defaultdict) or hasattr(kind, "_fields")
    return not known and construction(value) is not None


def _held(value: Any) -> dict[Any, Any]:
    """What a container holds, by field, key or position."""
    kind: Any = type(value)
    held: dict[Any, Any] = {}
    if dataclasses.is_dataclass(kind):
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if issubclass(kind, dict):
        held |= dict(value.items())
    elif issubclass(kind, list | tuple):
        held |= dict(enumerate(value))
    return held
