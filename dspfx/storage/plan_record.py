"""`Compaction`: a `CompactionPlan` as plain data, and back again for a graph of the same nodes.

A plan depends on weights that a compact model no longer has, on the cost model, and on the version
of dspfx. It is therefore stored, not made again. Of what is read back every number is checked.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.fx.node import Node

from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Mix
from dspfx.passes.lowering.forms import Branch, weights
from dspfx.passes.transforms.plan import CompactionPlan, LayerPlan, Order
from dspfx.passes.transforms.summary import Summary
from dspfx.utils.arrays import IntArray

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class BranchRecord:
    """See `forms.Branch`: `[k, f]` filters and `[k, c]` inputs."""

    filters: tuple[Numbers, ...]
    inputs: tuple[Numbers, ...]


@dataclass(frozen=True)
class LayerRecord:
    """See `passes.transforms.plan.LayerPlan`; `filters` and `inputs` are numbers of lists."""

    filters: int
    inputs: int
    norm: str | None
    parts: tuple[BranchRecord, ...]


@dataclass(frozen=True)
class Compaction:
    """A `CompactionPlan` by names of nodes, and what else a compact module carries.

    Attributes:
        channels: lists of original channels, which are referred to by number.
        holds: node -> the list of the channels that its compact tensor holds, in order; None for
            all of them. This is the map from compact to original channels.
        wants: node -> the lists that it wants of each operand, where -1 is a channel of zeros.
        left_out: node -> the operands that it does without.
        layers: node -> how the layer is emitted.
        summary: for the report.
        difference: what verification found, and in which type.
        structure: a digest of the compact module without its weights.
    """

    channels: tuple[Numbers, ...]
    holds: dict[str, int | None]
    wants: dict[str, tuple[int | None, ...]]
    left_out: dict[str, tuple[bool, ...]]
    layers: dict[str, LayerRecord]
    summary: Summary
    difference: tuple[float, str] | None
    structure: str


def compaction(
    plan: CompactionPlan,
    summary: Summary,
    difference: tuple[float, torch.dtype] | None,
    structure: str,
) -> Compaction:
    """What is saved of `plan`, and of the compact module that it led to."""
    lists: dict[Numbers, int] = {}

    def number(order: IntArray) -> int:
        return lists.setdefault(tuple(order.tolist()), len(lists))

    def maybe(order: Order) -> int | None:
        return None if order is None else number(order)

    holds = {node.name: maybe(order) for node, order in plan.order.items()}
    wants = {n.name: tuple(maybe(order) for order in w) for n, w in plan.wants.items()}
    layers = {node.name: _layer_record(layer, number) for node, layer in plan.layers.items()}
    return Compaction(
        tuple(lists),
        holds,
        wants,
        {node.name: tuple(map(bool, out)) for node, out in plan.left_out.items()},
        layers,
        summary,
        None if difference is None else (difference[0], str(difference[1]).removeprefix("torch.")),
        structure,
    )


def plan_of(record: Compaction, analysis: ChannelAnalysis, most_weights: int) -> CompactionPlan:
    """The plan that `record` describes, for the graph of `analysis`.

    Args:
        record: perhaps from a hostile file.
        analysis: of the evaluation graph.
        most_weights: how many elements the layers may have in all.

    Raises:
        ValueError: it is none for this graph; the message names the node.
    """
    return _PlanReader(record, analysis, most_weights).read()


class _PlanReader:
    def __init__(self, record: Compaction, analysis: ChannelAnalysis, most_weights: int) -> None:
        self.record = record
        self.analysis = analysis
        self.nodes = {node.name: node for node in analysis.ops}
        self.weights_left = most_weights
        self.counted: set[tuple[object, ...]] = set()

    def read(self) -> CompactionPlan:
        record = self.record
        layers = {self._node(name): self._layer(name, own) for name, own in record.layers.items()}
        return CompactionPlan(
            order={self._node(name): self._holds(name, own) for name, own in record.holds.items()},
            wants={self._node(name): self._wants(name, own) for name, own in record.wants.items()},
            layers=layers,
            folded=frozenset(layer.norm for layer in layers.values() if layer.norm is not None),
            left_out={self._node(name): out for name, out in record.left_out.items()},
        )

    def _node(self, name: str) -> Node:
        if name not in self.nodes:
            raise ValueError(f"the graph has no node {name[:60]!r}")
        return self.nodes[name]

    def _channels(self, number: int, least: int, count: int, most: int) -> IntArray:
        """List `number`, of at most `most` channels of `least` to `count - 1`."""
        if not 0 <= number < len(self.record.channels):
            raise ValueError(f"there is no list {number} of channels")
        found = checked(self.record.channels[number], least, count)
        if len(found) > most:
            raise ValueError(f"{len(found)} channels where there are {most}")
        return found

    def _holds(self, name: str, number: int | None) -> Order:
        channels = self._count(self._node(name))
        return None if number is None else self._channels(number, 0, channels, channels)

    def _wants(self, name: str, numbers: tuple[int | None, ...]) -> tuple[Order, ...]:
        node = self._node(name)
        operands = self.analysis.ops[node].operands
        if len(numbers) != len(operands):
            raise ValueError(f"{name} has {len(operands)} operands, not {len(numbers)}")
        # constants know no channels, but are cut like what they are combined with
        most = [max(self._count(operand), self._count(node)) for operand in operands]
        return tuple(
            None if number is None else self._channels(number, -1, count, count)
            for number, count in zip(numbers, most, strict=True)
        )

    def _count(self, node: Node) -> int:
        """The channels of what `node` computes, 0 if it is only handled whole."""
        op, value = self.analysis.ops[node], self.analysis.values.get(node)
        if isinstance(op, Mix):
            return op.filters
        return 0 if value is None else value.channels

    def _layer(self, name: str, layer: LayerRecord) -> LayerPlan:
        op = self.analysis.ops[self._node(name)]
        if not isinstance(op, Mix):
            raise ValueError(f"{name} is no layer")
        filters = self._channels(layer.filters, 0, op.filters, op.filters)
        inputs = self._channels(layer.inputs, 0, op.channels, op.channels)
        lowering = tuple(_branch(branch, len(filters), len(inputs)) for branch in layer.parts)
        norm = None if layer.norm is None else self._node(layer.norm)
        plan = LayerPlan((), lowering, filters, inputs, norm)
        if (op.layer, plan.key) not in self.counted:  # calls that are alike share their weights
            self.counted.add((op.layer, plan.key))
            self.weights_left -= op.taps * weights(lowering)
        if not lowering or self.weights_left < 0:
            raise ValueError(f"{name} has other weights than there are")
        return plan


def _branch(record: BranchRecord, filters: int, inputs: int) -> Branch:
    rows = [checked(row, -1, filters) for row in record.filters]
    lists = [checked(row, -1, inputs) for row in record.inputs]
    widths = {len(row) for row in rows}, {len(row) for row in lists}
    if len(rows) != len(lists) or any(len(width) != 1 for width in widths):
        raise ValueError("the groups of a branch differ in size")
    return Branch(np.stack(rows), np.stack(lists))


def checked(numbers: Numbers, least: int, count: int) -> IntArray:
    """`numbers` as an array; ValueError if one is not of `least` to `count - 1`."""
    if numbers and not least <= min(numbers) <= max(numbers) < count:
        raise ValueError(f"channels {min(numbers)} to {max(numbers)} where there are {count}")
    return np.array(numbers, np.int64)


def _layer_record(layer: LayerPlan, number: Callable[[IntArray], int]) -> LayerRecord:
    parts = tuple(BranchRecord(_rows(p.filters), _rows(p.inputs)) for p in layer.lowering)
    norm = None if layer.norm is None else layer.norm.name
    return LayerRecord(number(layer.filters), number(layer.inputs), norm, parts)


def _rows(numbers: IntArray) -> tuple[Numbers, ...]:
    return tuple(tuple(row) for row in numbers.tolist())
