"""Fixed costs: what a graph costs besides the layers and norms whose channels are counted.

1. Multiply-accumulates of every other node, as they were counted while it ran: recurrent layers,
   attention, convolutions whose weights are computed, everything inside an opaque module.
2. Parameters of every other node, and of modules that are never called. Each counts once, for the
   first module that has it; a module that shares it is tied to that one.
"""

from collections.abc import Iterator, Mapping

from torch import nn
from torch.fx.node import Node

from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Fixed, Tie
from dspfx.passes.analysis.cost import layer_costs


def fixed(
    root: nn.Module, whole: nn.Module, analysis: ChannelAnalysis, counted: Mapping[Node, int]
) -> Fixed:
    """The fixed costs of `analysis`.

    Args:
        root: of the graph.
        whole: has all parameters, including those of modules that the graph does not name.
        analysis: without what is fixed.
        counted: the multiply-accumulates for one sample of every node that did some.
    """
    dense = layer_costs(analysis)
    parameters: dict[Node, int] = {}
    owners: dict[int, tuple[Node, str]] = {}
    ties = []
    for node, own in _held(root, counted):
        new = 0
        for name, parameter in own.items():
            if id(parameter) in owners:
                ties.append(Tie(node, name, *owners[id(parameter)], parameter.numel()))
            else:
                owners[id(parameter)] = node, name
                new += parameter.numel()
        parameters[node] = new - (dense[node].parameters if node in dense else 0)
    for node, cost in dense.items():  # functions, whose parameters were counted where they are read
        if node not in parameters and node.op == "call_function":
            parameters[node] = -cost.parameters
    unused = sum(p.numel() for p in whole.parameters() if id(p) not in owners)
    macs = {node: count for node, count in counted.items() if count and node not in dense}
    return Fixed(macs, {n: count for n, count in parameters.items() if count}, unused, tuple(ties))


def _held(
    root: nn.Module, nodes: Mapping[Node, int]
) -> Iterator[tuple[Node, dict[str, nn.Parameter]]]:
    """The parameters of every module that is called, at its first call, and those used directly."""
    called = [node for node in nodes if node.op == "call_module"]
    read = [node for node in nodes if node.op == "get_attr"]
    for target, node in _first(called).items():
        module = root.get_submodule(target)
        own = {f"{target}.{name}": p for name, p in module.named_parameters()}
        yield node, own
    for target, node in _first(read).items():
        *path, leaf = target.split(".")
        parameter = getattr(root.get_submodule(".".join(path)), leaf, None)
        if isinstance(parameter, nn.Parameter):
            yield node, {target: parameter}


def _first(nodes: list[Node]) -> dict[str, Node]:
    """The first of `nodes` by what they name, in order."""
    found: dict[str, Node] = {}
    for node in nodes:
        found.setdefault(str(node.target), node)
    return found
