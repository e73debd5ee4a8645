"""Leaf arguments: lists and dicts that code passes to a leaf, which may overwrite them.

A leaf is given plain containers of values. Where it changes one, the graph builds the container
before the call, and later reads of it depend on the call.
"""

from collections.abc import Mapping
from typing import Any

from dspfx.passes.tracing.aliases import WRITTEN
from dspfx.passes.tracing.proxy import ConcreteProxy
from dspfx.utils.pytree import leaves


class LeafArguments:
    """The arguments of one call of a leaf.

    Args:
        args, kwargs: the values themselves, in containers that are the leaf's own.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._args, self._kwargs = args, kwargs
        self._before = {i: _items(x) for i, x in enumerate(args) if type(x) in (list, dict)}
        self._within = list(leaves((args, kwargs)))
        self._left: dict[int, set[Any]] = {}

    def returned(self) -> None:
        """The call has ended.

        Raises:
            TypeError: it has overwritten a container that lies in another, or is given by name.
        """
        for place, before in self._before.items():
            now = _items(self._args[place])
            same = {key for key in now if key in before and now[key] is before[key]}
            if len(same) < max(len(now), len(before)):
                self._left[place] = same
        within = list(leaves((self._args, self._kwargs)))
        if not self._left and [id(x) for x in within] != [id(x) for x in self._within]:
            raise TypeError("a module overwrites a container that lies in another one")

    def write_back(self, leaf: ConcreteProxy, args: tuple[Any, ...]) -> None:
        """Update `args`, the containers that code passed to `leaf`, to their present contents."""
        tracer: Any = leaf.tracer
        for place, same in self._left.items():
            own: Any = args[place]
            with tracer.graph.inserting_before(leaf.node):
                made = tracer.create_node("call_function", type(own), (leaf.node.args[place],), {})
            made.meta["is_wrapped"] = True  # or fx would make it of its own proxies
            leaf.node.update_arg(place, made)
            leaf.node.meta[WRITTEN] = [*leaf.node.meta.get(WRITTEN, ()), made]
            container = ConcreteProxy(made, tracer)
            container.concrete = self._args[place]
            keys = _items(container.concrete)
            left = {key: own[key] if key in same else container[key] for key in keys}
            own.clear()
            if isinstance(own, dict):
                own.update(left)
            else:
                own.extend(left.values())


def _items(container: Any) -> dict[Any, Any]:
    """The items of a list by position, of a dict by key."""
    return dict(container if isinstance(container, dict) else enumerate(container))
