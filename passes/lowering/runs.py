"""Run formation: native convolutions that follow each other, and pools after them, become one call.

    GroupConv2d -> GroupConv2d -> MaxPool2d    becomes    GroupConvRun

1. Plan: a run takes in every convolution that can be computed with it, that is, none of whose
   inputs depends on a result of the run through an operator outside of it.
2. Edit: each run becomes one call, and operators between its convolutions that read its results are
   moved after it.
"""

import operator
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Node

from dspfx.layers.group_conv import GroupConv2d
from dspfx.layers.group_conv_run import GroupConvRun, pool_numbers
from dspfx.passes.analysis import operators


def join_runs(module: fx.GraphModule) -> bool:
    """Join native convolutions in `module`, which is changed; whether there were any to join."""
    joined = False
    for number, run in enumerate(_runs(module)):
        if run:
            _join(module, run, f"run_{number}")
            joined = True
    if joined:
        module.delete_all_unused_submodules()
        module.graph.lint()
        module.recompile()
    return joined


def layer_of(module: fx.GraphModule, node: Node) -> nn.Module | None:
    """The convolution or pool that the kernel can compute for `node`; None if it cannot."""
    if node.kwargs:
        return None
    if node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
        called: nn.Module = nn.AdaptiveAvgPool2d(node.args[1])  # type: ignore[arg-type]
    elif (own := operators.called_module(module, node)) is not None:
        called = own
    else:
        return None
    known = isinstance(called, GroupConv2d) or pool_numbers(called, 0) is not None
    return called if known else None


def _runs(module: fx.GraphModule) -> list[list[Node]]:
    runs: list[list[Node]] = [[]]
    dependent: set[Node] = set()  # nodes outside the run that depend on it
    for node in module.graph.nodes:
        inputs, layer = node.all_input_nodes, layer_of(module, node)
        reads_run = not set(runs[-1]).isdisjoint(inputs)
        if not isinstance(layer, GroupConv2d) and not reads_run:
            layer = None  # perhaps of another type, or on another device
        if layer is None:
            if reads_run or not dependent.isdisjoint(inputs):
                dependent.add(node)
        elif dependent.isdisjoint(inputs):
            runs[-1].append(node)
        else:
            runs.append([node])
            dependent = set()
    return runs


def _join(module: fx.GraphModule, run: list[Node], name: str) -> None:
    given = list(dict.fromkeys(i for node in run for i in node.all_input_nodes if i not in run))
    values = {node: number for number, node in enumerate((*given, *run))}
    read_elsewhere = [n for n in run if any(reader not in values for reader in n.users)]
    layers: list[Any] = [layer_of(module, node) for node in run]
    reads = [_reads(values, node) for node in run]
    outputs = [values[node] for node in read_elsewhere]
    names = [str(node.target) if node.op == "call_module" else node.name for node in run]
    module.add_submodule(name, GroupConvRun(layers, reads, len(given), outputs, names).eval())
    graph, first, last = module.graph, run[0], run[-1]
    with graph.inserting_after(last):
        call = graph.call_module(name, tuple(given))
    end = call
    results = {}
    for number, node in enumerate(read_elsewhere):
        with graph.inserting_after(end):
            end = results[node] = graph.call_function(operator.getitem, (call, number))
    _move_after(first, last, run, end)
    for node, result in results.items():
        node.replace_all_uses_with(result)
    for node in reversed(run):
        graph.erase_node(node)


def _reads(values: dict[Node, int], node: Node) -> tuple[int, int]:
    """The numbers of what a layer reads and what it adds, -1 for nothing."""
    source, *residual = (values[a] for a in node.args if isinstance(a, Node))
    return source, residual[0] if residual else -1


def _move_after(first: Node, last: Node, run: list[Node], end: Node) -> None:
    """Move what depends on the run, and lies between its convolutions, after `end`."""
    depends = set(run)
    node = first
    while node is not last:
        following = node.next
        if node not in depends and not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
            end.append(node)
            end = node
        node = following
