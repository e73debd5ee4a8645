"""`channel_graph`: who writes and who reads which channels, as a graph to query and draw."""

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from dspfx.model.analysed import analyse_prepared
from dspfx.model.parts import parts_of
from dspfx.passes.analysis.channel_ops import ChannelAnalysis, FullWidth, Mix, Source

if TYPE_CHECKING:
    import networkx as nx


def channel_graph(prepared: nn.Module) -> "nx.DiGraph[str]":
    """The dependency structure of a prepared model.

    Returns:
        A bipartite directed graph. Nodes with `kind="layer"` are convolutions and linear layers by
        name, with `filters`, `inputs` and `gated`; the model's inputs and its opaque operators are
        `kind="input"` and `kind="opaque"`. Nodes with `kind="channels"` are sets of coupled
        channels that the same layers write, `size` of them. An edge leads from a writer to the
        channels it writes, and from channels to a layer that reads `channels` of them.

    Raises:
        ConvertError: `prepared` does not come from `dspfx.prepare`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> graph = dspfx.channel_graph(prepared)
        >>> graph.nodes["1"]
        {'kind': 'layer', 'filters': 8, 'inputs': 8, 'gated': True}
    """
    import networkx as nx  # noqa: PLC0415 (slow to import)

    whole: nx.DiGraph[str] = nx.DiGraph()
    for part in parts_of(prepared):
        graph = _graph_of(analyse_prepared(part.module))
        whole.update(nx.relabel_nodes(graph, part.full_name))
    return whole


def _graph_of(analysis: ChannelAnalysis) -> "nx.DiGraph[str]":
    import networkx as nx  # noqa: PLC0415 (slow to import)

    graph: nx.DiGraph[str] = nx.DiGraph()
    writers = _add_writers(graph, analysis)
    members: dict[frozenset[str], set[int]] = defaultdict(set)
    for channel, names in writers.items():
        members[frozenset(names)].add(channel)
    home: dict[int, str] = {}
    for number, (owners, channels) in enumerate(members.items()):
        node = f"channels {number}"
        graph.add_node(node, kind="channels", size=len(channels))
        graph.add_edges_from((owner, node) for owner in owners)
        home.update(dict.fromkeys(channels, node))
    _add_readers(graph, analysis, home)
    return graph


def _add_writers(graph: "nx.DiGraph[str]", analysis: ChannelAnalysis) -> dict[int, set[str]]:
    """Add whatever makes channels as a node; the writers of every coupling class."""
    writers: dict[int, set[str]] = defaultdict(set)
    for node, op in analysis.ops.items():
        match op:
            case Mix():
                name = op.layer
                facts = {"filters": op.filters, "inputs": op.channels, "gated": op.gated}
                graph.add_node(name, kind="layer", **facts)
            case Source():
                name = node.name
                graph.add_node(name, kind="input")
            case FullWidth() if node in analysis.values and analysis.values[node].channels:
                name = node.name
                graph.add_node(name, kind="opaque")
            case _:
                continue
        for channel in analysis.class_of(node).tolist():
            writers[channel].add(name)
    return writers


def _add_readers(graph: "nx.DiGraph[str]", analysis: ChannelAnalysis, home: dict[int, str]) -> None:
    for op in analysis.ops.values():
        if not isinstance(op, Mix) or not analysis.values[op.operands[0]].channels:
            continue
        read = np.unique(analysis.class_of(op.operands[0])).tolist()
        nodes = [home[channel] for channel in read if channel in home]
        for node in dict.fromkeys(nodes):
            graph.add_edge(node, op.layer, channels=nodes.count(node))
