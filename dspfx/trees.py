"""Nested inputs and outputs: torch's pytrees, in which a dataclass is a node too."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils import _pytree as pytree


def is_record(value: Any) -> bool:
    """Whether `value` is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def leaves(tree: Any) -> Iterator[Any]:
    """All that `tree` holds and that holds nothing itself, in order."""
    for leaf in pytree.tree_leaves(tree, is_leaf=is_record):
        if is_record(leaf):
            for field in dataclasses.fields(leaf):
                yield from leaves(getattr(leaf, field.name))
        else:
            yield leaf


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with `function` applied to all its `leaves`."""

    def apply(leaf: Any) -> Any:
        if not is_record(leaf):
            return function(leaf)
        names = [field.name for field in dataclasses.fields(leaf) if field.init]
        return dataclasses.replace(
            leaf, **{name: map_leaves(function, getattr(leaf, name)) for name in names}
        )

    return pytree.tree_map(apply, tree, is_leaf=is_record)
