"""The layers whose filters may be dropped: those that are summed into a residual stream.

From such a layer a chain of single readers, each of which keeps zeros or is a gated norm, leads to
a sum. A dropped filter then simply stops writing its channel.
"""

from collections import defaultdict

from torch.fx.node import Node

from dspfx.passes.analysis.channel_ops import (
    ChannelAnalysis,
    Channelwise,
    Constant,
    Elementwise,
    Gate,
    Mix,
)


def droppable_layers(analysis: ChannelAnalysis) -> frozenset[str]:
    """The names of the gated layers whose every call ends in a sum."""
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node, op in analysis.ops.items():
        for operand in op.operands:
            readers[operand].append(node)
    verdicts: dict[str, bool] = {}
    for node, op in analysis.ops.items():
        if isinstance(op, Mix) and op.gated:
            summed = _ends_in_a_sum(analysis, readers, node)
            verdicts[op.layer] = verdicts.get(op.layer, True) and summed
    return frozenset(name for name, summed in verdicts.items() if summed)


def _ends_in_a_sum(analysis: ChannelAnalysis, readers: dict[Node, list[Node]], node: Node) -> bool:
    while len(readers[node]) == 1:
        (node,) = readers[node]
        op = analysis.ops[node]
        if isinstance(op, Elementwise) and op.keeps_zero and not op.absorbing:
            terms = [
                operand
                for operand, spans in zip(op.operands, op.spans, strict=True)
                if spans and not isinstance(analysis.ops[operand], Constant)
            ]
            if len(terms) > 1:
                return True
        elif isinstance(op, Channelwise):
            gated = op.shifts and all(
                isinstance(analysis.ops[reader], Gate) for reader in readers[node]
            )
            if not (gated or op.keeps_zero.all()):
                return False
        elif not isinstance(op, Gate):
            return False
    return False
