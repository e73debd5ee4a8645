"""Where a graph is quantised: an analysis, which changes nothing.

A convolution or linear layer computes with integers if what it reads and its weight are rounded to
8 bits. Runtimes find such layers by the pairs of QuantizeLinear and DequantizeLinear around them:

1. Before every layer, its input is rounded; so is what its input is moved from, by a slice, a
   pooling or a reshape, for all of these hold the same numbers.
2. After every convolution, and the clipping that follows it, the result is rounded for all that
   read it: a runtime that has only convolutions from integers to integers, as ONNX Runtime, needs
   that. A linear layer may write floating point.
3. If one operand of an addition is rounded, the other is, and the sum as well: residual streams
   stay integers.
4. What branches of one layer write has one scale.
5. What is padded is not rounded before that.
6. The results of the model are not rounded.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from torch.fx.node import Node

from dspfx.passes.analysis import operators
from dspfx.quantization.inline import Inlined
from dspfx.quantization.kinds import (
    ADDITIONS,
    CLIPS,
    CONCATENATIONS,
    CONVOLUTIONS,
    LAYERS,
    moves,
    pads,
    whole,
)

Edge = tuple[str, str]
"""The name of a node, and of one that reads it."""


@dataclass(frozen=True)
class Places:
    """What is rounded to 8 bits, by the names of the nodes of an inlined graph.

    Attributes:
        activations: the edges between nodes; those of one tuple have the same scale.
        weights: the edges from weights to layers.
        layers: the layers that compute with integers.
        kept: those that compute with floating point, and why.
    """

    activations: tuple[tuple[Edge, ...], ...]
    weights: tuple[Edge, ...]
    layers: tuple[str, ...]
    kept: dict[str, str]


def places(graph: Inlined, floats: Collection[Node]) -> Places:
    """Where `graph` is quantised.

    Args:
        graph: only read.
        floats: its nodes whose values are tensors of float32.
    """
    finder = _Finder(graph, frozenset(floats))
    for node in graph.root.graph.nodes:
        finder.visit(node)
    found = finder.groups.values()
    names = [tuple((value.name, user.name) for value, user in group) for group in found]
    return Places(tuple(names), tuple(finder.weights), tuple(finder.layers), finder.kept)


class _Finder:
    def __init__(self, graph: Inlined, floats: frozenset[Node]) -> None:
        self.root, self.joins, self.floats = graph.root, graph.joins, floats
        self.groups: dict[Node, dict[tuple[Node, Node], None]] = defaultdict(dict)
        self.weights: list[Edge] = []
        self.layers: dict[str, None] = {}
        self.kept: dict[str, str] = {}

    def visit(self, node: Node) -> None:
        key = self._key(node)
        if key in LAYERS:
            self._layer(node, convolution=key in CONVOLUTIONS)
        elif key in ADDITIONS and any(self._is_marked(x, node) for x in self._terms(node)):
            for x in self._terms(node):
                self._mark(x, node)
            self._written(node)
        elif (why := whole(node, self.root)) is not None:
            self.kept[node.name if node.op != "call_module" else str(node.target)] = why

    def _layer(self, node: Node, convolution: bool) -> None:
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        value = node.args[0] if node.args else node.kwargs.get("input")
        if not isinstance(weight, Node) or weight.op != "get_attr":
            self.kept[node.name] = "its weight is computed from other tensors"
            return
        name = str(weight.target).rpartition(".")[0] or str(weight.target)
        if not isinstance(value, Node) or not {value, weight, node} <= self.floats:
            self.kept[name] = "it does not compute with float32"
            return
        self.layers[name] = None
        self.weights.append((weight.name, node.name))
        self._mark(value, node)
        if convolution:
            self._written(node)

    def _written(self, node: Node) -> None:
        """Mark what `node` writes, as its readers see it."""
        last = node
        while len(last.users) == 1 and self._key(user := next(iter(last.users))) in CLIPS:
            last = user
        self._mark_readers(last)

    def _mark_readers(self, value: Node) -> None:
        for user in value.users:
            if user in self.floats and user.op != "output" and not self._pads(user):
                self._mark(value, user)
                if user.name in self.joins or self._sources(user):
                    self._mark_readers(user)

    def _mark(self, value: Node, user: Node) -> None:
        if self._is_marked(value, user):
            return
        self.groups[self._origin(value)][value, user] = None
        for source in self._sources(value):
            self._mark(source, value)

    def _is_marked(self, value: Node, user: Node) -> bool:
        return (value, user) in self.groups.get(self._origin(value), ())

    def _origin(self, value: Node) -> Node:
        """The value whose scale that of `value` is."""
        users = list(value.users)
        if len(users) == 1 and users[0].name in self.joins:
            return users[0]
        sources = self._sources(value)
        return self._origin(sources[0]) if sources else value

    def _sources(self, value: Node) -> list[Node]:
        """The values of one origin that `value` was moved from; none if it was computed."""
        if value.op in ("placeholder", "get_attr", "output") or value.name in self.joins:
            return []
        operands = [x for x in value.all_input_nodes if x in self.floats]
        if self._key(value) in CONCATENATIONS:
            origins = {self._origin(x) for x in operands}
            return operands if len(origins) == 1 else []
        return operands[:1] if moves(value, self.root) else []

    def _terms(self, node: Node) -> list[Node]:
        """The operands of an addition that are computed from the inputs."""
        return [x for x in node.all_input_nodes if x in self.floats and x.op != "get_attr"]

    def _pads(self, node: Node) -> bool:
        return self._key(node) is not None and pads(node, self.root)

    def _key(self, node: Node) -> object:
        called = node.op in ("call_function", "call_method", "call_module")
        return operators.key(node, self.root) if called else None
