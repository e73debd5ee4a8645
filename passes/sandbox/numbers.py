"""Whole numbers among inputs: sizes that code is given beside its tensors.

Tokens of an image come with its height and width, those of several levels with a list of them.
Such numbers change together with the tensors whose sizes follow from them: a size may be one of the
numbers, a product of neighbours, or the sum of the products of all lists.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from dspfx.utils.pytree import leaves, map_leaves

Groups = tuple[tuple[int, ...], ...]


def is_number(leaf: Any) -> bool:
    """Whether a leaf of inputs is a whole number; True and False are none."""
    return type(leaf) is int


def numbers_of(inputs: Any) -> tuple[int, ...]:
    """The whole numbers among `inputs`, in order."""
    return tuple(filter(is_number, leaves(inputs)))


def with_numbers(inputs: Any, numbers: tuple[int, ...]) -> Any:
    """`inputs` with other whole numbers, in the order of `numbers_of`."""
    given = iter(numbers)
    return map_leaves(lambda leaf: next(given) if is_number(leaf) else leaf, inputs)


def groups_of(inputs: Any) -> Groups:
    """The positions in `numbers_of(inputs)` of the numbers that lie side by side in a container."""
    return tuple(_groups(with_numbers(inputs, tuple(range(len(numbers_of(inputs)))))))


def _groups(tree: Any) -> Iterator[tuple[int, ...]]:
    if not isinstance(tree, dict | list | tuple) or isinstance(tree, torch.Size):
        return
    items = list(tree.values() if isinstance(tree, dict) else tree)
    if own := tuple(filter(is_number, items)):
        yield own
    for item in items:
        yield from _groups(item)


def sizes_from(numbers: tuple[int, ...], groups: Groups) -> Iterator[int]:
    """The sizes that may follow from `numbers`, the likeliest first; the same ones for any."""
    yield sum(math.prod(numbers[i] for i in group) for group in groups)
    for group in groups:
        for count in range(len(group), 0, -1):
            for first in range(len(group) - count + 1):
                yield math.prod(numbers[i] for i in group[first : first + count])
