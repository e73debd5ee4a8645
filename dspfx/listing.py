"""A graph as text, a line for each node, equal where two graphs compute the same.

What may differ between two machines is left out: devices, addresses, and the files that code is in.
"""

import re

from torch import fx, nn
from torch.fx.node import Node, map_arg

from dspfx.gates import GatedLayer

_LEFT_OUT = re.compile(r"device\([^)]*\)| at 0x[0-9a-f]+")


def listing(root: nn.Module, graph: fx.Graph) -> tuple[str, ...]:
    """The lines of `graph`, whose modules are those of `root`."""
    return tuple(_line(root, node) for node in graph.nodes)


def _line(root: nn.Module, node: Node) -> str:
    target = node.target
    if not isinstance(target, str):
        target = getattr(target, "__name__", type(target).__name__)
    called = _settings(root.get_submodule(target)) if node.op == "call_module" else ""
    args = map_arg((node.args, node.kwargs), lambda n: f"%{n.name}")
    return _LEFT_OUT.sub("", f"{node.name} = {node.op} {target}{called} {args}")


def _settings(module: nn.Module) -> str:
    """Type and settings of a layer of torch's own, gated or not; nothing of others."""
    kind = module.plain if isinstance(module, GatedLayer) else type(module)
    own = kind.__module__.startswith("torch.nn.")
    return f": {kind.__name__}({module.extra_repr()})" if own else ""
