"""Cost of the emitted network: including the zeros that fill up the forms of its layers.

1. A layer costs what its lowering has, not what its masks leave.
2. A batch norm that is folded into a layer costs nothing; the layer has a bias then.
3. Any other operator costs what it works on: perhaps more channels than are live.
"""

import numpy as np
from torch.fx.node import Node

from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Channelwise, Mix, Tie
from dspfx.passes.analysis.cost import Cost, layer_costs, summed
from dspfx.passes.analysis.liveness import Liveness
from dspfx.passes.lowering.forms import weights, written
from dspfx.passes.transforms.plan import CompactionPlan
from dspfx.utils.arrays import IntArray


def emitted_costs(
    analysis: ChannelAnalysis, live: Liveness, plan: CompactionPlan
) -> dict[Node, Cost]:
    """The cost of every call of a layer as `plan` emits it."""
    costs = layer_costs(analysis, live)
    for node in costs:
        op = analysis.ops[node]
        if node in plan.folded:
            costs[node] = Cost(0, 0)
        elif isinstance(op, Channelwise) and (order := plan.order.get(node)) is not None:
            channels = len(order) // op.repeat
            costs[node] = Cost(channels * op.macs_per_channel, channels * op.parameters_per_channel)
        elif isinstance(op, Mix) and (layer := plan.layers.get(node)) is not None:
            count = op.taps * weights(layer.lowering)
            has_bias = op.has_bias or layer.norm is not None
            biases = len(written(layer.lowering)) if has_bias else 0
            costs[node] = Cost(count * op.positions, count + biases)
    return costs


def emitted_total(analysis: ChannelAnalysis, live: Liveness, plan: CompactionPlan) -> Cost:
    """The cost of the model: MACs for every call, parameters once for every module emitted."""
    forms: dict[Node, object] = {
        node: (node in plan.folded, None if order is None else order.tobytes())
        for node, order in plan.order.items()
    }
    forms |= {node: layer.key for node, layer in plan.layers.items()}
    costs = emitted_costs(analysis, live, plan)
    tied = {node for tie in analysis.fixed.ties for node in (tie.node, tie.owner)}
    cut = {node for node in tied if not is_whole(analysis, plan, node)}
    return summed(costs, analysis, live, forms, cut)


def is_whole(analysis: ChannelAnalysis, plan: CompactionPlan, node: Node) -> bool:
    """Whether the module that `node` calls is emitted with the parameters that it had."""
    op = analysis.ops.get(node)
    if isinstance(op, Mix):
        layer = plan.layers.get(node)
        if layer is None or layer.norm is not None or len(layer.lowering) != 1:
            return False
        (part,), count = layer.lowering, op.structural_groups
        as_it_was = len(part.filters) == count and part.weights * count == op.filters * op.channels
        orders = (layer.filters, part.filters, layer.inputs, part.inputs)
        return as_it_was and all(_in_order(order.reshape(-1)) for order in orders)
    if isinstance(op, Channelwise) and node in plan.order:
        order = plan.order[node]
        every = analysis.values[node].channels
        return node not in plan.folded and (
            order is None or (len(order) == every and _in_order(order))
        )
    return True


def kept_ties(analysis: ChannelAnalysis, plan: CompactionPlan) -> list[Tie]:
    """The parameters that are emitted once and shared, as they were."""
    return [
        tie
        for tie in analysis.fixed.ties
        if all(is_whole(analysis, plan, node) for node in (tie.node, tie.owner))
    ]


def broken_ties(analysis: ChannelAnalysis, plan: CompactionPlan) -> tuple[str, ...]:
    """Parameters that were shared, and are stored twice because two emitted modules differ."""
    kept = kept_ties(analysis, plan)
    return tuple(
        f"{tie.name} and {tie.owner_name} share a parameter, of which not the same is left: in the "
        "compact model each has its own; PrepareConfig(ignore=...) keeps both layers as they are"
        for tie in analysis.fixed.ties
        if tie not in kept and {tie.node, tie.owner} <= plan.order.keys()
    )


def _in_order(numbers: IntArray) -> bool:
    return np.array_equal(numbers, np.arange(len(numbers)))
