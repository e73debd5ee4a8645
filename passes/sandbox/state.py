"""What running a model must not change: the values of tensors, and attributes."""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from dspfx.passes.sandbox.randomness import generators_kept, generators_of

_CONTAINERS = (dict, OrderedDict, defaultdict, set, list)  # such as those of parameters


@contextmanager
def values_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """`tensors` have afterwards the values that they had, no other history, and learn as before."""
    before = [(x, _version(x), x.requires_grad, x.detach().clone()) for x in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, version, trained, value in before:
                if _version(tensor) != version or _has_changed(tensor, value):
                    if tensor.grad_fn is not None:
                        tensor.detach_()
                    tensor.copy_(value)
                if tensor.requires_grad != trained:
                    tensor.requires_grad_(trained)


def of_python(root: nn.Module) -> list[nn.Module]:
    """The modules of `root` but for those of TorchScript, which only look like them."""
    return [module for module in root.modules() if not isinstance(module, torch.jit.ScriptModule)]


@contextmanager
def buffers_kept(root: nn.Module) -> Iterator[None]:
    """The buffers of `root` are afterwards the tensors that they were, with the same values."""
    own = {module: dict(module._buffers) for module in of_python(root)}
    with values_kept(root.buffers()):
        try:
            yield
        finally:
            for module, before in own.items():
                module._buffers.update(before)


@contextmanager
def state_kept(
    root: nn.Module, but: str | None = None, written: Iterable[Tensor] | None = None
) -> Iterator[None]:
    """Everything that `root` and its modules own is afterwards what it was, caches included.

    Args:
        root: any module.
        but: new attributes whose names start like this remain.
        written: its tensors that may be written; by default all.
    """
    attributes = {module: dict(vars(module)) for module in root.modules()}
    values = [value for own in attributes.values() for value in own.values()]
    contents = [(value, _contents(value)) for value in values if type(value) in _CONTAINERS]
    tensors = [*root.parameters(), *root.buffers()] if written is None else written
    with values_kept(tensors), generators_kept(generators_of(root)):
        try:
            yield
        finally:
            for module, before in attributes.items():
                new = vars(module).items() if but is not None else ()
                made = {name: value for name, value in new if name.startswith(str(but))}
                vars(module).clear()
                vars(module).update(made | before)
            for container, held in contents:
                container.clear()
                (container.extend if type(container) is list else container.update)(held)


def written_by(graph: fx.GraphModule) -> list[Tensor]:
    """The tensors that a call of `graph` may write: buffers, and what is not torch's to read."""
    found = list(graph.buffers())
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            found.append(attrgetter(node.target)(graph))
        elif node.op == "call_module":
            module = graph.get_submodule(node.target)
            if not all(_only_reads(part) for part in module.modules()):
                found += module.parameters()
    return [x for x in {id(x): x for x in found}.values() if isinstance(x, Tensor)]


def _only_reads(module: nn.Module) -> bool:
    """Whether no code but torch's and ours runs in `module`, which leaves parameters alone."""
    own = type(module).__module__.startswith(("torch.nn.", "dspfx."))
    return own and not is_altered(module)


def is_altered(module: nn.Module) -> bool:
    """Whether a call of `module` runs more than the code of its class: hooks, another `forward`."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _contents(container: Any) -> tuple[Any, ...]:
    return tuple(container.items() if isinstance(container, dict) else container)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _has_changed(tensor: Tensor, value: Tensor) -> bool:
    """Whether `.data` was written, which makes no new version; only a dense tensor tells."""
    return tensor.layout == torch.strided and not torch.equal(tensor, value)
