"""Agreement of the channel analysis at two input sizes: keep what holds at every size.

1. A dimension whose size varies holds positions, never channels: no value has its channels there.
2. A node that does something else to channels at another size, such as a slice of channels whose
   end is the height of the image, is given all its channels, and so is opaque.

The first is found from executions of one graph on two examples, the second from analyses of these.
Both hold for every further analysis of that graph.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor
from torch.fx.node import Node

from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Channelwise, Elementwise, Mix, Op
from dspfx.passes.analysis.execution import Execution

_ROUNDS = 20


@dataclass(frozen=True)
class SizeFacts:
    """Facts about the nodes of a graph, by name, that come from comparing sizes.

    Attributes:
        varying: the dimensions of a node's tensor whose size depends on that of the inputs.
        dependent: the nodes whose effect on channels does.
    """

    varying: dict[str, frozenset[int]] = field(default_factory=dict)
    dependent: frozenset[str] = frozenset()

    def are_positions(self, node: Node, dim: int | None) -> bool:
        """Whether dimension `dim` of the tensor of `node` has no channels."""
        return dim in self.varying.get(node.name, ())


def agree(
    analyse: Callable[[SizeFacts], Sequence[ChannelAnalysis]], executions: Sequence[Execution]
) -> tuple[ChannelAnalysis, SizeFacts]:
    """The analysis of the first example, and the facts under which all examples have the same.

    Args:
        analyse: analyses the graph on all examples, given facts.
        executions: of the graph on the examples.
    """
    facts = SizeFacts(_varying(executions))
    for _ in range(_ROUNDS):
        analyses = analyse(facts)
        found = facts
        for first, other in ((analyses[0], other) for other in analyses[1:]):
            found = _joined(found, _differences(first, other))
        if found == facts:
            break
        facts = found
    return analyses[0], facts


def _varying(executions: Sequence[Execution]) -> dict[str, frozenset[int]]:
    """The dimensions whose size is not the same in all `executions`, by the names of nodes."""
    varying: dict[str, frozenset[int]] = {}
    for node, shape in executions[0].shapes():
        for other in executions[1:]:
            result = other.results.get(node)
            if isinstance(result, Tensor) and result.dim() == len(shape):
                own = frozenset(d for d, n in enumerate(shape) if n != result.shape[d])
                if own:
                    varying[node.name] = varying.get(node.name, frozenset()) | own
    return varying


def _joined(one: SizeFacts, other: SizeFacts) -> SizeFacts:
    names = one.varying.keys() | other.varying.keys()
    none = frozenset[int]()
    varying = {n: one.varying.get(n, none) | other.varying.get(n, none) for n in names}
    return SizeFacts(varying, one.dependent | other.dependent)


def _differences(first: ChannelAnalysis, other: ChannelAnalysis) -> SizeFacts:
    """Which sizes differ, and the first nodes that do not do the same."""
    varying: dict[str, frozenset[int]] = {}
    moved = False
    for node, value in first.values.items():
        shape = other.values[node].shape if node in other.values else value.shape
        if len(shape) != len(value.shape):
            continue
        dims = frozenset(
            d for d, (a, b) in enumerate(zip(value.shape, shape, strict=False)) if a != b
        )
        if dims:
            varying[node.name] = dims
            moved = moved or value.dim in dims
    if moved:  # channels were taken for what are positions: look again before judging nodes
        return SizeFacts(varying)
    different: set[Node] = set()
    for node in (*first.ops, *(n for n in other.ops if n not in first.ops)):
        if not _is_same(node, first, other) and not different.intersection(node.all_input_nodes):
            different.add(node)
    return SizeFacts(varying, frozenset(node.name for node in different))


def _is_same(node: Node, first: ChannelAnalysis, other: ChannelAnalysis) -> bool:
    """Whether `node` does the same to channels in both."""
    here, there = first.values.get(node), other.values.get(node)
    if (here is None) != (there is None):
        return False
    if here and there and (here.dim, here.channels) != (there.dim, there.channels):
        return False
    one, two = first.ops.get(node), other.ops.get(node)
    return one is None or two is None or _facts(one) == _facts(two)


def _facts(op: Op) -> tuple[object, ...]:
    """The fields of an operation that must agree: all but costs and optional savings."""
    match op:
        case Mix():
            op = replace(op, positions=0)
        case Channelwise():
            op = replace(op, macs_per_channel=0)
        case Elementwise():
            op = replace(op, skips_zero=())
    return type(op), *(_plain(value) for value in vars(op).values())


def _plain(value: object) -> object:
    return value.tobytes() if isinstance(value, np.ndarray) else value
