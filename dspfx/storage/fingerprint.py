"""What two models have in common that compute the same, whatever their weights: text to compare.

1. `listing`: a graph, a line for each node.
2. `structure`: a digest of a compact module, of its graph and of all modules and shapes in it.
3. `settings`: what the modules of a model were constructed with. The graph shows what its code
   reads; a module that runs untraced, one of torch's own or of the user's, reads attributes as
   well, and `extra_repr` need not show them.

What may differ between two machines is left out: devices, addresses, paths, the files that code is
in, and the messages of checks, which name lines of it.
"""

import hashlib
import re
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Node, map_arg

from dspfx.layers.branches import Branches
from dspfx.layers.gated import GatedLayer

Settings = dict[str, dict[str, str]]
"""By the name of a module, and of an attribute."""

_SCRIPT = re.compile(r" *#.*|___torch_mangle_\d+\.")  # files, and numbers of the process
_MACHINE = re.compile(r"device\([^)]*\)| at 0x[0-9a-f]+")
_NO_SETTINGS = {"training", "inplace", "device"}  # attributes that no result depends on


def listing(root: nn.Module, graph: fx.Graph) -> tuple[str, ...]:
    """The lines of `graph`, whose modules are those of `root`."""
    return tuple(_line(root, node) for node in graph.nodes)


def structure(module: fx.GraphModule) -> str:
    """A digest of the graph of a compact module, and of what all its modules are and read."""
    lines = [*listing(module, module.graph)]
    for name, own in module.named_modules():
        lines.append(f"{name}{_kind(own)}")
        if isinstance(own, Branches):
            reads = [own.read_by(number).tolist() for number in range(len(own.inputs))]
            lines.append(f"reads {reads}, writes {own.written().tolist()}")
    lines += [f"{name} {tuple(tensor.shape)}" for name, tensor in module.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def settings(model: nn.Module) -> Settings:
    """The public attributes that are plain values, of all modules of `model` but dspfx's own.

    Plain values are numbers, words, None, functions by their names, and tuples and lists of these.
    Paths and other texts may differ between machines, and are left out; so is None where a module
    is not of torch's own: it may stand for something that the first call sets.
    """
    named = {name: _attributes(module) for name, module in model.named_modules()}
    return {name: own for name, own in named.items() if own}


def other_setting(here: Settings, there: Settings) -> str | None:
    """The first attribute that both have and that differs, in words; what one lacks is new."""
    for name, own in here.items():
        for attribute, value in own.items():
            saved = there.get(name, {}).get(attribute, value)
            if saved != value:
                return f"'{name}' has {attribute}={value[:200]} and had {attribute}={saved[:200]}"
    return None


def _line(root: nn.Module, node: Node) -> str:
    target = node.target
    if not isinstance(target, str):
        target = getattr(target, "__name__", type(target).__name__)
    called = _kind(root.get_submodule(target)) if node.op == "call_module" else ""
    without_message = node.args[:1] if node.target is torch._assert else node.args
    args = map_arg((without_message, node.kwargs), lambda n: f"%{n.name}")
    return _MACHINE.sub("", f"{node.name} = {node.op} {target}{called} {args}")


def _kind(module: nn.Module) -> str:
    """Type and settings of a layer of torch's own, gated or not; nothing of others."""
    kind = module.plain if isinstance(module, GatedLayer) else type(module)
    if isinstance(module, torch.jit.ScriptModule):
        code = str(module.inlined_graph)
        return f": TorchScript {hashlib.sha256(_SCRIPT.sub('', code).encode()).hexdigest()}"
    own = kind.__module__.startswith("torch.nn.")
    return f": {kind.__name__}({module.extra_repr()})" if own else ""


def _attributes(module: nn.Module) -> dict[str, str]:
    """The settings of one module."""
    origin = type(module).__module__
    if origin.startswith("dspfx.") and not isinstance(module, GatedLayer):
        return {}
    return {
        name: repr(_plain(value))
        for name, value in vars(module).items()
        if name not in _NO_SETTINGS and name[0] != "_" and _is_plain(value)
        if value is not None or origin.startswith(("torch.nn.", "dspfx."))
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, str):
        return value.isidentifier()
    return value is None or type(value) in (bool, int, float) or _is_named(value)


def _is_named(value: Any) -> bool:
    return callable(value) and isinstance(getattr(value, "__name__", None), str)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    return value.__name__ if _is_named(value) else value
