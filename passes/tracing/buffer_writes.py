"""Buffer mutation: what code writes into the buffers of a module that is being traced.

1. In-place calls are nodes like others. An assignment, `self.average = ...`, becomes a copy into
   the buffer at the end of the graph, and earlier reads of the buffer get a copy of their own.
   Assigning a tensor to itself in another type or on another device does not count: `self.mean =
   self.mean.to(x)` is computed in every call.
2. A buffer that is written in evaluation and read for the output makes the output depend on earlier
   calls, and so may one that changes its shape. Such a module stays opaque: channels are followed
   through one call only.
"""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Proxy
from torch.fx.node import Node

from dspfx.passes.sandbox.state import of_python

# methods whose result is the same tensor, of another type or elsewhere
_CONVERSIONS = frozenset([
    "to", "type_as", "type", "float", "double", "half", "bfloat16", "cuda", "cpu", "contiguous",
    "clone", "detach",
])  # fmt: skip


class BufferWrites:
    """The buffers of `root`, before its code runs.

    Args:
        root: the module that is traced.
        leaves: the paths of the modules whose code is not traced.
    """

    def __init__(self, root: nn.Module, leaves: Set[str]) -> None:
        self.leaves = tuple(f"{leaf}." for leaf in leaves)
        self.own = {module: dict(module._buffers) for module in of_python(root)}
        self.paths = {module: path for path, module in root.named_modules()}
        self.versions = {name: buffer._version for name, buffer in root.named_buffers()}
        self.known = {id(buffer) for buffer in root.buffers()}
        self.plain = {
            (module, name): value
            for module in self.own
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        }
        self.root = root
        self.unwritable: list[str] = []  # buffers with a value that a graph cannot give them

    def take_back(self) -> dict[str, Node]:
        """Undo all assignments; of proxies, the nodes by the names of the buffers."""
        assigned: dict[str, Node] = {}
        for module, before in self.own.items():
            for name, now in module._buffers.items():
                was, path = before.get(name), f"{self.paths[module]}.{name}".lstrip(".")
                if _is_converted(was, now, path):
                    continue
                if isinstance(now, Proxy):
                    assigned[path] = now.node
                fitting = now is was or _is_alike(was, now) or _is_constant_cache(was, now)
                if not fitting and not path.startswith(self.leaves):
                    self.unwritable.append(path)
            module._buffers.update(before)
        for (module, name), was in self.plain.items():
            path = f"{self.paths[module]}.{name}".lstrip(".")
            if _is_converted(was, vars(module).get(name), path):
                vars(module)[name] = was
        return assigned

    def is_new(self, buffer: Tensor) -> bool:
        """Whether code has made it, to keep a constant."""
        return id(buffer) not in self.known

    def remembered(self, graph: fx.Graph, assigned: Iterable[str], evaluation: bool) -> str | None:
        """A buffer that no graph can write, or in evaluation is written and read; None if none."""
        if self.unwritable or not evaluation:
            return self.unwritable[0] if self.unwritable else None
        now = dict(self.root.named_buffers())
        written = {name for name, version in self.versions.items() if now[name]._version != version}
        for name in sorted(written.union(assigned)):
            reads = [n for n in graph.find_nodes(op="get_attr") if n.target == name]
            if _reaches(reads, graph.output_node()):
                return name
        return None


def write_back(graph: fx.Graph, assigned: Mapping[str, Node], unrecorded: Set[Node]) -> None:
    """Write what was `assigned` into the buffers, at the end; what is `unrecorded`, detached."""
    kept = dict(assigned)
    for read in graph.find_nodes(op="get_attr"):
        if read.target in assigned:
            with graph.inserting_after(read):
                copied = graph.call_method("clone", (read,))
            read.replace_all_uses_with(copied, lambda user, copied=copied: user is not copied)
            kept = {name: copied if node is read else node for name, node in kept.items()}
    with graph.inserting_before(graph.output_node()):
        for name, node in kept.items():
            value = graph.call_method("detach", (node,)) if node in unrecorded else node
            graph.call_method("copy_", (graph.get_attr(name), value))


def _is_alike(was: Tensor | None, now: Any) -> bool:
    """Whether `now` is a proxy that can be copied into `was`, which becomes the same."""
    if was is None or not isinstance(now, Proxy):
        return False
    value = now.concrete
    return isinstance(value, Tensor) and (value.shape, value.dtype) == (was.shape, was.dtype)


def _is_converted(was: Tensor | None, now: Any, path: str) -> bool:
    """Whether `now` is the tensor at `path`, which it was, in another type or elsewhere."""
    value = now.concrete if isinstance(now, Proxy) else None
    if was is None or not isinstance(value, Tensor) or not torch.equal(value.to(was), was):
        return False
    node: Node | None = now.node
    while node is not None and node.op == "call_method" and node.target in _CONVERSIONS:
        node = node.args[0] if isinstance(node.args[0], Node) else None
    return node is not None and node.op == "get_attr" and node.target == path


def _is_constant_cache(was: Tensor | None, now: Any) -> bool:
    return was is None and not isinstance(now, Proxy)


def _reaches(starts: list[Node], goal: Node) -> bool:
    found, todo = set(starts), list(starts)
    while todo:
        new = todo.pop().users.keys() - found
        found |= new
        todo += new
    return goal in found
