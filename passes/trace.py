"""From a module to graphs.

1. The model is copied by `copy_model`; the original is only read.
2. The copy is traced with example inputs at hand, so that its code may count, compare and iterate
   over shapes (`concrete_tracer`). A submodule that cannot be traced becomes an opaque leaf.
3. It is traced twice, in evaluation and in training mode, since `self.training` is a constant
   to the tracer: a functional dropout or an auxiliary head exists in one mode only. Where the
   two graphs agree there is one graph.
4. In-place operations are followed by their readers: whoever reads a value after it was
   overwritten reads the node that wrote it, so that values and nodes are the same thing. Where an
   unknown function overwrote an argument, they read that argument and the call: `(x, call)[0]`.
5. Functional calls on a module's own parameters become calls of the module (`lift`).
6. Tensors that the code holds as plain attributes become buffers, outside the `state_dict`.
"""

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import Node, map_arg

from dspfx.errors import TraceError
from dspfx.kept import state_kept
from dspfx.parametrised import why_computed
from dspfx.passes.aliases import WRITTEN
from dspfx.passes.concrete_tracer import LINE, ConcreteTracer, UntraceableError
from dspfx.passes.lift import lift
from dspfx.passes.operators import is_in_place

_CONSTANT = "_tensor_constant"  # how fx names the tensors that it makes attributes of


@dataclass(frozen=True)
class Traced:
    """The graphs of a model, `train` being `eval` where they agree.

    Attributes:
        eval, train: the graphs.
        opaque: the submodules that could not be entered, and why.
        lines: where the nodes of both graphs come from: name -> "file.py:12: code".
    """

    eval: fx.Graph
    train: fx.Graph
    opaque: dict[str, str]
    lines: dict[str, str]


def copy_model(model: nn.Module) -> nn.Module:
    """A private copy of `model`.

    Raises:
        TraceError: it cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        computed = ((name, why_computed(module)) for name, module in model.named_modules())
        of_hook = next((f": of '{name}', {why}" for name, why in computed if why), "")
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}); dspfx works on a copy of the "
            f"model, so copy.deepcopy(model) has to work{of_hook}"
        ) from error


def trace(
    root: nn.Module,
    inputs: Mapping[str, Any],
    opaque: frozenset[str] = frozenset(),
    leaves: frozenset[type] = frozenset(),
) -> Traced:
    """Trace `root`, a private copy of the user's model, in both modes; its state is kept.

    Args:
        root: gains buffers for the tensors that its code holds as plain attributes.
        inputs: example inputs by the name of the argument.
        opaque: names of the submodules that are not to be entered.
        leaves: types of the submodules that are not to be entered.

    Raises:
        TraceError: the code of the root itself cannot be traced; the message names the place.
    """
    failed: dict[str, str] = {}

    def trace_in(mode: bool) -> fx.Graph:
        root.train(mode)
        return _trace_graph(root, inputs, opaque, failed, leaves)

    with state_kept(root, but=_CONSTANT):
        graphs = {False: trace_in(False)}
        known = set(failed)
        graphs[True] = trace_in(True)
        while failed.keys() != known:  # a leaf is one in both modes
            known = set(failed)
            graphs = {mode: trace_in(mode) for mode in (False, True)}
    if _signature(graphs[False]) == _signature(graphs[True]):
        graphs[True] = graphs[False]
    for graph in set(graphs.values()):
        _register_constants(graph, root)
    lift(graphs, root)
    for graph in set(graphs.values()):
        follow_in_place_writes(graph, root)
        _follow_hidden_writes(graph, root)
        graph.lint()
    lines = {n.name: n.meta[LINE] for g in graphs.values() for n in g.nodes if LINE in n.meta}
    return Traced(graphs[False], graphs[True], failed, lines)


def _trace_graph(
    root: nn.Module,
    inputs: Mapping[str, Any],
    opaque: frozenset[str],
    failed: dict[str, str],
    leaves: frozenset[type],
) -> fx.Graph:
    """Trace until it succeeds, every submodule that refuses becoming one that `failed`."""
    while True:
        tracer = ConcreteTracer(inputs, opaque | failed.keys(), leaves)
        try:
            return tracer.trace_concretely(root)
        except UntraceableError as error:
            if not error.module or error.module in failed:
                raise TraceError(
                    f"{type(root).__name__} cannot be traced: {error.reason} (after node "
                    f"'{error.node}'). Such code has no graph: move it out of the model, or "
                    "prepare the submodules that can be traced"
                ) from error
            failed[error.module] = error.reason


def _register_constants(graph: fx.Graph, root: nn.Module) -> None:
    for node in graph.nodes:
        if node.op == "get_attr":
            *path, leaf = str(node.target).split(".")
            owner = root.get_submodule(".".join(path))
            value = getattr(owner, leaf)
            if isinstance(value, Tensor) and leaf in vars(owner):
                delattr(owner, leaf)
                owner.register_buffer(leaf, value, persistent=False)


def _signature(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """What a graph computes, comparable between two traces of one module."""
    number = {node: i for i, node in enumerate(graph.nodes)}

    def plain(node: Node) -> tuple[Any, ...]:
        args = map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        return node.op, node.target, str(args)

    return [plain(node) for node in graph.nodes]


def _follow_hidden_writes(graph: fx.Graph, root: nn.Module) -> None:
    """Let the later readers of an argument that a call overwrote depend on that call."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if is_in_place(node, root):
            continue
        for argument in node.meta.get(WRITTEN, ()):
            written = node.args[argument]
            later = [u for u in written.users if position.get(u, -1) > position[node]]
            if later:
                with graph.inserting_after(node):
                    after = graph.call_function(operator.getitem, ((written, node), 0))
                for user in later:
                    user.replace_input_with(written, after)


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
