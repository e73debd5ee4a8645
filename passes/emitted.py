"""What a network costs as it is emitted: the zeros that fill up its forms included.

1. A layer costs what its lowering has, not what its masks leave.
2. A batch norm that is folded into a layer costs nothing; the layer has a bias then.
3. Any other operator costs what it works on: perhaps more channels than are live.
"""

from torch.fx.node import Node

from dspfx.passes.cost import Cost, layer_costs, total
from dspfx.passes.liveness import Liveness
from dspfx.passes.lowering import weights, written
from dspfx.passes.plan import CompactionPlan
from dspfx.passes.values import ChannelAnalysis, Channelwise, Mix


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
    """Of the whole model: MACs for every call, parameters once for every module emitted."""
    forms: dict[Node, object] = {
        node: (node in plan.folded, None if order is None else order.tobytes())
        for node, order in plan.order.items()
    }
    forms |= {node: layer.key for node, layer in plan.layers.items()}
    return total(emitted_costs(analysis, live, plan), analysis, forms)
