"""Input sizes: find other sizes that a model accepts, by trying.

A graph is analysed on one example. What depends on the size of an image, or on the length of a
sequence, shows only where the same graph runs on an example of another size:

1. Positions: all dimensions after the second, the second of integers `[N, T]`, change together
   with the batch; first to smaller, odd sizes, then to ones with the same large divisor, then to
   larger ones.
2. What is left, and everything if that fails, changes by itself: the batch, each dimension.
   Dimensions of one size in several inputs change together, as tokens and their mask do.
3. All that was accepted is tried together, so that one example shows as much as possible.

An example is given by its `Shapes`, the shapes of the tensors among the inputs; their values are
repeated or cut.
"""

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from dspfx.errors import TraceError
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
    """The shapes of the tensors among `inputs`, in order."""
    return tuple(tuple(leaf.shape) for leaf in leaves(inputs) if isinstance(leaf, Tensor))


def resized(inputs: Any, shapes: Shapes) -> Any:
    """`inputs` with tensors of other sizes, whose values are repeated or cut."""
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


def fix_sizes(graphs: Iterable[fx.Graph], example: tuple[Any, ...], refused: Shapes) -> None:
    """Guard `graphs`: they refuse sizes other than that of `example`, as that of `refused` is.

    Raises:
        TraceError: such a tensor is part of a container, which has no input of its own.
    """
    places = [
        (number, dim, size)
        for number, (shape, other) in enumerate(zip(shapes_of(example), refused, strict=True))
        for dim, size in enumerate(shape)
        if other[dim] != size
    ]
    tensors = [n for n, leaf in enumerate(example) if isinstance(leaf, Tensor)]
    if len(tensors) != len(shapes_of(example)):
        raise TraceError(
            "for inputs of other sizes the code of the model does something else than its graph; "
            "give it tensors that are arguments of their own, or do not branch on their sizes"
        )
    for graph in set(graphs):
        inputs = graph.find_nodes(op="placeholder")
        with graph.inserting_after(inputs[-1]):
            for number, dim, size in places:
                _check_size(graph, inputs[tensors[number]], dim, size)
        graph.lint()


def _check_size(graph: fx.Graph, tensor: Node, dim: int, size: int) -> None:
    message = f"the model was prepared for inputs whose dimension {dim} is {size}, and no other"
    found = graph.call_method("size", (tensor, dim))
    with graph.inserting_after(found):
        same = graph.call_function(operator.eq, (found, size))
    same.meta["is_wrapped"] = True  # or fx would evaluate it when it is unpickled
    with graph.inserting_after(same):
        graph.call_function(torch._assert, (same, message))


def other_sizes(inputs: Any, accepts: Callable[[Shapes], bool]) -> tuple[Shapes, ...]:
    """Shapes that `accepts` accepts, and that differ from those of `inputs`; fewest first.

    Args:
        inputs: the example.
        accepts: tries an example; it is called `MOST_TRIALS` times at most.
    """
    shapes = shapes_of(inputs)
    if any(0 in shape for shape in shapes):
        return ()
    whole_numbers = [not x.is_floating_point() for x in leaves(inputs) if isinstance(x, Tensor)]
    return _Search(shapes, whole_numbers, accepts).run()


def sizes_in_steps(inputs: Any) -> tuple[Shapes, ...]:
    """All positions less, and more, by one step of the largest power of two that divides them.

    A graph takes them where its model pads inputs that do not fill its patches or windows.
    """
    shapes = shapes_of(inputs)
    axes = [axis for axis in _axes(shapes, set()) if axis.divisor > 1]
    batch = _batch(shapes)
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
        self, shapes: Shapes, whole_numbers: list[bool], accepts: Callable[[Shapes], bool]
    ) -> None:
        self.shapes = shapes
        self.accepts = accepts
        self.tried: dict[Shapes, bool] = {}
        self.batch = _batch(shapes)
        self.axes = _axes(shapes, set() if self.batch is None else set(self.batch.places))
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
        rest = [a for a in (self.batch, *self.axes) if a and not found.keys() & set(a.places)]
        separate = []
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


_CHANGES = (_smaller, _multiples, _larger)


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
