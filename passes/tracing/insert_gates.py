"""The gating pass: from a traced model to a gated one.

1. A convolution or linear layer becomes a `GatedLayer`, sharing its parameters. Left alone: frozen
   layers, layers that read the model's inputs, convolutions whose groups have one channel each,
   and the linear layers that come last, whose outputs are the model's.
2. A `ChannelGate` follows every norm whose channels lie along one dimension, every depthwise layer
   with a bias, and what adds a parameter to a value, in every graph.
"""

from collections import defaultdict
from dataclasses import dataclass
from math import prod

import torch
from torch import fx, nn
from torch.fx.node import Node

from dspfx.layers.gated import GATED
from dspfx.layers.gates import ChannelGate, FilterGate
from dspfx.layers.parametrised import kind_of
from dspfx.passes.analysis import operators
from dspfx.passes.analysis.channel_ops import (
    ChannelAnalysis,
    Channelwise,
    Elementwise,
    Mix,
    Source,
)

CONTAINER = "channel_gates"


@dataclass(frozen=True)
class GatePlan:
    """The gates to insert, and where.

    Attributes:
        layers: the convolutions to gate, with the elements of their input for one sample.
        norms: the norms, and what else has a bias, to follow by a gate: (name of a module or
            parameter, number of the call), channels, dim.
        calls: by such a name, what each of the calls reads.
        left_alone: the layers that are not gated, and why.
    """

    layers: dict[str, int]
    norms: dict[tuple[str, int], tuple[int, int]]
    calls: dict[str, list[str]]
    left_alone: dict[str, str]


def plan_gates(
    root: fx.GraphModule,
    analysis: ChannelAnalysis,
    kinds: tuple[type[nn.Module], ...],
    frozen: frozenset[str],
    gate_first: bool,
    followed: frozenset[str] = frozenset(),
) -> GatePlan:
    """Choose the layers and norms of `root` to gate; changes nothing.

    Args:
        root: the traced model.
        analysis: of its graph.
        kinds: the types of layers to gate, all of `GATED` or some.
        frozen: the layers that keep all their filters and inputs.
        gate_first: whether layers that read the inputs directly are gated too.
        followed: linear layers that others follow outside of the graph.
    """
    left_alone: dict[str, str] = {}
    layers: dict[str, int] = {}
    norms: dict[tuple[str, int], tuple[int, int]] = {}
    calls: dict[str, list[str]] = defaultdict(list)
    last = _last_linear_layers(root, analysis) - followed
    for node, op in analysis.ops.items():
        name = _called(node)
        if name is None:
            continue
        if isinstance(op, Mix):
            why_not = _why_not(root, analysis, op, kinds, gate_first)
            if op.layer in frozen:
                why_not = "it is to be ignored"
            elif op.layer in last:
                why_not = "it is the last linear layer"
            if why_not:
                left_alone.setdefault(op.layer, why_not)
            else:
                layers.setdefault(name, prod(analysis.values[op.operands[0]].shape[1:]))
        if isinstance(op, Channelwise | Elementwise) and op.shifts:
            value = analysis.values[node]
            assert value.dim is not None
            norms[name, len(calls[name])] = value.channels, value.dim
        calls[name].append(_what_it_reads(node))  # of every kind: calls are numbered
    layers = {name: elements for name, elements in layers.items() if name not in left_alone}
    return GatePlan(layers, norms, dict(calls), left_alone)


def _why_not(
    root: fx.GraphModule,
    analysis: ChannelAnalysis,
    op: Mix,
    kinds: tuple[type[nn.Module], ...],
    gate_first: bool,
) -> str:
    """Why one call of a layer forbids a gate; empty if it does not."""
    module = root.get_submodule(op.layer)
    if not isinstance(module, kinds):
        return f"gates for {type(module).__name__} were not asked for"
    if op.channels == op.structural_groups > 1:
        return "its filters read one channel each"
    if isinstance(analysis.ops[op.operands[0]], Source) and not gate_first:
        return "it reads the model's inputs"
    if module._forward_pre_hooks:
        return "a hook computes its inputs or weights"
    if "forward" in vars(module):
        return "it has a 'forward' of its own"
    if hasattr(module, "gate"):
        return "it has a 'gate' of its own"
    return ""


def _last_linear_layers(root: fx.GraphModule, analysis: ChannelAnalysis) -> frozenset[str]:
    """The linear layers with no layer after any of their calls."""
    leads_to_layer: set[Node] = set()
    followed: dict[str, bool] = {}
    for node in reversed(root.graph.nodes):
        op = analysis.ops.get(node)
        if isinstance(op, Mix) and isinstance(root.get_submodule(op.layer), nn.Linear):
            followed[op.layer] = followed.get(op.layer, False) or node in leads_to_layer
        if isinstance(op, Mix) or node in leads_to_layer:
            leads_to_layer.update(node.all_input_nodes)
    return frozenset(name for name, layers in followed.items() if not layers)


def insert_gates(root: nn.Module, graphs: set[fx.Graph], plan: GatePlan, groups: int) -> None:
    """Gate the layers of `root` and the norms in `graphs`, in place."""
    replaced: dict[int, nn.Module] = {}
    for name, elements in plan.layers.items():
        layer = root.get_submodule(name)
        gate = FilterGate(groups, layer, elements)
        replaced[id(layer)] = GATED[kind_of(layer)].wrap(layer, gate)
    for module in list(root.modules()):
        for name, child in list(module._modules.items()):  # by every name it goes by
            if id(child) in replaced:
                module._modules[name] = replaced[id(child)]
    if not plan.norms:
        return
    container, names = nn.Module(), _gate_names(plan)
    for site, (channels, dim) in plan.norms.items():
        container.add_module(names[site], _norm_gate(root, site[0], channels, dim))
    free = CONTAINER
    while hasattr(root, free):
        free += "_"
    root.add_module(free, container)
    for graph in graphs:
        _follow_norms(graph, plan, {site: f"{free}.{name}" for site, name in names.items()})
        graph.lint()


def _norm_gate(root: nn.Module, name: str, channels: int, dim: int) -> ChannelGate:
    norm = dict(root.named_modules()).get(name, root)
    tensor = next((t for t in (*norm.parameters(), *norm.buffers())), torch.empty(0))
    return ChannelGate(channels, dim, tensor.device).train(norm.training)


def _called(node: Node) -> str | None:
    """What identifies a module, or a function that reads a parameter; None of other nodes."""
    if node.op == "call_module":
        return str(node.target)
    if node.op not in ("call_function", "call_method") or operators.overwrites(
        node.op, node.target
    ):
        return None
    read = [found for n in node.all_input_nodes if (found := _parameter(n)) is not None]
    if not read and node.target not in operators.LAYER_NORMS:
        return None
    name = node.target if isinstance(node.target, str) else node.target.__name__
    return ".".join([*read[:1], name])


def _parameter(node: Node) -> str | None:
    """The parameter or buffer that a value comes from, by its first operands."""
    while node.op in ("call_function", "call_method") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target) if node.op == "get_attr" else None


def _gate_names(plan: GatePlan) -> dict[tuple[str, int], str]:
    """A unique name for the gate after every call: `a.b` and `a_b` are two norms."""
    names: dict[tuple[str, int], str] = {}
    taken: set[str] = set()
    for name, call in plan.norms:
        own = name.replace(".", "_") + (f"_call_{call}" if call else "")
        while own in taken:
            own += "_"
        names[name, call] = own
        taken.add(own)
    return names


def _what_it_reads(node: Node) -> str:
    """Equal for calls, in two graphs, that read what the same module or function gives."""
    read = node.all_input_nodes[0]
    return f"{read.op} {read.target}"


def _follow_norms(graph: fx.Graph, plan: GatePlan, gates: dict[tuple[str, int], str]) -> None:
    """Insert the gates, given by the call of the norm that they follow, into `graph`.

    In training a norm may be called more often, or in another order: a call gets the gate of the
    call that reads the same, of the last one if there are several.
    """
    calls: dict[str, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if (name := _called(node)) is not None:
            calls[name].append(node)
    gate_after: dict[Node, str] = {}
    for name in dict.fromkeys(name for name, _ in gates):
        here, there = [_what_it_reads(node) for node in calls[name]], plan.calls[name]
        for number, node in enumerate(calls[name]):
            same = [call for call, reads in enumerate(there) if reads == here[number]]
            call = number
            if same:
                call = same[min(here[:number].count(here[number]), len(same) - 1)]
            elif number < len(there) and there[number] in here:
                continue  # that one is another call
            if (name, call) in gates:
                gate_after[node] = gates[name, call]
    for node in list(graph.nodes):  # in the order of the graph, which names of nodes depend on
        if node in gate_after:
            _follow(graph, node, gate_after[node])


def _follow(graph: fx.Graph, node: Node, gate: str) -> None:
    with graph.inserting_after(node):
        gated = graph.call_module(gate)
    node.replace_all_uses_with(gated)
    gated.args = (node,)
