"""From the compact graph of evaluation to that of training, where the code differs in values only.

Functional dropout and stochastic depth are told by a plain argument whether the model is in
training. Two graphs that are the same but for such arguments have the same channels, so that what
one was compacted to serves the other:

1. Graphs with the same nodes in the same order: of the compact graph's copy, those arguments are
   set that differ between the two.
2. All else, for instance a head that is called in training alone, is declined.
"""

import copy
from typing import Any

from torch import fx
from torch.fx.node import Node, map_arg

from dspfx.passes.compact import Compacted


def training_graph(
    compacted: Compacted, evaluation: fx.Graph, training: fx.Graph
) -> fx.Graph | None:
    """The compact graph for training, over the same modules; None if it is declined.

    Args:
        compacted: from `evaluation`; only read.
        evaluation, training: of one model.
    """
    if training is evaluation:
        return compacted.graph
    if not _alike(evaluation, training):
        return None
    graph = copy.deepcopy(compacted.graph)
    copies = dict(zip(compacted.graph.nodes, graph.nodes, strict=True))
    for node, twin in zip(evaluation.nodes, training.nodes, strict=True):
        new = compacted.nodes.get(node)
        if new is not None and not _set_what_differs(copies[new], node, twin):
            return None
    graph.lint()
    return graph


def _alike(first: fx.Graph, second: fx.Graph) -> bool:
    """Whether they have the same nodes that read each other in the same way."""

    def described(graph: fx.Graph) -> list[tuple[Any, ...]]:
        number = {node: index for index, node in enumerate(graph.nodes)}
        return [
            (node.op, node.target, [number[n] for n in node.all_input_nodes])
            for node in graph.nodes
        ]

    return described(first) == described(second)


def _set_what_differs(new: Node, node: Node, twin: Node) -> bool:
    """Give `new`, a copy of `node`, what differs in the arguments of `twin`; whether it can be."""
    if len(node.args) != len(twin.args) or node.kwargs.keys() != twin.kwargs.keys():
        return False
    for place, (own, other) in enumerate(zip(node.args, twin.args, strict=True)):
        if _differ(own, other):
            if not _plain(own) or place >= len(new.args):
                return False
            new.update_arg(place, other)
    for name, own in node.kwargs.items():
        if _differ(own, twin.kwargs[name]):
            if not _plain(own) or name not in new.kwargs:
                return False
            new.update_kwarg(name, twin.kwargs[name])
    return True


def _plain(argument: Any) -> bool:
    return not isinstance(argument, Node | tuple | list | dict | slice)


def _differ(argument: Any, other: Any) -> bool:
    """Apart from the nodes in it, of which is known that they are the same."""
    return repr(map_arg(argument, _name)) != repr(map_arg(other, _name))


def _name(_: Node) -> str:
    return "a node"
