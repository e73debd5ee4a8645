"""Which channels keep their place whatever is pruned, and the node that pins each.

1. The inputs and outputs of the model keep their channels.
2. A frozen layer keeps its filters and its inputs.
3. An operator that does not keep channels apart is given all of them.

A layer that adds to a pinned class may still stop writing to it; only the width stays.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch.fx.node import Node

from dspfx.passes.analysis.channel_ops import (
    ChannelAnalysis,
    Declined,
    FullWidth,
    Mix,
    Op,
    Source,
    used,
)


def pinned_classes(analysis: ChannelAnalysis, lines: Mapping[str, str]) -> dict[int, Declined]:
    """The first node that pins a coupling class, for every class that is pinned.

    Args:
        analysis: of the graph.
        lines: the line of source of each node, by name.
    """
    pinned: dict[int, Declined] = {}
    read = used(analysis.ops)
    for node, op in analysis.ops.items():
        for value, reason in _pins(node, op, node in read):
            if value in analysis.values:
                pin = Declined(node.name, reason, lines.get(node.name, ""))
                for channel in set(analysis.class_of(value).tolist()):
                    pinned.setdefault(channel, pin)
    return pinned


def with_lines(declined: tuple[Declined, ...], lines: Mapping[str, str]) -> tuple[Declined, ...]:
    """`declined`, each with its line of source."""
    return tuple(replace(d, line=lines.get(d.node, "")) for d in declined)


def _pins(node: Node, op: Op, read: bool) -> Iterator[tuple[Node, str]]:
    match op:
        case Source():
            yield node, "the model's input"
        case FullWidth() if node.op == "output":
            yield from ((operand, "the model's output") for operand in op.operands)
        case FullWidth() if read:
            reason = op.reason or "the whole size is asked for"
            yield from ((operand, reason) for operand in op.operands)
        case Mix(frozen=True):
            yield node, "the layer is to be ignored"
            yield op.operands[0], "the layer is to be ignored"
        case Mix(full_width=True):
            yield op.operands[0], "the layer does not read whole channels of it"
