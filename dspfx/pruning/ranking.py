"""The order in which channels and inputs of groups go: by what is lost with them, over their cost.

Costs are marginal, at what is alive at present: of a coupling class, what all layers spend on
writing and reading it; of a channel of a group, what the group's filters spend on reading it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from torch import Tensor
from torch.fx.node import Node

from dspfx.engines.engines import engines_named
from dspfx.layers.gated import gated_layers
from dspfx.layers.gates import FilterGate
from dspfx.model.liveness import present_liveness
from dspfx.model.parts import Part
from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Mix
from dspfx.passes.analysis.liveness import Liveness, ReadLists
from dspfx.pruning.budget import Budget
from dspfx.pruning.channel_order import ChannelOrder, removable, sides, tied, width_of
from dspfx.pruning.latency import LatencyTable
from dspfx.pruning.prunable_layer import PrunableLayer
from dspfx.utils.arrays import BoolArray, FloatArray

Prices = Mapping[Node, float]  # of one filter that reads one channel


class Losses(Protocol):
    """What is lost with each channel of a prepared module: of the loss, or of its energy."""

    @property
    def classes(self) -> Tensor:
        """Float64 `[classes]`: with a channel that goes whole."""

    @property
    def groups(self) -> Mapping[str, Tensor]:
        """Name of a gated layer -> float64 `[S, G, C/S]`: with a channel that a group drops."""

    def unknown(self) -> tuple[Tensor, frozenset[str]]:
        """Bool `[classes]` and names of layers: of what these read nothing is known; it stays."""


@dataclass(frozen=True)
class SensitivePart(ChannelOrder):
    """A prepared module whose channels and inputs of groups are ordered together.

    Attributes:
        layers: the order of the inputs of groups.
        resolution: half the share of one.
    """

    layers: dict[str, PrunableLayer]

    def reads_at(self, threshold: float) -> dict[str, ReadLists]:
        """See `ChannelOrder`: what the groups still read."""
        round_to = self.module.asked.round_to
        return {name: layer.reads(threshold, round_to) for name, layer in self.layers.items()}


def sensitive_parts(
    parts: Sequence[Part],
    losses: Iterable[Losses],
    budget: Budget,
    tables: Sequence[LatencyTable],
    groups: bool,
) -> list[SensitivePart]:
    """The order of everything in all parts, by loss over cost, as shares of its number.

    Args:
        parts: of a model.
        losses: of each.
        budget: what the cost is of.
        tables: of each part, for a budget of latency.
        groups: whether inputs of groups go, too.
    """
    own: Sequence[LatencyTable | None] = tables or [None] * len(parts)
    made = [
        _unordered(part, lost, budget, table, groups)
        for part, lost, table in zip(parts, losses, own, strict=True)
    ]
    scores = [a for part in made for a in (part.lost, *_channels(part))]
    everything = np.concatenate([a.ravel() for a in scores])
    going = np.flatnonzero(np.isfinite(everything) & (everything >= 0))
    order = going[np.argsort(everything[going], kind="stable")]
    everything[order] = np.arange(1, len(order) + 1) / max(len(order), 1)
    ends = np.cumsum([a.size for a in scores])[:-1]
    for array, ranks in zip(scores, np.split(everything, ends), strict=True):
        array[...] = ranks.reshape(array.shape)
    return [replace(part, resolution=0.5 / max(len(order), 1)) for part in made]


def _channels(part: SensitivePart) -> list[FloatArray]:
    return [layer.lost_channels for layer in part.layers.values()]


def _unordered(
    part: Part, losses: Losses, budget: Budget, table: LatencyTable | None, groups: bool
) -> SensitivePart:
    """A part with scores in place of the order."""
    analysis, live = present_liveness(part.module)
    gates = {name: layer.gate for name, layer in gated_layers(part.module).items()}
    mixes = {op.layer: op for op in analysis.ops.values() if isinstance(op, Mix) and op.gated}
    both = list(sides(part, analysis))
    prices = _prices(budget, table, analysis, live)
    cost, group_costs = _costs(analysis, live, gates, prices)
    values = losses.classes.cpu().numpy().copy()
    liked = 1 if table is None else engines_named([budget.engine])[0].multiple
    for classes in tied(both, part.module.asked.round_to, liked):
        left = classes[cost[classes] > 0]
        if len(left):
            values[left], cost[left] = values[left].mean(), cost[left].mean()
    unknown, unknown_layers = losses.unknown()
    going = removable(analysis, both, values) & ~unknown.cpu().numpy()
    lost = np.full(len(values), np.inf)
    lost[going & (cost == 0)] = -1.0  # gone already: it is no part of any width
    going &= cost > 0
    lost[going] = values[going] / cost[going]
    layers = {}
    for name, gate in gates.items():
        of_groups = losses.groups[name].cpu().numpy()
        scores = np.full(of_groups.shape, np.inf)
        saved = 1.0 if table is None else table.own_inputs.get(name, 1.0)
        if groups and saved > 0 and name not in unknown_layers:
            scores = _scores(of_groups, group_costs[name] * saved)
        op, mask, group = mixes[name], gate.mask.cpu().numpy(), gate.assignment.cpu().numpy()
        scores[_readers(mask.reshape(op.structural_groups, -1, mask.shape[1]), gate) == 0] = -1.0
        filters = np.full(op.filters, np.inf)
        alive = gate.alive.cpu().numpy()
        layers[name] = PrunableLayer.of(op, mask, group, scores, filters, alive)
    widths = tuple(map(width_of, both))
    return SensitivePart(part.module, analysis, part.name, lost, widths, layers, liked=liked)


def _prices(
    budget: Budget, table: LatencyTable | None, analysis: ChannelAnalysis, live: Liveness
) -> Prices:
    """What it costs of the budget that one filter reads one channel, in every call of a layer."""
    mixes = {node: op for node, op in analysis.ops.items() if isinstance(op, Mix)}
    if budget.params is not None:
        return {node: op.taps for node, op in mixes.items()}
    macs = {node: op.taps * op.positions for node, op in mixes.items()}
    if table is None:
        return macs
    seconds = table.seconds_a_mac(live)
    return {node: macs[node] * seconds[node] for node in mixes}


def _costs(
    analysis: ChannelAnalysis, live: Liveness, gates: Mapping[str, FilterGate], prices: Prices
) -> tuple[FloatArray, dict[str, FloatArray]]:
    """The costs of the coupling classes, and `[S, G, C/S]` of every gated layer."""
    count = analysis.class_count
    classes, groups = np.zeros(count), dict[str, FloatArray]()
    for node, each in prices.items():
        op = analysis.ops[node]
        assert isinstance(op, Mix)
        alive = _alive(live, node, op)
        classes += np.bincount(analysis.class_of(node), alive.sum(1) * each, count)
        if not op.full_width:
            inputs = analysis.class_of(op.operands[0])
            classes += np.bincount(inputs, alive.sum(0) * each, count)
        if op.gated:
            own = each * _readers(_by_structure(op, alive), gates[op.layer])
            groups[op.layer] = own + groups.get(op.layer, np.zeros(own.shape))
    return classes, groups


def _alive(live: Liveness, node: Node, op: Mix) -> BoolArray:
    """Bool `[O, C]`: what the kept filters of a call read of what is alive."""
    reads = live.reads[op.layer]
    kept = live.kept.get(node, np.zeros(op.filters, bool)) & (reads.row >= 0)
    alive: BoolArray = live.reads_live(node, op)[reads.row] & kept[:, None]
    return alive


def _by_structure(op: Mix, matrix: BoolArray) -> BoolArray:
    """`[S, O/S, C/S]`: of a matrix `[O, C]` what the structural groups read of their own."""
    structural = op.structural_groups
    own = np.arange(structural)
    split = matrix.reshape(structural, op.filters // structural, structural, -1)
    return split[own, :, own]


def _readers(reads: BoolArray, gate: FilterGate) -> FloatArray:
    """`[S, G, C/S]`: how many filters of a group read a channel; `reads` is `[S, O/S, C/S]`."""
    group = gate.assignment.cpu().numpy().reshape(len(reads), -1)
    return np.array(
        [
            [rows[own == g].sum(0) for g in range(len(gate.logits))]
            for rows, own in zip(reads, group, strict=True)
        ],
        float,
    )


def _scores(values: FloatArray, costs: FloatArray) -> FloatArray:
    """`[S, G, C/S]`: loss over cost; infinite for the best of a group."""
    known = costs > 0
    scores = np.full(values.shape, np.inf)
    scores[known] = values[known] / costs[known]
    best = np.where(known, values, -1.0).argmax(-1)
    np.put_along_axis(scores, best[..., None], np.inf, -1)
    return scores
