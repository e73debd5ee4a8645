"""What a network costs, from its liveness alone: multiply-accumulates and parameters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from torch.fx.node import Node

from dspfx.passes.liveness import Liveness
from dspfx.passes.values import ChannelAnalysis, Channelwise, Mix


@dataclass(frozen=True)
class Cost:
    """Of a layer or a model, for one sample.

    Attributes:
        macs: multiply-accumulate operations.
        parameters: of convolutions, linear layers and channelwise operators.
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


def total(
    costs: Mapping[Node, Cost],
    analysis: ChannelAnalysis,
    emitted: Mapping[Node, object] = MappingProxyType({}),
) -> Cost:
    """Of the model: MACs for every call, parameters once for every layer.

    Of calls whose `emitted` differs, which says how they are emitted, each has parameters.
    """
    macs = sum(cost.macs for cost in costs.values())
    owners = {
        (getattr(analysis.ops[node], "layer", None) or node.target, emitted.get(node)): node
        for node in costs
    }
    return Cost(macs, sum(costs[node].parameters for node in owners.values()))
