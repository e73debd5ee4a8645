"""Input sizes: find other sizes that a model accepts, by trying.

A graph is analysed on one example. What depends on the size of an image, or on the length of a
sequence, shows only where the same graph runs on an example of another size:

1. Positions: all dimensions after the second, the second of integers `[N, T]`, change together
   with the batch; first to smaller, odd sizes, then to ones with the same large divisor, then to
   larger ones.
2. What is left, and everything if that fails, changes by itself: the batch, each dimension.
   Dimensions of one size in several inputs change together, as tokens and their mask do.
3. Whole numbers among the inputs change together, and the sizes that follow from them (`numbers`).
4. All that was accepted is tried together, so that one example shows as much as possible.

An example is given by its `Shapes`: the shapes of the tensors among the inputs, and after them the
whole numbers, if there are any. The values of tensors are repeated or cut.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from dspfx.passes.sandbox.numbers import Groups, groups_of, numbers_of, sizes_from, with_numbers
from dspfx.utils.pytree import leaves, map_leaves

Shapes = tuple[tuple[int, ...], ...]
Place = tuple[int, int]  # which tensor, which dimension
MOST_TRIALS = 14


@dataclass(frozen=True)
class Axis:
    """Dimensions of inputs that have one size, and change together."""

    places: tuple[Place, ...]
    size: int

    @property
    def divisor(self) -> int:
        """The largest power of two, up to 32, that divides the size and is not all of it."""
        return next((d for d in (32, 16, 8, 4, 2) if self.size % d == 0 and self.size > d), 1)


def shapes_of(inputs: Any) -> Shapes:
    """The shapes of the tensors among `inputs`, in order, and its whole numbers if it has any."""
    shapes = tuple(tuple(leaf.shape) for leaf in leaves(inputs) if isinstance(leaf, Tensor))
    numbers = numbers_of(inputs)
    return (*shapes, numbers) if numbers else shapes


def resized(inputs: Any, shapes: Shapes) -> Any:
    """`inputs` with tensors of other sizes, whose values are repeated or cut, and other numbers."""
    if numbers_of(inputs):
        *tensors, numbers = shapes
        inputs, shapes = with_numbers(inputs, numbers), tuple(tensors)
    wanted = iter(shapes)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for dim, size in enumerate(next(wanted)):
            if size != leaf.shape[dim]:
                index = torch.arange(size, device=leaf.device) % leaf.shape[dim]
                leaf = leaf.index_select(dim, index)
        return leaf

    return map_leaves(resize, inputs)


def other_sizes(inputs: Any, accepts: Callable[[Shapes], bool]) -> tuple[Shapes, ...]:
    """Shapes that `accepts` accepts, and that differ from those of `inputs`; fewest first.

    Args:
        inputs: the example.
        accepts: tries an example; it is called `MOST_TRIALS` times at most.
    """
    shapes = shapes_of(inputs)
    if any(0 in leaf.shape for leaf in leaves(inputs) if isinstance(leaf, Tensor)):
        return ()
    whole_numbers = [not x.is_floating_point() for x in leaves(inputs) if isinstance(x, Tensor)]
    return _Search(shapes, whole_numbers, groups_of(inputs), accepts).run()


def sizes_in_steps(inputs: Any) -> tuple[Shapes, ...]:
    """All positions less, and more, by one step of the largest power of two that divides them.

    A graph takes them where its model pads inputs that do not fill its patches or windows.
    """
    shapes = shapes_of(inputs)
    tensors = shapes[: -1 if numbers_of(inputs) else None]
    axes = [axis for axis in _axes(tensors, set()) if axis.divisor > 1]
    batch = _batch(tensors)
    axes = [a for a in axes if all(d >= 2 for _, d in a.places)]
    found = []
    for sign in (-1, 1):
        new = {place: a.size + sign * a.divisor for a in axes for place in a.places}
        if batch is not None and new:
            new |= dict.fromkeys(batch.places, batch.size + 1)
        found.append(_changed(shapes, new))
    return tuple(own for own in found if own != shapes)


def changed_places(shapes: Shapes, other: Shapes) -> set[Place]:
    """Where `other` differs from `shapes`."""
    return {
        (n, d)
        for n, (one, two) in enumerate(zip(shapes, other, strict=True))
        for d in range(len(one))
        if one[d] != two[d]
    }


def shown_places(shapes: Shapes, other: Shapes) -> set[Place]:
    """Where `other` differs so much that it also does after strided layers.

    An image of 39 pixels has as many positions as one of 64 once it is 32 times smaller.
    """
    return {
        (n, d)
        for n, d in changed_places(shapes, other)
        if d < 2 or abs(other[n][d] - shapes[n][d]) >= Axis(((n, d),), shapes[n][d]).divisor
    }


class _Search:
    def __init__(
        self,
        shapes: Shapes,
        whole_numbers: list[bool],
        groups: Groups,
        accepts: Callable[[Shapes], bool],
    ) -> None:
        self.shapes, self.groups = shapes, groups
        self.accepts = accepts
        self.tried: dict[Shapes, bool] = {}
        tensors = shapes[: len(whole_numbers)]
        self.batch = _batch(tensors)
        self.axes = _axes(tensors, set() if self.batch is None else set(self.batch.places))
        self.likely = [
            axis
            for axis in self.axes
            if all(d >= 2 or (len(shapes[n]) == 2 and whole_numbers[n]) for n, d in axis.places)
        ]

    def run(self) -> tuple[Shapes, ...]:
        found: dict[Place, int] = {}
        joint = [axis for axis in (self.batch, *self.likely) if axis is not None]
        for change in _CHANGES if self.likely else ():
            if self._try(new := change(joint)):
                found |= new
                break
        separate = []
        for change, ways in _OF_NUMBERS if self.groups else ():
            if self._try(new := self._with_numbers(change, ways, found)):
                separate.append(new)
                break
        changed = found.keys() | {place for new in separate for place in new}
        rest = [a for a in (self.batch, *self.axes) if a and not changed & set(a.places)]
        for axis in rest:
            for change in _CHANGES:
                if self._try(new := change([axis])):
                    separate.append(new)
                    break
        together = found
        for new in separate:
            together = together | new
        if len(separate) + bool(found) <= 1 or self._try(together):
            return (_changed(self.shapes, together),) if together else ()
        return tuple(_changed(self.shapes, new) for new in ([found] if found else []) + separate)

    def _with_numbers(
        self, change: "_Change", ways: int | None, found: dict[Place, int]
    ) -> dict[Place, int]:
        """What becomes of the numbers, and of the sizes that follow from them and are not `found`.

        Equal numbers stay equal; 0 and 1 are likelier to be something else than sizes.

        Args:
            ways: in how many of the likeliest ways they follow; in all of them if it is None.
        """
        *tensors, numbers = self.shapes
        last = len(tensors)
        distinct = [n for n in dict.fromkeys(numbers) if n > 1]
        axes = [Axis(((last, n),), n) for n in distinct]  # in the place of each stands itself
        sizes = {n: size for (_, n), size in change(axes).items()}
        own = tuple(sizes.get(n, n) for n in numbers)
        pairs = zip(sizes_from(numbers, self.groups), sizes_from(own, self.groups), strict=True)
        follow: dict[int, int] = {}
        for size, other in islice(pairs, ways):
            follow.setdefault(size, other)
        return {(last, i): n for i, n in enumerate(own)} | {
            (n, d): follow[size]
            for n, shape in enumerate(tensors)
            for d, size in enumerate(shape)
            if d and size > 1 and size in follow and (n, d) not in found
        }

    def _try(self, new: dict[Place, int]) -> bool:
        """Whether the model takes inputs of the sizes `new`, tried once and if trials are left."""
        shapes = _changed(self.shapes, new)
        if shapes == self.shapes:
            return False
        if shapes not in self.tried:
            if len(self.tried) >= MOST_TRIALS:
                return False
            self.tried[shapes] = self.accepts(shapes)
        return self.tried[shapes]


def _changed(shapes: Shapes, new: dict[Place, int]) -> Shapes:
    return tuple(
        tuple(new.get((n, d), size) for d, size in enumerate(shape))
        for n, shape in enumerate(shapes)
    )


def _batch(shapes: Shapes) -> Axis | None:
    """The batch dimension: of the first input, and of all inputs with as many samples."""
    if not shapes or not shapes[0]:
        return None
    count = shapes[0][0]
    return Axis(tuple((n, 0) for n, s in enumerate(shapes) if s and s[0] == count), count)


def _axes(shapes: Shapes, taken: set[Place]) -> list[Axis]:
    """All dimensions that are not `taken`; equal ones of several inputs are joined."""
    places: dict[tuple[int, int], list[Place]] = defaultdict(list)
    for n, shape in enumerate(shapes):
        for dim, size in enumerate(shape):
            if (n, dim) not in taken and size > 1:
                # of one input, height and width may differ though they are equal here
                places[size, dim if len(shapes) == 1 else 0].append((n, dim))
    return [Axis(tuple(own), size) for (size, _), own in places.items()]


def _smaller(axes: Sequence[Axis]) -> dict[Place, int]:
    """Odd sizes of some 60 to 80 % of what they were, no two alike; one sample more."""
    new: dict[Place, int] = {}
    for number, axis in enumerate(axes):
        size = _odd(int(axis.size * 0.6)) + 2 * number
        if all(dim == 0 for _, dim in axis.places) or size < 3 or size >= axis.size:
            size = axis.size + 1 + number
        new |= dict.fromkeys(axis.places, size)
    return new


def _multiples(axes: Sequence[Axis]) -> dict[Place, int]:
    """Sizes with the same large divisor: each changed by one step of its power of two."""
    new: dict[Place, int] = {}
    for axis in axes:
        step = axis.divisor
        larger = all(dim == 0 for _, dim in axis.places) or axis.size < 2 * step or step == 1
        new |= dict.fromkeys(axis.places, axis.size + step if larger else axis.size - step)
    return new


def _larger(axes: Sequence[Axis]) -> dict[Place, int]:
    """Sizes of one step more, for models of which nothing is left of less."""
    return {place: axis.size + axis.divisor for axis in axes for place in axis.places}


_Change = Callable[[Sequence[Axis]], dict[Place, int]]
_CHANGES: tuple[_Change, ...] = (_smaller, _multiples, _larger)
_OF_NUMBERS = ((_smaller, 1), (_smaller, None), (_multiples, 1), (_multiples, None))


def _odd(size: int) -> int:
    return size - 1 + size % 2


def sizes_to_prove(
    shapes: Shapes, others: Sequence[Shapes], generator: torch.Generator
) -> list[Shapes]:
    """Sizes besides `shapes`, one of them at random, none larger, to keep proofs cheap.

    Args:
        shapes: of the example.
        others: of further ones that were accepted.
        generator: of what is random.
    """
    elements = _elements(shapes)
    found = [other for other in others[:1] if _elements(other) <= elements]
    for _ in range(4):
        drawn = [_drawn(shapes, other, generator) for other in others[:1]]
        found += [own for own in drawn if own not in (shapes, *found)]
    stepped = [own for own in others[1:] if _elements(own) <= elements and own not in found[:2]]
    return found[:2] + stepped[:1]


def _drawn(shapes: Shapes, other: Shapes, generator: torch.Generator) -> Shapes:
    """Random sizes between half of `shapes` and all of it, along the dimensions `other` changes.

    In steps of the difference of the two: where that is 32, only multiples of 32 are drawn.
    """
    joined: dict[int, int] = {}  # equal sizes of several inputs stay equal
    drawn = []
    for shape, changed in zip(shapes, other, strict=True):
        sizes = list(shape)
        for dim, (size, new) in enumerate(zip(shape, changed, strict=True)):
            step = math.gcd(size, new)
            fewest = 1 if dim == 0 else -(-size // 2)
            multiples = range(-(-fewest // step), size // step + 1)
            if new == size or not multiples:
                continue
            if len(shapes) == 1 or size not in joined:
                chosen = int(torch.randint(len(multiples), (), generator=generator))
                joined[size] = step * multiples[chosen]
            sizes[dim] = joined[size]
        drawn.append(tuple(sizes))
    return tuple(drawn)


def _elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)
