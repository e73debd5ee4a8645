"""`channel_graph`: the structure of a network that everybody knows."""

import networkx as nx
import pytest
import torch
import torchvision

import dspfx


def test_the_streams_of_a_resnet() -> None:
    model = torchvision.models.resnet18(weights=None)
    graph = dspfx.channel_graph(dspfx.prepare(model, torch.randn(2, 3, 32, 32)))
    layers = [n for n, kind in graph.nodes(data="kind") if kind == "layer"]
    assert len(layers) == 21
    facts = {"kind": "layer", "filters": 64, "inputs": 64, "gated": True}
    assert graph.nodes["layer1.0.conv1"] == facts
    (stream,) = graph.successors("conv1")
    assert graph.nodes[stream] == {"kind": "channels", "size": 64}
    assert set(graph.predecessors(stream)) == {"conv1", "layer1.0.conv2", "layer1.1.conv2"}
    assert graph.edges[stream, "layer2.0.downsample.0"]["channels"] == 64
    assert nx.has_path(graph, "x", "fc")
    assert nx.is_bipartite(graph.to_undirected())
    (private,) = graph.successors("layer1.0.conv1")
    assert list(graph.successors(private)) == ["layer1.0.conv2"]


def test_concatenations_are_read_from_several_places() -> None:
    model = torchvision.models.squeezenet1_1(weights=None)
    graph = dspfx.channel_graph(dspfx.prepare(model, torch.randn(2, 3, 64, 64)))
    sources = graph.predecessors("features.4.squeeze")
    assert sorted(next(iter(graph.predecessors(s))) for s in sources) == [
        "features.3.expand1x1",
        "features.3.expand3x3",
    ]


def test_what_was_never_prepared() -> None:
    with pytest.raises(dspfx.ConvertError, match="never prepared"):
        dspfx.channel_graph(torch.nn.Linear(2, 2))
