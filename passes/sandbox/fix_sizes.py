"""Guards of sizes: graphs that refuse inputs for which their model does something else."""

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from dspfx.errors import TraceError
from dspfx.passes.sandbox.numbers import numbers_of
from dspfx.passes.sandbox.sizes import Shapes, shapes_of
from dspfx.utils.pytree import leaves


def fix_sizes(graphs: Iterable[fx.Graph], example: tuple[Any, ...], refused: Shapes) -> None:
    """Guard `graphs`: they refuse sizes other than that of `example`, as that of `refused` is.

    Raises:
        TraceError: such a tensor is part of a container, which has no input of its own.
    """
    places = [
        (number, dim, size)
        for number, (shape, other) in enumerate(zip(shapes_of(example), refused, strict=True))
        for dim, size in enumerate(shape)
        if other[dim] != size
    ]
    if numbers_of(example) and places and places[-1][0] == len(refused) - 1:
        fix_numbers(graphs, example)
        places = [place for place in places if place[0] < len(refused) - 1]
    tensors = [n for n, leaf in enumerate(example) if isinstance(leaf, Tensor)]
    if places and len(tensors) != sum(isinstance(leaf, Tensor) for leaf in leaves(example)):
        raise TraceError(
            "for inputs of other sizes the code of the model does something else than its graph; "
            "give it tensors that are arguments of their own, or do not branch on their sizes"
        )
    for graph, inputs in _at_inputs(graphs):
        for number, dim, size in places:
            _check_size(graph, inputs[tensors[number]], dim, size)


def fix_numbers(graphs: Iterable[fx.Graph], example: tuple[Any, ...]) -> None:
    """Guard `graphs`: they refuse whole numbers other than those of `example`.

    Raises:
        TraceError: such a number is part of a container that holds tensors, too.
    """
    held = {number: x for number, x in enumerate(example) if numbers_of(x)}
    if any(isinstance(leaf, Tensor) for leaf in leaves(list(held.values()))):
        raise TraceError(
            "the model does something else for other numbers among its inputs than its graph; give "
            "it numbers apart from its tensors"
        )
    for graph, inputs in _at_inputs(graphs):
        for number, x in held.items():
            _check(graph, inputs[number], x, f"with {inputs[number].target}={x!r}")


def _at_inputs(graphs: Iterable[fx.Graph]) -> Iterator[tuple[fx.Graph, list[Node]]]:
    """Every graph with its inputs, after which nodes are inserted meanwhile."""
    for graph in set(graphs):
        inputs = list(graph.find_nodes(op="placeholder"))
        with graph.inserting_after(inputs[-1]):
            yield graph, inputs
        graph.lint()


def _check_size(graph: fx.Graph, tensor: Node, dim: int, size: int) -> None:
    found = graph.call_method("size", (tensor, dim))
    with graph.inserting_after(found):
        _check(graph, found, size, f"for inputs whose dimension {dim} is {size}")


def _check(graph: fx.Graph, found: Node, value: Any, how: str) -> None:
    same = graph.call_function(operator.eq, (found, value))
    same.meta["is_wrapped"] = True  # or fx would evaluate it when it is unpickled
    with graph.inserting_after(same):
        message = f"the model was prepared {how}, and no other"
        graph.call_function(torch._assert, (same, message))
