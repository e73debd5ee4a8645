"""Inlining: layers become calls of functions, whose weights are nodes of the graph.

Quantisation is written between two nodes, so that a weight has to be one.

1. Convolutions and linear layers, those in `Branches` as well, become what fx traces of them.
   Whatever is transposed, and all other modules, are called as before.
2. An activation that alone reads the branches of a layer is put into every branch: what a branch
   writes is then what is rounded, and no range is spent on what the activation removes.
3. A batch norm that alone reads a convolution is folded into it; `convert` leaves it after one
   whose filters read one channel each.
4. Channels of zeros are concatenated, not padded: OpenVINO pads integers with 0 whatever stands for
   zero, or does not load the model.
5. A parameter or buffer is one node, however often it is read.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import Node

from dspfx.layers.branches import Branches
from dspfx.layers.weights import folded_batch_norm
from dspfx.model.analysed import fitting_inputs
from dspfx.model.module import CompactModule
from dspfx.passes.analysis import operators
from dspfx.passes.lowering.emit import like
from dspfx.passes.sandbox.calls import fresh
from dspfx.quantization.kinds import CLIPS

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (*_CONVOLUTIONS, nn.Linear)


def inlined(compact: CompactModule) -> fx.GraphModule:
    """A private copy of `compact`, with its layers inlined."""
    root = fx.GraphModule(copy.deepcopy(compact), copy.deepcopy(compact.graphs[False]))
    _fold_norms(root)
    _concatenate_zeros(root.graph, _ranks(compact))
    joins = []
    for node in root.graph.find_nodes(op="call_module"):
        layer = root.get_submodule(str(node.target))
        if _is_layer(layer):
            joins += _inline(root.graph, node, layer)
    for join in joins:
        _clip_branches(root, join)
    _read_once(root.graph)
    operators.remove_dead_code(root.graph)
    root.graph.lint()
    root.delete_all_unused_submodules()
    root.recompile()
    return root.eval()


def _is_layer(module: nn.Module) -> bool:
    if type(module) is Branches:
        return all(type(layer) in _LAYERS for layer in module.children())
    return type(module) in _LAYERS


def _fold_norms(root: fx.GraphModule) -> None:
    calls = root.graph.find_nodes(op="call_module")
    called = {node: root.get_submodule(str(node.target)) for node in calls}
    times = Counter(called.values())
    for node, norm in called.items():
        conv: Any = node.args[0] if node.args else node.kwargs["input"]
        if operators.named(type(norm)) not in operators.BATCH_NORMS or len(conv.users) != 1:
            continue
        layer: Any = called.get(conv)
        if type(layer) not in _CONVOLUTIONS or times[layer] + times[norm] > 2:
            continue
        if norm.running_mean is None:
            continue
        scale, bias = folded_batch_norm(norm, layer.bias)
        weight = layer.weight * scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
        root.set_submodule(str(conv.target), like(layer, weight, bias, layer.groups))
        node.replace_all_uses_with(conv)
        root.graph.erase_node(node)


def _ranks(compact: CompactModule) -> dict[str, int]:
    """How many dimensions the tensors have, by the names of the nodes that compute them."""
    recorder = _Recorder(compact)
    with torch.no_grad(), compact.evaluation_view():
        recorder.run(*fresh(fitting_inputs(compact)))
    return recorder.ranks


class _Recorder(fx.Interpreter):
    def __init__(self, root: fx.GraphModule) -> None:
        super().__init__(root)
        self.ranks: dict[str, int] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.ranks[n.name] = result.dim()
        return result


def _concatenate_zeros(graph: fx.Graph, ranks: Mapping[str, int]) -> None:
    for node in graph.find_nodes(op="call_function", target=F.pad):
        x, sizes, *others = node.args
        before, after = sizes[-2:]
        if any(sizes[:-2]) or min(before, after) < 0 or others or node.kwargs:
            continue
        rank = ranks[node.name]
        dim = rank - len(sizes) // 2
        with graph.inserting_before(node):
            zero = graph.call_function(torch.narrow, (x, dim, 0, 1))
            zero = graph.call_function(torch.zeros_like, (zero,))
            wide = [_at(dim, rank, count) for count in (before, after)]
            first, last = (graph.call_method("expand", (zero, *size)) for size in wide)
            pieces = [first] * (before > 0) + [x] + [last] * (after > 0)
            joined = graph.call_function(torch.cat, (pieces, dim))
        node.replace_all_uses_with(joined)
        graph.erase_node(node)


def _at(dim: int, rank: int, count: int) -> list[int]:
    """Sizes to expand to: `count` along `dim`, as they are along others."""
    return [count if d == dim else -1 for d in range(rank)]


class _OneInput(nn.Module):
    """Calls a layer with its input alone, and none of its options."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: fx.Proxy) -> fx.Proxy:
        """What the layer makes of `x`."""
        result: fx.Proxy = self.layer(x)
        return result


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


def _inline(graph: fx.Graph, node: Node, layer: nn.Module) -> list[Node]:
    """Replace the call `node` of `layer` by what that computes; the concatenations in it."""
    x: Any = node.args[0] if node.args else node.kwargs["input"]
    traced = _Tracer().trace(_OneInput(layer))
    (placeholder,) = traced.find_nodes(op="placeholder")
    for inner in traced.find_nodes(op="get_attr"):
        inner.target = str(node.target) + str(inner.target).removeprefix("layer")
    copies: dict[Node, Node] = {placeholder: x}
    with graph.inserting_before(node):
        result = graph.graph_copy(traced, copies)
    assert isinstance(result, Node)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return [copies[join] for join in traced.find_nodes(op="call_function", target=torch.cat)]


def _clip_branches(root: fx.GraphModule, join: Node) -> None:
    """Put the activation that alone reads the concatenation `join` before it."""
    last = join
    while len(last.users) == 1:
        (user,) = last.users
        if operators.key(user, root) in CLIPS:
            break
        if user.target is not torch.index_select:
            return
        last = user
    else:
        return
    branches: Any = join.args[0]
    for branch in branches:
        with root.graph.inserting_before(join):
            clipped = root.graph.node_copy(user, partial(_given, branch))
        join.replace_input_with(branch, clipped)
    user.replace_all_uses_with(last)
    root.graph.erase_node(user)


def _given(node: Node, _: Node) -> Node:
    return node


def _read_once(graph: fx.Graph) -> None:
    first: dict[str, Node] = {}
    for node in graph.find_nodes(op="get_attr"):
        own = first.setdefault(str(node.target), node)
        if own is not node:
            node.replace_all_uses_with(own)
            graph.erase_node(node)
