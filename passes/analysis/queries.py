"""Rules of the channel analysis: code that reads the sizes of tensors."""

import operator
from typing import Any

import numpy as np
from torch import Tensor, fx
from torch.fx.node import Node

from dspfx.passes.analysis import operators
from dspfx.passes.analysis.channel_ops import (
    FullWidth,
    Op,
    Query,
    Source,
    Value,
)
from dspfx.passes.analysis.execution import Execution
from dspfx.passes.analysis.state import State
from dspfx.passes.sandbox.numbers import numbers_of
from dspfx.utils.pytree import leaves


def asked_of_inputs(a: State, operands: tuple[Node, ...], result: Any) -> Op | None:
    """A value computed from the sizes of inputs alone, whose channels are never pruned."""
    inputs = all(isinstance(a.ops[n], Source) for n in operands)
    asked = inputs and not any(isinstance(leaf, Tensor) for leaf in leaves(result))
    return Query(operands, None) if asked else None


def size(a: State, node: Node, operands: tuple[Node, ...]) -> Op | None:
    """A size of a tensor; a channel count becomes the constant that it always was."""
    key = operators.key(node, a.root)
    is_shape = key is getattr and node.args[1] in ("shape", "device", "dtype", "ndim")
    if not (is_shape or key in operators.SIZES or key in ("get_device", "is_floating_point")):
        return None
    value = a.values.get(operands[0])
    if value is None:
        return FullWidth(operands, "")
    asked = node.args[1] if key == "size" and len(node.args) > 1 else node.kwargs.get("dim")
    if isinstance(asked, int) and value.shape:
        on_channels = asked % len(value.shape) == value.dim
        return Query(operands, value.shape[asked] if on_channels else None)
    if key == "numel":
        return FullWidth(operands, "")
    if key == "size" or (key is getattr and node.args[1] == "shape"):
        return whole_shape(a, node, operands, value)
    return Query(operands, None)


def whole_shape(a: State, node: Node, operands: tuple[Node, ...], value: Value) -> Op:
    """A whole `size()` is allowed as long as only sizes of other dimensions are taken from it.

    Or if a transposed convolution is asked for it, which reads of it no channels.
    """
    for user in node.users:
        if user.op == "call_module" and user.args[0] is not node:
            layer = a.root.get_submodule(str(user.target))
            if operators.output_size(user, layer) is node:
                continue
        taken = user.args[1] if user.target is operator.getitem else None
        if isinstance(taken, int):
            continue
        dims = range(len(value.shape))[taken] if isinstance(taken, slice) else None
        if dims is None or value.dim in dims:
            return FullWidth(operands, "")
    return Query(operands, None)


def size_or_nothing(a: State, node: Node, result: Any) -> Op | None:
    """An item of a `size()`: a constant where it counts channels."""
    whole = node.args[0] if node.target is operator.getitem else None
    query = a.ops.get(whole) if isinstance(whole, Node) else None
    if isinstance(query, Query) and isinstance(node.args[1], int):
        value, asked = a.values[query.operands[0]], a.ops[query.operands[0]]
        if node.args[1] % len(value.shape) == value.dim and not isinstance(asked, Source):
            return Query(query.operands, int(result))
        return None
    if isinstance(result, Tensor):
        a.values[node] = Value(tuple(result.shape), None, np.zeros(0, np.int64))
        return FullWidth((), "")
    return None


def moved_by_numbers(root: fx.GraphModule, execution: Execution) -> tuple[str, ...]:
    """The nodes that move elements of tensors by whole numbers among the inputs of the graph."""
    numbers: set[Node] = set()
    found = []
    for node in root.graph.nodes:
        result = execution.results.get(node)
        given = node.op == "placeholder" and bool(numbers_of(result))
        if given or (numbers & set(node.all_input_nodes) and not _has_tensors(result)):
            numbers.add(node)
        elif node.op != "output" and numbers & set(node.all_input_nodes):
            moved = [n for n in node.all_input_nodes if n not in numbers and n.op != "get_attr"]
            if moved and operators.key(node, root) in operators.MOVEMENT:
                found.append(node.name)
    return tuple(found)


def _has_tensors(result: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in leaves(result))
