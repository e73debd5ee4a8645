"""Values of a trace that lie in the same memory: what one writes, the others are told of by none.

A node of a graph is one value. Code that overwrites a value in part, by way of a view, and then
reads the whole of it, or overwrites the whole and then reads a view, has no such graph.
"""

import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node

WRITTEN = "positions of the arguments that the call overwrote"  # a key of `Node.meta`
_SIZES = ("size", "dim", "numel")


class Aliases:
    """The values of one trace, by the memory that they lie in."""

    def __init__(self) -> None:
        self._seen: dict[int, list[weakref.ref[Any]]] = defaultdict(list)
        self._stale: dict[Node, str] = {}

    def note(self, proxy: Any) -> None:
        """Remember where the value of `proxy`, a new one, lies."""
        place = _place(proxy.concrete)
        if place and proxy.node.op != "get_attr":  # the module's own are looked after elsewhere
            alive = [known for known in self._seen[place] if known() is not None]
            self._seen[place] = [*alive, weakref.ref(proxy)]

    def overwritten(self, proxies: list[Any]) -> None:
        """Remember that whatever else lies where `proxies` do is not what its node computed.

        But for the values that they were before: who reads one of these later reads what it is now.
        """
        own = {node for proxy in proxies for node in _versions_of(proxy.node)}
        for proxy in proxies:
            for known in self._seen.get(_place(proxy.concrete), ()):
                other = known()
                if other is None or other.node in own:
                    continue
                if _overlap(proxy.concrete, other.concrete):
                    self._stale[other.node] = proxy.node.name

    def check(self, target: Any, read: list[Node]) -> None:
        """Look at the values that a call of `target` is given.

        Raises:
            TypeError: one was overwritten by way of another.
        """
        if target in _SIZES or target is getattr:
            return
        for node in read:
            if node in self._stale:
                raise TypeError(
                    f"'{node.name}' is read after '{self._stale[node]}', which shares its memory, "
                    "was overwritten"
                )


def _versions_of(node: Node) -> set[Node]:
    """The nodes that `node` is the value of, overwritten."""
    found = {node}
    while 0 in node.meta.get(WRITTEN, ()) and isinstance(node.args[0], Node):
        node = node.args[0]
        found.add(node)
    return found


def _place(value: Any) -> int:
    """The address of the memory of a tensor; 0 if it has none."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return 0
    return value.untyped_storage().data_ptr()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors in the same memory have an element in common."""
    if one.dtype != other.dtype:
        return True
    elements = one.untyped_storage().nbytes() // one.itemsize
    used = torch.zeros(elements, dtype=torch.bool)
    used.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(used.as_strided(other.shape, other.stride(), other.storage_offset()).any())
