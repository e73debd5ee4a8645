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
4. The operands of a concatenation are rounded with one scale, if convolutions write all of them;
   if not, none is. OpenVINO computes something else, or does not load others.
5. What is padded is not rounded before that.
6. The results of the model are not rounded.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from torch import fx
from torch.fx.node import Node

from dspfx.passes.analysis import operators
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


def places(root: fx.GraphModule, floats: Collection[Node]) -> Places:
    """Where `root` is quantised.

    Args:
        root: an inlined graph, only read.
        floats: its nodes whose values are tensors of float32.
    """
    finder = _Finder(root, frozenset(floats))
    for node in root.graph.nodes:
        finder.visit(node)
    return Places(finder.groups(), tuple(finder.weights), tuple(finder.layers), finder.kept)


class _Finder:
    def __init__(self, root: fx.GraphModule, floats: frozenset[Node]) -> None:
        self.root, self.floats = root, floats
        self.marked: dict[tuple[Node, Node], None] = {}
        self.weights: list[Edge] = []
        self.layers: dict[str, None] = {}
        self.kept: dict[str, str] = {}
        self.written: set[Node] = set()
        for node in root.graph.nodes:
            if self._is_written(node):
                self.written.add(node)

    def _is_written(self, node: Node) -> bool:
        """Whether convolutions write `node`, through what keeps numbers of 8 bits such."""
        key, terms = self._key(node), [x in self.written for x in self._terms(node)]
        if key in CONCATENATIONS:
            return all(terms)
        if key in ADDITIONS or key in CLIPS or self._source(node) is not None:
            return any(terms)
        return key in CONVOLUTIONS

    def groups(self) -> tuple[tuple[Edge, ...], ...]:
        """The edges that are marked, those of one scale together."""
        from networkx.utils import UnionFind  # noqa: PLC0415 (slow to import)

        alike = UnionFind(value for value, _ in self.marked)
        read = {value for value, _ in self.marked}
        for value, user in self.marked:
            if user in read and (self._source(user) or self._is_joined(user)):
                alike.union(value, user)
            if self._is_joined(user):
                alike.union(*self._terms(user))
        found: dict[Node, list[Edge]] = defaultdict(list)
        for value, user in self.marked:
            found[alike[value]].append((value.name, user.name))
        return tuple(map(tuple, found.values()))

    def visit(self, node: Node) -> None:
        key = self._key(node)
        if key in LAYERS:
            self._layer(node, convolution=key in CONVOLUTIONS)
        elif key in ADDITIONS and any((x, node) in self.marked for x in self._terms(node)):
            for x in self._terms(node):
                if x.op != "get_attr":
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
            if user in self.floats and user.op != "output" and not self._stays_float(user):
                self._mark(value, user)
                if self._is_joined(user) or self._source(user):
                    self._mark_readers(user)

    def _stays_float(self, user: Node) -> bool:
        """Whether `user` pads, or moves to a concatenation with what is never rounded."""
        if self._key(user) in CONCATENATIONS:
            return user not in self.written
        moved = self._source(user) is not None
        return pads(user, self.root) or (moved and any(map(self._stays_float, user.users)))

    def _mark(self, value: Node, user: Node) -> None:
        if (value, user) in self.marked:
            return
        self.marked[value, user] = None
        if source := self._source(value):
            self._mark(source, value)
        if self._is_joined(user):
            for other in self._terms(user):
                self._mark(other, user)

    def _source(self, value: Node) -> Node | None:
        """The value that `value` was moved from; None if it was computed."""
        if self._key(value) is None or not moves(value, self.root):
            return None
        return next(iter(self._terms(value)), None)

    def _terms(self, node: Node) -> list[Node]:
        """The operands that are tensors of float32."""
        return [x for x in node.all_input_nodes if x in self.floats]

    def _is_joined(self, node: Node) -> bool:
        return node in self.written and self._key(node) in CONCATENATIONS

    def _key(self, node: Node) -> object:
        called = node.op in ("call_function", "call_method", "call_module")
        return operators.key(node, self.root) if called else None
