"""A compact graph, as `compact` emits it."""

from dataclasses import dataclass, field

from torch import fx, nn
from torch.fx.node import Node


@dataclass(frozen=True)
class Compacted:
    """A compact graph over its own modules.

    Attributes:
        root: holds the modules and buffers that the graph names.
        graph: the graph.
        nodes: for every original node, the compact node that stands for it.
        computed: the buffers that hold no elements of the source's tensors, and the nodes that
            compute what they hold.
    """

    root: nn.Module
    graph: fx.Graph
    nodes: dict[Node, Node] = field(repr=False)
    computed: dict[str, Node] = field(repr=False)
