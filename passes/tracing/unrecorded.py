"""`torch.no_grad()` blocks: the graph detaches what autograd does not record in the model.

1. Nodes that are made while gradients are disabled are unrecorded. A recorded node reads them
   detached; among themselves nothing is inserted.
2. What an unrecorded call writes into parameters and buffers is detached. A write into a tensor
   that requires a gradient and keeps its history cannot be traced, and is refused.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.node import Node, map_aggregate


class Unrecorded:
    """The unrecorded nodes of one graph.

    Args:
        detach: makes the traced call that detaches a proxy.
    """

    def __init__(self, detach: Callable[[Any], Any]) -> None:
        self.detach = detach
        self.nodes: set[Node] = set()

    def note(self, node: Node) -> None:
        """Record whether `node`, a new one, is unrecorded, as are items of unrecorded values."""
        off = node.op.startswith("call") and not torch.is_grad_enabled()
        part = node.target in (operator.getitem, getattr) and node.all_input_nodes[0] in self.nodes
        if off or part:
            self.nodes.add(node)

    def read(self, proxy: Any) -> Any:
        """`proxy`, detached if it is unrecorded, and recorded code reads it."""
        if not torch.is_grad_enabled() or proxy.node not in self.nodes or not _has_history(proxy):
            return proxy
        with torch.no_grad():
            detached = self.detach(proxy)
        self.nodes.remove(detached.node)
        return detached

    def written(self, target: Any, *values: Any) -> tuple[Any, ...]:
        """The arguments of an unrecorded call that overwrites the first of them."""

        def detached(value: Any) -> Any:
            return self.detach(value) if isinstance(value, Proxy) and _has_history(value) else value

        if target.node.op == "get_attr" and isinstance(target.concrete, nn.Parameter):
            target = detached(target)
        return target, *map_aggregate(values, detached)

    def refuse(self, written: Any) -> None:
        """Check what an unrecorded call, of any kind, has overwritten.

        Raises:
            TypeError: its history cannot be kept.
        """
        if written.node.op.startswith("call") and written.node not in self.nodes:
            raise TypeError(f"'{written.node.name}' is overwritten while autograd does not record")


def _has_history(proxy: Any) -> bool:
    value = proxy.concrete
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
