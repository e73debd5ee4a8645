"""A graph as text, a line for each node, equal where two graphs compute the same.

What may differ between two machines is left out: devices, addresses, the files that code is in, and
what checks say, which names lines of it.
"""

import hashlib
import re

import torch
from torch import fx, nn
from torch.fx.node import Node, map_arg

from dspfx.layers.branches import Branches
from dspfx.layers.gated import GatedLayer

_SCRIPT = re.compile(r" *#.*|___torch_mangle_\d+\.")  # files, and numbers of the process
_LEFT_OUT = re.compile(r"device\([^)]*\)| at 0x[0-9a-f]+")


def listing(root: nn.Module, graph: fx.Graph) -> tuple[str, ...]:
    """The lines of `graph`, whose modules are those of `root`."""
    return tuple(_line(root, node) for node in graph.nodes)


def structure(module: fx.GraphModule) -> str:
    """A digest of the graph of a compact module, and of what all its modules are and read."""
    lines = [*listing(module, module.graph)]
    for name, own in module.named_modules():
        lines.append(f"{name}{_settings(own)}")
        if isinstance(own, Branches):
            reads = [own.read_by(number).tolist() for number in range(len(own.inputs))]
            lines.append(f"reads {reads}, writes {own.written().tolist()}")
    lines += [f"{name} {tuple(tensor.shape)}" for name, tensor in module.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _line(root: nn.Module, node: Node) -> str:
    target = node.target
    if not isinstance(target, str):
        target = getattr(target, "__name__", type(target).__name__)
    called = _settings(root.get_submodule(target)) if node.op == "call_module" else ""
    told = node.args[:1] if node.target is torch._assert else node.args
    args = map_arg((told, node.kwargs), lambda n: f"%{n.name}")
    return _LEFT_OUT.sub("", f"{node.name} = {node.op} {target}{called} {args}")


def _settings(module: nn.Module) -> str:
    """Type and settings of a layer of torch's own, gated or not; nothing of others."""
    kind = module.plain if isinstance(module, GatedLayer) else type(module)
    if isinstance(module, torch.jit.ScriptModule):
        code = str(module.inlined_graph)
        return f": TorchScript {hashlib.sha256(_SCRIPT.sub('', code).encode()).hexdigest()}"
    own = kind.__module__.startswith("torch.nn.")
    return f": {kind.__name__}({module.extra_repr()})" if own else ""
