"""Lowering: the forms in which one pruned layer can be emitted.

A layer is a set of groups of filters, each with a list of input channels that it reads. It is
emitted as *branches* whose outputs are concatenated, each one ordinary convolution or linear
layer. The forms are all of this kind:

1. *dense*: one branch that reads every channel that any filter reads, zero weights filled in.
2. *separate*: a branch for every group.
3. *grouped*: groups as one convolution; where they differ in size, filled up with zero weights.
4. *merged*: the two groups that are the cheapest to read together become one, again and again, and
   what is left is emitted as 2 or 3. In the end that is 1. Where there are too many groups for
   that, only those of one structural group (of the original layer) become one.
5. *structural groups*: the groups of each structural group become one, and these are emitted as 2
   or 3. As one convolution, each filled up to the widest, they never have more weights than the
   original layer.

Groups of equal size share a branch in 2 as well, where the layer knows of groups: oneDNN and cuDNN
then see one convolution.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dspfx.utils.arrays import BoolArray, IntArray

# with more groups than this, pairs are not compared: what is left is no structure to speak of
MOST_GROUPS = 16


@dataclass(frozen=True)
class Group:
    """Filters that read the same channels.

    Attributes:
        filters: int `[f]`, their numbers.
        inputs: int `[c]`, the channels that they read; empty for constants.
    """

    filters: IntArray
    inputs: IntArray


@dataclass(frozen=True)
class Branch:
    """k groups of equal size, emitted as one layer.

    Attributes:
        filters: int `[k, f]`, numbers of the filters; -1 makes a channel that is never read.
        inputs: int `[k, c]`, the channels that each group reads; -1 reads any, with zero weights.
    """

    filters: IntArray
    inputs: IntArray

    @property
    def weights(self) -> int:
        """The elements of the weight, for each tap."""
        return int(self.filters.size * self.inputs.shape[1])


Lowering = tuple[Branch, ...]


def weights(lowering: Lowering) -> int:
    """The elements of the weights of all branches, for each tap."""
    return sum(branch.weights for branch in lowering)


def groups_of(filters: IntArray, row: IntArray, lists: BoolArray) -> list[Group]:
    """The groups of a layer: `filters[i]` reads the channels `lists[row[i]]`, nothing if -1.

    Args:
        filters: int `[F]`, numbers of the filters.
        row: int `[F]`.
        lists: bool `[R, C]`.
    """
    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for r in dict.fromkeys(row.tolist()):
        inputs = tuple(np.flatnonzero(lists[r]).tolist()) if r >= 0 else ()
        members[inputs].extend(filters[row == r].tolist())
    return [
        Group(np.array(sorted(own), np.int64), np.array(inputs, np.int64))
        for inputs, own in members.items()
    ]


def forms(
    groups: Sequence[Group],
    structural_group: Sequence[int],
    grouping: bool = True,
    most_weights: float = math.inf,
) -> list[Lowering]:
    """Every form of a layer worth considering, the one with the fewest weights first.

    Args:
        groups: of the layer.
        structural_group: of every group, the group of the original layer that its filters are in.
        grouping: whether the layer has a grouped form; linear layers have none.
        most_weights: forms with more, for each tap, are left out. What the filters read of the
            original layer is always enough: separate branches have no more than that.
    """
    found: dict[bytes, Lowering] = {}
    for merged in _merged(groups, structural_group):
        for lowering in (
            alike(merged) if grouping else separate(merged),
            separate(merged),
            *([filled_up(merged)] if grouping and len(merged) > 1 else []),
        ):
            if weights(lowering) <= most_weights:
                found.setdefault(_key(lowering), lowering)
    return list(found.values())


def dense(groups: Sequence[Group]) -> Lowering:
    """One branch that reads every channel that any group reads."""
    return separate([_union(groups)])


def separate(groups: Sequence[Group]) -> Lowering:
    """A branch for every group."""
    return tuple(Branch(g.filters[None], _or_padding(g.inputs)[None]) for g in groups)


def alike(groups: Sequence[Group]) -> Lowering:
    """A branch for all groups of equal size."""
    sizes: dict[tuple[int, int], list[Group]] = defaultdict(list)
    for group in groups:
        sizes[len(group.filters), len(group.inputs)].append(group)
    return tuple(
        Branch(np.stack([g.filters for g in same]), np.stack([_or_padding(g.inputs) for g in same]))
        for same in sizes.values()
    )


def filled_up(groups: Sequence[Group]) -> Lowering:
    """One branch, in which all groups have the size of the largest."""
    count = max(len(g.filters) for g in groups)
    reads = max(1, *(len(g.inputs) for g in groups))
    filters = np.full((len(groups), count), -1)
    inputs = np.full((len(groups), reads), -1)
    for number, group in enumerate(groups):
        filters[number, : len(group.filters)] = group.filters
        inputs[number, : len(group.inputs)] = group.inputs
    return (Branch(filters, inputs),)


def _or_padding(inputs: IntArray) -> IntArray:
    return inputs if len(inputs) else np.array([-1])


def _merged(groups: Sequence[Group], structural_group: Sequence[int]) -> Iterator[list[Group]]:
    """The groups, and after each merge of the two that cost the fewest zero weights."""
    now = list(groups)
    yield now
    of_one: dict[int, list[Group]] = defaultdict(list)
    for group, own in zip(now, structural_group, strict=True):
        of_one[own].append(group)
    structural_groups = [_union(own) for own in of_one.values()]
    if 1 < len(structural_groups) < len(now):
        yield structural_groups
    if len(now) > MOST_GROUPS:
        now = structural_groups
        yield now
        if len(now) > MOST_GROUPS:
            return
    while len(now) > 1:
        first, second = _cheapest_pair(now)
        rest = [group for i, group in enumerate(now) if i not in (first, second)]
        now = [_union([now[first], now[second]]), *rest]
        yield now


def _union(groups: Sequence[Group]) -> Group:
    filters = np.concatenate([group.filters for group in groups])
    return Group(np.sort(filters), np.unique(np.concatenate([group.inputs for group in groups])))


def _cheapest_pair(groups: Sequence[Group]) -> tuple[int, int]:
    """The pair whose union adds the fewest weights."""

    def added(pair: tuple[int, int]) -> int:
        one, other = groups[pair[0]], groups[pair[1]]
        union = len(np.union1d(one.inputs, other.inputs))
        return len(one.filters) * (union - len(one.inputs)) + len(other.filters) * (
            union - len(other.inputs)
        )

    return min(itertools.combinations(range(len(groups)), 2), key=added)


def _key(lowering: Lowering) -> bytes:
    return b"|".join(
        np.asarray(a.shape).tobytes() + a.tobytes()
        for branch in lowering
        for a in (branch.filters, branch.inputs)
    )


def written(lowering: Lowering) -> IntArray:
    """The filters in the order in which the branches write them, -1 for unused channels."""
    return np.concatenate([branch.filters.reshape(-1) for branch in lowering])


def describe(lowering: Lowering) -> str:
    """In words: how many groups in how many layers, and the sizes of each."""
    if len(lowering) == 1 and len(lowering[0].filters) == 1:
        return "dense"
    sizes = ", ".join(
        f"{len(p.filters)} of {p.inputs.shape[1]}->{p.filters.shape[1]}" for p in lowering
    )
    layers = "1 layer" if len(lowering) == 1 else f"{len(lowering)} layers"
    return f"{layers}: {sizes}"
