"""Index propagation: data-movement operators are run on element indices instead of data.

Every element of every tensor that enters a chain of movement operators (`view`, `permute`, `cat`,
`roll`, ...) gets a number of its own. The operators are then executed on the numbers, and the
result shows exactly which element went where; no operator needs a rule of its own.

Numbers are float64 (exact up to 2^53) because every operator accepts floats. 0 stands for a
padded zero, -1 for any other padded value.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx.node import Node

from dspfx.passes.analysis.channel_ops import Value
from dspfx.utils.arrays import IntArray

PADDED_ZERO, PADDED_VALUE = 0.0, -1.0


@dataclass(frozen=True)
class Move:
    """Where the channels of a moved tensor come from.

    Attributes:
        roots: the tensors whose elements it holds.
        rank: its number of dimensions.
        dim: the dimension along which its channels lie; None if whole channels do not stay
            together, and then the fields below are empty.
        source, index: int `[C]`, channel j is channel `index[j]` of `roots[source[j]]`, or
            padding where -1.
        whole_channels: every channel is an untouched channel of a root.
        repeat: channel j is (a part of) channel `j // repeat` of the only root; None if not so.
        pads_zeros_only: no other value than zero was padded.
    """

    roots: tuple[Node, ...]
    rank: int
    dim: int | None
    source: IntArray
    index: IntArray
    whole_channels: bool
    repeat: int | None
    pads_zeros_only: bool


@dataclass(frozen=True)
class _Root:
    node: Node
    value: Value
    first_id: int
    first_channel: int

    @property
    def channels(self) -> int:
        return max(self.value.channels, 1)

    @property
    def stride(self) -> int:
        """Elements from one channel to the next."""
        shape, dim = self.value.shape, self.value.dim
        return max(int(np.prod(shape if dim is None else shape[dim + 1 :])), 1)

    def ids(self) -> Tensor:
        count = int(np.prod(self.value.shape))
        ids = torch.arange(self.first_id, self.first_id + count, dtype=torch.float64)
        return ids.reshape(self.value.shape)


class ElementIds:
    """Numbers the elements of tensors and reads the result of moving them."""

    def __init__(self, values: Mapping[Node, Value]) -> None:
        self._values = values
        self._roots: dict[Node, _Root] = {}
        self._moved: dict[Node, Tensor | tuple[Tensor, ...]] = {}
        self._next_id = 1
        self._next_channel = 0

    def knows(self, nodes: Iterable[Node]) -> bool:
        """Whether all of `nodes` have numbers."""
        return all(n in self._moved or n in self._values for n in nodes)

    def of(self, node: Node) -> Tensor | tuple[Tensor, ...]:
        """The numbers of a node's elements, new ones unless `keep` has recorded some."""
        if node in self._moved:
            return self._moved[node]
        if node not in self._roots:
            value = self._values[node]
            root = _Root(node, value, self._next_id, self._next_channel)
            self._next_id += int(np.prod(value.shape))
            self._next_channel += root.channels
            self._roots[node] = root
        return self._roots[node].ids()

    def keep(self, node: Node, moved: Tensor | tuple[Tensor, ...]) -> None:
        """Record `moved` as the numbers of `node`, the result of a movement operator."""
        self._moved[node] = moved

    def move(self, moved: Tensor, likely: int | None = None) -> Move:
        """Read the numbers that came out of a movement operator.

        Args:
            moved: the numbers.
            likely: the dimension to look along first, if several could hold the channels.
        """
        finder = _ChannelFinder(list(self._roots.values()), moved.long())
        return finder.find(likely)


class _ChannelFinder:
    """Finds the channels in one tensor of numbers."""

    def __init__(self, roots: list[_Root], ids: Tensor) -> None:
        self.ids = ids
        self.padding = ids <= 0
        self.padded = bool(self.padding.any())
        starts = torch.tensor([r.first_id for r in roots])
        known = ids[~self.padding] if self.padded else ids.reshape(-1)
        if not len(known):
            self.roots, self.channel = [], torch.zeros_like(ids)
            return
        ends = torch.stack(known.aminmax())
        first, last = (torch.searchsorted(starts, ends, right=True) - 1).tolist()
        if first == last:  # the common case
            (root,) = self.roots = [roots[first]]
            channel = (ids - root.first_id).div_(root.stride, rounding_mode="floor")
            self.channel = channel.remainder_(root.channels).add_(root.first_channel)
            return
        number = torch.searchsorted(starts, ids.clamp(min=1).contiguous(), right=True) - 1
        present = torch.bincount(number[~self.padding], minlength=len(roots))
        self.roots = [roots[i] for i in present.nonzero().flatten().tolist()]
        stride = torch.tensor([r.stride for r in roots])[number]
        channels = torch.tensor([r.channels for r in roots])[number]
        offset = torch.tensor([r.first_channel for r in roots])[number]
        self.channel = (ids - starts[number]).div_(stride, rounding_mode="floor")
        self.channel.remainder_(channels).add_(offset)

    def find(self, likely: int | None) -> Move:
        rank = self.ids.dim()
        nodes = tuple(r.node for r in self.roots)
        zeros_only = not bool((self.ids == PADDED_VALUE).any())
        if not self.ids.numel():
            rank = 0
        for dim in self._likely_dims(rank, likely):
            channel = self._channels_along(dim)
            if channel is not None:
                source, index = self._locate(channel)
                whole = zeros_only and self._whole(dim, source, index)
                repeat = self._repeat(source, index)
                return Move(nodes, rank, dim, source, index, whole, repeat, zeros_only)
        none = np.zeros(0, np.int64)
        return Move(nodes, rank, None, none, none, False, None, zeros_only)

    def _likely_dims(self, rank: int, likely: int | None) -> list[int]:
        """All dimensions; first those where channels were, or where a single one could be."""
        if likely is not None:
            return [likely, *(dim for dim in range(rank) if dim != likely)]
        before = [r.value.dim for r in self.roots if r.value.dim is not None]
        dims = [dim for dim in dict.fromkeys((*before, *range(rank))) if dim < rank]
        if [r.channels for r in self.roots] == [1]:
            dims.sort(key=lambda dim: self.ids.shape[dim] != 1)
        return dims

    def _channels_along(self, dim: int) -> Tensor | None:
        """Int `[C]`, the root channel at every position of `dim` (-1: padding), if unique."""
        channel = self.channel.movedim(dim, 0)
        if not self.padded:
            first, last = channel, channel
            while first.dim() > 1:
                first, last = first[:, 0], last[:, -1]
            if not torch.equal(first, last):
                return None  # cheap, and decides most cases
            channel = channel.reshape(len(channel), -1)
            return channel[:, 0] if bool((channel == channel[:, :1]).all()) else None
        padding = self.padding.movedim(dim, 0).reshape(len(channel), -1)
        channel = channel.reshape(len(channel), -1)
        high = channel.masked_fill(padding, -1).amax(1)
        low = channel.masked_fill(padding, int(channel.max()) + 1).amin(1)
        return high if bool(((low == high) | (high < 0)).all()) else None

    def _locate(self, channel: Tensor) -> tuple[IntArray, IntArray]:
        numbers = channel.numpy().astype(np.int64)
        first = np.array([r.first_channel for r in self.roots], np.int64)
        source = np.searchsorted(first, np.maximum(numbers, 0), side="right") - 1
        index = numbers - first[source] if len(first) else numbers
        padding = numbers < 0
        source[padding], index[padding] = -1, -1
        return source, index

    def _whole(self, dim: int, source: IntArray, index: IntArray) -> bool:
        """Whether every channel is a root's channel, element by element."""
        for k, root in enumerate(self.roots):
            here = torch.from_numpy(np.flatnonzero(source == k))
            others = [n for d, n in enumerate(root.value.shape) if d != dim]
            if root.value.dim != dim or others != [
                *self.ids.shape[:dim],
                *self.ids.shape[dim + 1 :],
            ]:
                return False
            expected = root.ids().long().index_select(dim, torch.from_numpy(index)[here])
            if not torch.equal(self.ids.index_select(dim, here), expected):
                return False
        return True

    def _repeat(self, source: IntArray, index: IntArray) -> int | None:
        if len(self.roots) != 1 or self.roots[0].value.dim is None:
            return None
        channels = self.roots[0].channels
        repeat = len(index) // channels
        in_order = np.repeat(np.arange(channels), repeat)
        return repeat if repeat and np.array_equal(index, in_order) else None
