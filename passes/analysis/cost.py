"""Cost analysis: multiply-accumulates and parameters of a network, from its liveness alone."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from torch.fx.node import Node

from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Channelwise, Constant, Mix, Op
from dspfx.passes.analysis.liveness import Liveness


@dataclass(frozen=True)
class Cost:
    """The cost of a layer or a model, for one sample.

    Attributes:
        macs: multiply-accumulate operations.
        parameters: all of them; of a layer, its weight and bias.
    """

    macs: int
    parameters: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.macs + other.macs, self.parameters + other.parameters)


def together(costs: Iterable[Cost]) -> Cost:
    """The sum of `costs`, nothing for none."""
    return sum(costs, Cost(0, 0))


def layer_costs(analysis: ChannelAnalysis, live: Liveness | None = None) -> dict[Node, Cost]:
    """The cost of every call of a layer: as it was, or what is left under `live`."""
    costs: dict[Node, Cost] = {}
    for node, op in analysis.ops.items():
        match op:
            case Mix():
                costs[node] = _mix(op, node, live)
            case Channelwise() if op.macs_per_channel or op.parameters_per_channel:
                channels = analysis.values[node].channels // op.repeat
                if live is not None:
                    channels = int(live.kept[node].sum()) if node in live.kept else 0
                costs[node] = Cost(
                    channels * op.macs_per_channel, channels * op.parameters_per_channel
                )
    return costs


def _mix(op: Mix, node: Node, live: Liveness | None) -> Cost:
    filters, weights = op.filters, op.filters * op.channels // op.structural_groups
    if live is not None:
        filters, weights = 0, 0
        if node in live.kept:
            row = live.reads[op.layer].row[live.kept[node]]
            read = live.reads_live(node, op).sum(1)
            # a filter that reads nothing but is kept, as a constant, is emitted reading one
            weights = int(np.where(row < 0, 1, np.maximum(read[row], 1)).sum())
            filters = len(row)
    biases = filters if op.has_bias else 0
    return Cost(weights * op.taps * op.positions, weights * op.taps + biases)


def total(analysis: ChannelAnalysis, live: Liveness | None = None) -> Cost:
    """The cost of the model, as it was or what is left under `live`."""
    costs = layer_costs(analysis, live)
    if live is None:
        return summed(costs, analysis)
    return summed(costs, analysis, live, cut=_cut(costs, analysis))


def summed(
    costs: Mapping[Node, Cost],
    analysis: ChannelAnalysis,
    live: Liveness | None = None,
    forms: Mapping[Node, object] = MappingProxyType({}),
    cut: Set[Node] = frozenset(),
) -> Cost:
    """The cost of the model: MACs for every call, parameters once for every module.

    Args:
        costs: of the calls of layers.
        analysis: says what is spent besides.
        live: what is left; None for all.
        forms: of calls of one module that differ in this, each has parameters.
        cut: the calls that no longer have all of their parameters. They share none.
    """
    fixed, ops = analysis.fixed, analysis.ops

    def there(node: Node) -> bool:
        needed = live is None or node not in ops or node in live.kept
        return needed or isinstance(ops[node], Constant)

    macs = fixed.outside + sum(cost.macs for cost in costs.values())
    for node, count in fixed.macs.items():
        computed_once = live is not None and isinstance(ops.get(node), Constant)
        macs += count if there(node) and not computed_once else 0
    owners = {(_owner(node, ops[node]), forms.get(node)): node for node in costs}
    parameters = sum(costs[node].parameters for node in owners.values())
    for node, count in fixed.parameters.items():
        # what the weight of a layer was computed from is gone where the layer is a plain one
        computed_once = live is not None and isinstance(ops.get(node), Mix)
        parameters += (min(0, count) if computed_once else count) if there(node) else 0
    parameters += fixed.unused if live is None else 0
    for tie in fixed.ties:
        broken = not there(tie.owner) or not cut.isdisjoint((tie.node, tie.owner))
        parameters += tie.count if there(tie.node) and broken else 0
    return Cost(macs, parameters)


def _owner(node: Node, op: Op) -> object:
    """What has the parameters of a call."""
    called = node.target if node.op == "call_module" else node
    return getattr(op, "layer", None) or called


def _cut(costs: Mapping[Node, Cost], analysis: ChannelAnalysis) -> set[Node]:
    dense = layer_costs(analysis) if analysis.fixed.ties else {}
    return {node for node in dense if costs[node].parameters != dense[node].parameters}
