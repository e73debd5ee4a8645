"""One run of a graph on an example, and what a channel analysis has to know of it.

A graph is run once for every size of its inputs. An analysis, which may be made several times,
reads from the record what every node gave:

1. Of a tensor it keeps shape, type and device, but no memory: one zero, expanded.
2. Everything else is kept as it is.
3. What it cost, whether it drew random numbers, and whether a module computes something else than
   its class would.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import Node

from dspfx.layers.gated import GatedLayer
from dspfx.passes.analysis.products import Products
from dspfx.passes.sandbox.calls import fresh
from dspfx.passes.sandbox.randomness import drawn_by_torch
from dspfx.passes.sandbox.state import is_altered
from dspfx.utils.pytree import map_leaves


@dataclass(frozen=True)
class Execution:
    """What happened when a graph was run.

    Attributes:
        results: what every node gave, tensors without their values.
        macs: multiply-accumulates of every node, of all samples.
        drew: the nodes that drew random numbers.
        altered: the nodes that call a module whose hooks or own `forward` change what it computes.
    """

    results: Mapping[Node, Any]
    macs: Mapping[Node, int]
    drew: frozenset[Node]
    altered: frozenset[Node]

    def shapes(self) -> Iterator[tuple[Node, tuple[int, ...]]]:
        """The nodes that gave a tensor, and its shape."""
        for node, result in self.results.items():
            if isinstance(result, Tensor):
                yield node, tuple(result.shape)


def execute(root: fx.GraphModule, inputs: tuple[Any, ...]) -> tuple[Execution, Any]:
    """Run the graph of `root` on copies of `inputs`: the record, and the outputs."""
    recorder = _Recorder(root)
    with torch.no_grad():
        outputs = recorder.run(*fresh(inputs))
        altered = frozenset(node for node, call in recorder.suspects.items() if call.is_altered())
    drew = frozenset(recorder.drew)
    return Execution(recorder.results, recorder.macs, drew, altered), outputs


@dataclass(frozen=True)
class _Suspect:
    """A call of a module that may compute something else than its class would."""

    module: nn.Module
    args: Any
    kwargs: Any
    result: Tensor

    def is_altered(self) -> bool:
        """Whether it did."""
        plain = type(self.module).forward(self.module, *self.args, **self.kwargs)
        return not torch.equal(plain, self.result)


class _Recorder(fx.Interpreter):
    def __init__(self, root: fx.GraphModule) -> None:
        super().__init__(root)
        self.results: dict[Node, Any] = {}
        self.macs: dict[Node, int] = {}
        self.drew: list[Node] = []
        self.suspects: dict[Node, _Suspect] = {}

    def run_node(self, n: Node) -> Any:
        before = drawn_by_torch()
        given = self._given_to_altered(n)
        with Products() as counted:
            result = super().run_node(n)
        self.macs[n] = counted.macs
        if drawn_by_torch() != before:
            self.drew.append(n)
        if given is not None and isinstance(result, Tensor):
            module = self.module.get_submodule(str(n.target))
            args, kwargs = given
            self.suspects[n] = _Suspect(module, args, kwargs, result.clone())
        self.results[n] = map_leaves(_without_values, result)
        return result

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as the code of a graph passes them: in plain lists and dicts."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _plain(args), _plain(kwargs)

    def _given_to_altered(self, node: Node) -> Any:
        """Copies of the arguments of a module that may compute something else than its class."""
        if node.op != "call_module":
            return None
        module = self.module.get_submodule(str(node.target))
        if isinstance(module, GatedLayer | torch.jit.ScriptModule) or not is_altered(module):
            return None
        return fresh(self.fetch_args_kwargs_from_env(node))


def _plain(tree: Any) -> Any:
    """`tree` with plain lists and dicts in place of those of `fx` nodes."""
    if isinstance(tree, immutable_list):
        return [_plain(item) for item in tree]
    if isinstance(tree, immutable_dict):
        return {key: _plain(item) for key, item in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(_plain, tree))
    return tuple(map(_plain, tree)) if type(tree) is tuple else tree


def _without_values(leaf: Any) -> Any:
    """A tensor of the shape, type and device of `leaf`, all of whose elements are one zero."""
    plain = isinstance(leaf, Tensor) and leaf.layout == torch.strided
    if not plain or leaf.is_quantized or type(leaf) not in (Tensor, nn.Parameter):
        return leaf
    return leaf.new_zeros(()).expand(leaf.shape)
