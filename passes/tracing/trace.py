"""Tracing: from a module to its `fx` graphs for evaluation and training.

1. The model is copied by `copy_model`; the original is only read.
2. The copy is traced with example inputs at hand, so that its code may count, compare and iterate
   over shapes (`tracer`). A submodule that cannot be traced becomes an opaque leaf, and so
   does one that hooks were registered on: they are never called with proxies.
3. It is traced twice, in evaluation and in training mode, since `self.training` is a constant
   to the tracer: a functional dropout or an auxiliary head exists in one mode only. Where the
   two graphs agree, or code never asks for the mode, there is one graph.
4. In-place operations are functionalised: reads of a value after it was overwritten become reads
   of the node that wrote it, so that every node is one value. Where an unknown function overwrote
   an argument, they read `as_left_by(x, call)`.
   An input that is overwritten is a copy of it, until the graph ends with `x.copy_(...)`.
5. Functional calls on a module's own parameters become calls of the module (`lift`).
6. Types and devices of parameters are asked in every call (`types_followed`).
7. Tensors that the code holds as plain attributes become buffers, outside the `state_dict`.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node, map_arg

from dspfx.errors import TraceError
from dspfx.layers.parametrised import why_computed
from dspfx.layers.statements import as_left_by
from dspfx.passes.analysis.operators import overwritten
from dspfx.passes.sandbox.state import state_kept
from dspfx.passes.tracing.aliases import WRITTEN, WRITTEN_INPUT
from dspfx.passes.tracing.int_calls import only_calls_int
from dspfx.passes.tracing.lift import lift
from dspfx.passes.tracing.refusals import UntraceableError
from dspfx.passes.tracing.tracer import LINE, ConcreteTracer
from dspfx.passes.tracing.types_followed import FollowedTypes

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


def copy_model(model: nn.Module, shared: dict[int, Any] | None = None) -> nn.Module:
    """A private copy of `model`, except for what is `shared` by its `id`.

    Raises:
        TraceError: it cannot be copied.
    """
    try:
        return copy.deepcopy(model, shared)
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
    *,
    follow_types: bool = True,
) -> Traced:
    """Trace `root`, a private copy of the user's model, in both modes; its state is kept.

    Args:
        root: gains buffers for the tensors that its code holds as plain attributes, and for the
            types that it reads of its parameters.
        inputs: example inputs by the name of the argument.
        opaque: names of the submodules that are not to be entered.
        leaves: types of the submodules that are not to be entered.
        follow_types: whether types and devices of parameters are asked in every call; else they are
            constants.

    Raises:
        TraceError: the code of the root itself cannot be traced; the message names the place.
    """
    types = FollowedTypes(root, follow_types)
    hooked = _hooked(root, ConcreteTracer(inputs, types, opaque, leaves))
    failed = dict(hooked)

    def trace_in(mode: bool) -> tuple[fx.Graph, bool]:
        root.train(mode)
        return _trace_graph(root, inputs, opaque, failed, leaves, types)

    with state_kept(root, but=_CONSTANT):
        graph, reads_mode = trace_in(False)
        graphs = {False: graph, True: graph}
        known = set(failed)
        if reads_mode or not all(map(_only_sets_mode, root.modules())):
            graphs[True], _ = trace_in(True)
        while failed.keys() != known:  # a leaf is one in both modes
            known = set(failed)
            graphs = {mode: trace_in(mode)[0] for mode in (False, True)}
    if _signature(graphs[False]) == _signature(graphs[True]):
        graphs[True] = graphs[False]
    renamed: dict[str, str] = {}
    for graph in set(graphs.values()):
        _register_constants(graph, root, renamed)
    lift(graphs, root)
    for graph in set(graphs.values()):
        _write_inputs(graph, _follow_writes(graph, root))
        graph.lint()
    types.remove_unread(graphs.values())
    called = {n.target for g in graphs.values() for n in g.find_nodes(op="call_module")}
    failed = {name: why for name, why in failed.items() if name in called or name not in hooked}
    lines = {n.name: n.meta[LINE] for g in graphs.values() for n in g.nodes if LINE in n.meta}
    return Traced(graphs[False], graphs[True], failed, lines)


def _only_sets_mode(module: nn.Module) -> bool:
    """Whether setting the mode of `module` sets nothing else, and it is seen who reads it."""
    own = type(module).train is not nn.Module.train or "train" in vars(module)
    return not own and not isinstance(module, torch.jit.ScriptModule)


def _hooked(root: nn.Module, tracer: ConcreteTracer) -> dict[str, str]:
    """The modules with hooks that `tracer` would enter; hooks must see values, not proxies."""
    why = "a hook was registered on it, which is called with values as before"
    return {
        name: why
        for name, module in root.named_modules()
        if name and (module._forward_hooks or module._forward_pre_hooks)
        if not tracer.is_leaf_module(module, name)
    }


def _trace_graph(
    root: nn.Module,
    inputs: Mapping[str, Any],
    opaque: frozenset[str],
    failed: dict[str, str],
    leaves: frozenset[type],
    types: FollowedTypes,
) -> tuple[fx.Graph, bool]:
    """Trace until it succeeds, every submodule that refuses becoming one that `failed`.

    Tracing is repeated where code called `int` of what can stay a value of the graph.

    Returns:
        The graph, and whether code asked for the mode.
    """
    ints: set[CodeType] = set()
    while True:
        tracer = ConcreteTracer(inputs, types, opaque | failed.keys(), leaves, ints)
        try:
            graph = tracer.trace_concretely(root)
            found = {code for code in tracer.calls_int - ints if only_calls_int(code)}
            if not found:
                return graph, tracer.mode_read.is_set()
            ints |= found
        except UntraceableError as error:
            if not error.module or error.module in failed:
                raise TraceError(
                    f"{type(root).__name__} cannot be traced: {error.reason} (after node "
                    f"'{error.node}'). Such code has no graph: move it out of the model, or "
                    "prepare the submodules that can be traced"
                ) from error
            failed[error.module] = error.reason


def _register_constants(graph: fx.Graph, root: nn.Module, renamed: dict[str, str]) -> None:
    """Make plain attributes buffers, under another name where the class has this one, too."""
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        target = str(node.target)
        path, _, leaf = target.rpartition(".")
        owner = root.get_submodule(path)
        value = vars(owner).get(leaf)
        if isinstance(value, Tensor):
            delattr(owner, leaf)
            free = leaf
            while hasattr(owner, free):
                free += "_"
            owner.register_buffer(free, value, persistent=False)
            renamed[target] = f"{path}.{free}".lstrip(".")
        node.target = renamed.get(target, target)


def _signature(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """What a graph computes, comparable between two traces of one module."""
    number = {node: i for i, node in enumerate(graph.nodes)}

    def plain(node: Node) -> tuple[Any, ...]:
        args = map_arg((node.args, node.kwargs), lambda n: f"%{number[n]}")
        return node.op, node.target, str(args)

    return [plain(node) for node in graph.nodes]


def _follow_writes(graph: fx.Graph, root: nn.Module) -> dict[Node, Node]:
    """Make reads of a value after it was overwritten read the node that overwrote it.

    Returns:
        What each value that was overwritten has become in the end.
    """
    became: dict[Node, Node] = {}
    for node in list(graph.nodes):
        for read in node.all_input_nodes:
            if read in became:
                node.replace_input_with(read, _last(read, became))
        in_place = overwritten(node, root)
        if in_place is not None:
            became[in_place] = node
        for value in node.meta.pop(WRITTEN, ()):
            now = _last(value, became)
            if now is not node and now in node.all_input_nodes:
                with graph.inserting_after(node):
                    became[now] = graph.call_function(as_left_by, (now, node))
                became[now].meta["is_wrapped"] = True  # or pickle would leave the call out
    return {value: _last(value, became) for value in became}


def _last(value: Node, became: Mapping[Node, Node]) -> Node:
    while value in became:
        value = became[value]
    return value


def _write_inputs(graph: fx.Graph, became: Mapping[Node, Node]) -> None:
    """Overwrite a copy of an input; the caller's input itself is written at the end."""
    inputs = graph.find_nodes(op="placeholder")
    for given in [n for n in graph.nodes if n.meta.pop(WRITTEN_INPUT, False)]:
        with graph.inserting_after(inputs[-1] if given.op == "placeholder" else given):
            copied = graph.call_method("clone", (given,))
        given.replace_all_uses_with(copied, lambda user, copied=copied: user is not copied)
        with graph.inserting_before(graph.output_node()):
            graph.call_method("copy_", (given, became[given]))
