"""Removability analysis: what masks can take out of a network, and what keeps the rest.

1. *Pinned classes* keep their width whatever is pruned: those of the inputs and outputs of the
   model, of the filters and inputs of a frozen layer, and of every operand of an operator that
   does not keep channels apart. A layer that adds to a pinned class may still stop writing to it.
2. *Droppable layers* are summed into a residual stream: a dropped filter simply stops writing its
   channel, which stays. From such a layer a chain of single readers, each of which keeps zeros or
   is a gated norm, leads to a sum.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch.fx.node import Node

from dspfx.passes.analysis.channel_ops import (
    ChannelAnalysis,
    Channelwise,
    Constant,
    Declined,
    Elementwise,
    FullWidth,
    Gate,
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
