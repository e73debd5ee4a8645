"""Modules that are no Python code as written, or that rewrite themselves.

1. Compiled modules are taken for what they were compiled from.
2. Scripted and exported modules are refused; inside of others, scripted ones are called whole.
3. Methods by which modules exchange their layers for others, to be deployed, are refused in what is
   prepared: its graph names the layers that it has.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from dspfx.errors import PrepareError
from dspfx.passes.tracing.trace import copy_model

REBUILDING = ("fuse", "reparameterize", "switch_to_deploy")
SCRIPTED, EXPORTED = "scripted", "exported"
_COMPILED = "_orig_mod"
_INSTEAD = "the module that it was made from in its place"


def plain_copy(model: nn.Module) -> nn.Module:
    """A private copy of `model` without what `torch.compile` has put around modules.

    Raises:
        TraceError: it cannot be copied.
    """
    root = _original(copy_model(model))
    for module in list(root.modules()):
        for name, child in module._modules.items():
            if child is not None and (original := _original(child)) is not child:
                module._modules[name] = original
    return root


def _original(module: nn.Module) -> nn.Module:
    while _COMPILED in module._modules:
        module = module.get_submodule(_COMPILED)
    return module


def check_written(model: nn.Module) -> None:
    """Refuse a model that is no Python code.

    Raises:
        PrepareError: it is scripted or exported, or a `forward` in it is compiled.
    """
    form = _form(model)
    if form is not None:
        raise PrepareError(
            f"the model is {form}, and has no Python code to trace; prepare the module that it was "
            f"made from, and have it {form} when it is compact"
        )
    for name, module in model.named_modules():
        if _form(module) == EXPORTED:  # its mode cannot be set
            raise PrepareError(f"'{name}' is exported; put {_INSTEAD}")
        of_dynamo = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        if of_dynamo and _COMPILED not in module._modules:
            raise PrepareError(
                f"the 'forward' of '{name}', a {type(module).__name__}, was replaced by a compiled "
                "one, which belongs to the original model; prepare it first, and compile then"
            )


def forms_inside(model: nn.Module) -> tuple[str, ...]:
    """What the report says of modules inside `model` that are no Python code."""
    names: list[str] = []
    for name, module in model.named_modules():
        if _form(module) and not any(name.startswith(f"{outer}.") for outer in names):
            names.append(name)
    return tuple(
        f"'{name}' is scripted, and called whole; to prune it, put {_INSTEAD}" for name in names
    )


def _form(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return SCRIPTED
    if not isinstance(module, fx.GraphModule):
        return None
    calls = module.graph.nodes
    exported = any(isinstance(node.target, torch._ops.OpOverload) for node in calls)
    return EXPORTED if exported else None


def refuse_rebuilding(modules: Iterable[nn.Module]) -> None:
    """Make `modules`, whose layers a graph names, refuse to exchange them."""
    for module in modules:
        for name in REBUILDING:
            if callable(getattr(module, name, None)) and name not in module._modules:
                vars(module)[name] = refuse


def refuse(*_: Any, **__: Any) -> Any:
    """Called instead of a method of `REBUILDING`.

    Raises:
        PrepareError: always.
    """
    raise PrepareError(
        "a prepared model cannot exchange its layers for others, which its graph does not name; "
        f"let it do that ({', '.join(REBUILDING)}) before dspfx.prepare"
    )
