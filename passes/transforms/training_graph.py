"""Derive the compact training graph from the evaluation graph, where they differ in flags only.

`training=` says to functional dropout and stochastic depth whether the model is in training.
Two graphs that are the same but for such flags have the same channels, so that what one was
compacted to serves the other:

1. Graphs with the same nodes in the same order, which read equal constants: of the compact graph's
   copy, the flags are set that differ between the two.
2. All else is declined: a head that is called in training alone, a number that training adds.
"""

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Node, map_arg

from dspfx.passes.transforms.compacted import Compacted

FLAG = "training"


def training_graph(
    compacted: Compacted, root: nn.Module, graphs: Mapping[bool, fx.Graph]
) -> fx.Graph | None:
    """The compact graph for training, over the same modules; None if it is declined.

    Args:
        compacted: from the graph of evaluation; only read.
        root: holds what the graphs name.
        graphs: of evaluation, False, and of training, True.
    """
    if graphs[True] is graphs[False]:
        return compacted.graph
    pairs = list(zip(graphs[False].nodes, graphs[True].nodes, strict=False))
    same = len(graphs[False].nodes) == len(graphs[True].nodes)
    twins = dict(pairs)
    if not same or not all(_alike(node, twin, twins, root) for node, twin in pairs):
        return None
    graph = copy.deepcopy(compacted.graph)
    copies = dict(zip(compacted.graph.nodes, graph.nodes, strict=True))
    for node, twin in pairs:
        new = compacted.nodes.get(node)
        if new is not None and not _set_flags(copies[new], node, twin):
            return None
    graph.lint()
    return graph


def _alike(node: Node, twin: Node, twins: Mapping[Node, Node], root: nn.Module) -> bool:
    """Whether two nodes apply one operator to corresponding nodes; other arguments may differ."""
    read = [twins.get(n) for n in node.all_input_nodes]
    if node.op != twin.op or read != twin.all_input_nodes:
        return False
    if node.target == twin.target:
        return True
    if node.op != "get_attr":
        return False
    own, other = (_tensor(root, str(n.target)) for n in (node, twin))
    constant = not isinstance(own, nn.Parameter) and not isinstance(other, nn.Parameter)
    return constant and torch.equal(own, other)


def _tensor(root: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    found: torch.Tensor = getattr(root.get_submodule(path), leaf)
    return found


def _set_flags(new: Node, node: Node, twin: Node) -> bool:
    """Give `new`, emitted for `node`, the flags of `twin`; whether nothing else differs."""
    if len(node.args) != len(twin.args) or node.kwargs.keys() != twin.kwargs.keys():
        return False
    args: Iterator[tuple[int | str, Any]] = enumerate(node.args)
    for place, own in itertools.chain(args, node.kwargs.items()):
        other: Any = twin.args[place] if isinstance(place, int) else twin.kwargs[place]
        if repr(map_arg(own, _anything)) == repr(map_arg(other, _anything)):
            continue
        if not isinstance(other, bool) or new.target != node.target or _name(node, place) != FLAG:
            return False
        if isinstance(place, str):
            new.update_kwarg(place, other)
        elif place < len(new.args):
            new.update_arg(place, other)
        else:
            return False
    return True


def _anything(_: Node) -> str:
    return "a node"


def _name(node: Node, place: int | str) -> str:
    """The parameter name of the argument at `place`; empty if unknown."""
    if isinstance(place, str):
        return place
    try:
        names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    return names[place] if place < len(names) else ""
