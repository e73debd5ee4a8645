"""From a module to graphs.

1. The model is copied; the original is only read.
2. It is traced twice, in evaluation and in training mode, since `self.training` is a constant
   to the tracer: a functional dropout or an auxiliary head exists in one mode only. Where the
   two graphs agree there is one graph.
3. In-place operations are followed by their readers: whoever reads a value after it was
   overwritten reads the node that wrote it, so that values and nodes are the same thing.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Node, map_arg
from torch.nn.utils import parametrize

from dspfx.errors import TraceError
from dspfx.passes.operators import is_in_place


@dataclass(frozen=True)
class Traced:
    """A private copy of a model and its graphs, `train` being `eval` where they agree."""

    root: nn.Module
    eval: fx.Graph
    train: fx.Graph


class _Tracer(fx.Tracer):
    """Enters everything but torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.traced_module_names: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        self.traced_module_names.append(module_qualified_name)
        return parametrize.is_parametrized(m) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> Traced:
    """Copy `model` and trace the copy in both modes.

    Raises:
        TraceError: naming the submodule and the operation that cannot be traced.
    """
    root = _copy(model)
    modes = {module: module.training for module in root.modules()}
    graphs = {mode: _trace_graph(root.train(mode)) for mode in (False, True)}
    for module, mode in modes.items():
        module.training = mode
    if _signature(graphs[False]) == _signature(graphs[True]):
        graphs[True] = graphs[False]
    for graph in set(graphs.values()):
        follow_in_place_writes(graph, root)
        graph.lint()
    return Traced(root, graphs[False], graphs[True])


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}); dspfx works on a copy of the "
            "model, so copy.deepcopy(model) has to work"
        ) from error


def _trace_graph(root: nn.Module) -> fx.Graph:
    tracer = _Tracer()
    try:
        return tracer.trace(root)
    except Exception as error:
        graph = getattr(tracer, "graph", None)
        nodes = [n.name for n in graph.nodes] if graph is not None else []
        names = tracer.traced_module_names
        raise TraceError(
            f"{type(root).__name__} cannot be traced: {error} (in or after submodule "
            f"'{names[-1] if names else ''}', after node '{nodes[-1] if nodes else ''}'). "
            "Code whose control flow depends on the values of tensors has no graph: move it "
            "out of the model, or prepare the submodules that can be traced"
        ) from error


def _signature(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """What a graph computes, comparable between two traces of one module."""
    number = {node: i for i, node in enumerate(graph.nodes)}

    def plain(node: Node) -> tuple[Any, ...]:
        args = map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        return node.op, node.target, str(args)

    return [plain(node) for node in graph.nodes]


def follow_in_place_writes(graph: fx.Graph, root: nn.Module) -> bool:
    """Let the later readers of an overwritten value read the node that overwrote it."""
    changed = False
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not (is_in_place(node, root) and node.args and isinstance(node.args[0], Node)):
            continue
        written = node.args[0]
        for user in list(written.users):
            if position[user] > position[node]:
                user.replace_input_with(written, node)
                changed = True
    return changed


def parameter_dtype_and_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Those of the first floating-point parameter or buffer; torch's default without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return torch.get_default_dtype(), torch.device("cpu")
