"""What code writes into the buffers of a module that is being traced.

1. In-place calls are nodes like others. An assignment, `self.average = ...`, becomes a copy into
   the buffer at the end of the graph, and whatever reads the buffer before has a copy of its own.
2. A buffer that is written in evaluation, and decides what comes out, makes the output depend on
   earlier calls, and so does one that was None. Channels can be followed through one call only.
"""

from collections.abc import Iterable, Mapping

from torch import fx, nn
from torch.fx import Proxy
from torch.fx.node import Node


class Buffers:
    """The buffers of `root`, before its code runs."""

    def __init__(self, root: nn.Module) -> None:
        self.own = {module: dict(module._buffers) for module in root.modules()}
        self.paths = {module: path for path, module in root.named_modules()}
        self.versions = {name: buffer._version for name, buffer in root.named_buffers()}
        self.root = root

    def take_back(self) -> dict[str, Node]:
        """Undo all assignments of proxies; the nodes by the names of the buffers."""
        assigned: dict[str, Node] = {}
        for module, before in self.own.items():
            for name, now in module._buffers.items():
                if isinstance(now, Proxy):
                    assigned[f"{self.paths[module]}.{name}".lstrip(".")] = now.node
            module._buffers.update(before)
        return assigned

    def remembered(self, graph: fx.Graph, assigned: Iterable[str], evaluation: bool) -> str | None:
        """A buffer that is made, or in evaluation written and read; None if there is none."""
        now = dict(self.root.named_buffers())
        made = sorted(name for name in assigned if name not in now)
        if made or not evaluation:
            return made[0] if made else None
        written = {name for name, version in self.versions.items() if now[name]._version != version}
        for name in sorted(written.union(assigned)):
            reads = [n for n in graph.find_nodes(op="get_attr") if n.target == name]
            if _reaches(reads, graph.output_node()):
                return name
        return None


def write_back(graph: fx.Graph, assigned: Mapping[str, Node]) -> None:
    """Write what was `assigned` into the buffers, at the end."""
    kept = dict(assigned)
    for read in graph.find_nodes(op="get_attr"):
        if read.target in assigned:
            with graph.inserting_after(read):
                copied = graph.call_method("clone", (read,))
            read.replace_all_uses_with(copied, lambda user, copied=copied: user is not copied)
            kept = {name: copied if node is read else node for name, node in kept.items()}
    with graph.inserting_before(graph.output_node()):
        for name, node in kept.items():
            graph.call_method("copy_", (graph.get_attr(name), node))


def _reaches(starts: list[Node], goal: Node) -> bool:
    found, todo = set(starts), list(starts)
    while todo:
        new = todo.pop().users.keys() - found
        found |= new
        todo += new
    return goal in found
