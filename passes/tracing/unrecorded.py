"""What autograd does not record in the model, it does not in the graph: `with torch.no_grad()`.

1. Nodes that are made while recording is off are unrecorded. Where a recorded one reads them, it
   reads them detached; among themselves they need nothing.
2. What an unrecorded call writes into parameters and buffers is detached. Into a tensor that has a
   history, and keeps it, no traced call can write: that is refused.
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
        """Remember of `node`, a new one, whether it is unrecorded, as are parts of what is."""
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
        """Look at what an unrecorded call, of any kind, has overwritten.

        Raises:
            TypeError: its history cannot be kept.
        """
        if written.node.op.startswith("call") and written.node not in self.nodes:
            raise TypeError(f"'{written.node.name}' is overwritten while autograd does not record")


def _has_history(proxy: Any) -> bool:
    value = proxy.concrete
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
