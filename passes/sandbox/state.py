"""Snapshot and restore module state: the values of tensors, and attributes."""

import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from types import BuiltinFunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dspfx.layers.gates import ChannelGate, FilterGate
from dspfx.passes.sandbox.randomness import generators_kept, generators_of

_TORCHS = (torch.__name__, torch.functional.__name__, F.__name__)
_CONTAINERS = (dict, OrderedDict, defaultdict, set, list)  # as of parameters


class Values:
    """A snapshot of the values of `tensors`, which can be restored several times.

    Writes that make no new version, through `.data`, show only where numbers are compared.

    Args:
        tensors: what can be written.
        compared: of tensors with more numbers these are not compared, but by `put_all_back`.
    """

    def __init__(self, tensors: Iterable[Tensor], compared: float = math.inf) -> None:
        self.compared = compared
        self._before = [
            (x, (_version(x), _place(x)), x.requires_grad, x.detach().clone()) for x in tensors
        ]

    def put_back(self) -> None:
        """The tensors have the values that they had, no other history, and learn as before."""
        self._put_back(self.compared)

    def put_all_back(self) -> None:
        """The same, of large tensors too."""
        self._put_back(math.inf)

    @torch.no_grad()
    def _put_back(self, compared: float) -> None:
        for tensor, seen, trained, value in self._before:
            written = (_version(tensor), _place(tensor)) != seen
            if written or (value.numel() <= compared and _has_changed(tensor, value)):
                if tensor.grad_fn is not None:
                    tensor.detach_()
                tensor.copy_(value)
            if tensor.requires_grad != trained:
                tensor.requires_grad_(trained)


@contextmanager
def values_kept(values: Values) -> Iterator[None]:
    """Restore the values afterwards."""
    try:
        yield
    finally:
        values.put_back()


def of_python(root: nn.Module) -> list[nn.Module]:
    """The modules of `root` except TorchScript's, which are no Python modules."""
    return [module for module in root.modules() if not isinstance(module, torch.jit.ScriptModule)]


def values_of(root: nn.Module, compared: float = math.inf) -> Values:
    """The values of all parameters and buffers."""
    return Values([*root.parameters(), *root.buffers()], compared)


@contextmanager
def buffers_kept(root: nn.Module) -> Iterator[None]:
    """Restore the buffers of `root` afterwards: the same tensors, with the same values."""
    own = {module: dict(module._buffers) for module in of_python(root)}
    with values_kept(Values(root.buffers())):
        try:
            yield
        finally:
            for module, before in own.items():
                module._buffers.update(before)


@contextmanager
def state_kept(
    root: nn.Module,
    but: str | None = None,
    written: Iterable[Tensor] | None = None,
    values: Values | None = None,
) -> Iterator[None]:
    """Restore everything that `root` and its modules own afterwards, caches included.

    Args:
        root: any module.
        but: new attributes whose names start like this remain.
        written: its tensors that may be written; by default all.
        values: of these, where they are at hand.
    """
    attributes = {module: dict(vars(module)) for module in root.modules()}
    held_by_all = [value for own in attributes.values() for value in own.values()]
    contents = [(value, _contents(value)) for value in held_by_all if type(value) in _CONTAINERS]
    values = values or (values_of(root) if written is None else Values(written))
    with values_kept(values), generators_kept(generators_of(root)):
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


def buffers_written(root: nn.Module) -> list[Tensor]:
    """The buffers that a call of `root` may write: all but those of gates."""
    gates = (FilterGate, ChannelGate)
    own = [module for module in root.modules() if not isinstance(module, gates)]
    return list({id(x): x for module in own for x in module.buffers(recurse=False)}.values())


def written_by(graph: fx.GraphModule) -> list[Tensor]:
    """The tensors that a call of `graph` may write: buffers, and what is not torch's to read."""
    found = buffers_written(graph)
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            found.append(attrgetter(node.target)(graph))
        elif node.op == "call_module":
            module = graph.get_submodule(node.target)
            if not all(only_reads(part) for part in module.modules()):
                found += module.parameters()
    return [x for x in {id(x): x for x in found}.values() if isinstance(x, Tensor)]


def only_reads(module: nn.Module) -> bool:
    """Whether only torch's and our code runs in `module`, which leaves parameters alone."""
    own = type(module).__module__.startswith(("torch.nn.", "dspfx."))
    return own and not is_altered(module)


def runs_torch_alone(root: nn.Module, kind: str, target: Any) -> bool:
    """Whether a call that is a node of that kind runs torch's and our code alone."""
    if kind == "call_module":
        return all(map(only_reads, root.get_submodule(target).modules()))
    if kind == "call_function":
        place = getattr(target, "__module__", None) or ""
        return isinstance(target, BuiltinFunctionType) or place in _TORCHS
    return kind == "get_attr" or (kind == "call_method" and hasattr(Tensor, target))


def is_altered(module: nn.Module) -> bool:
    """Whether a call of `module` runs more than the code of its class: hooks, another `forward`."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _contents(container: Any) -> tuple[Any, ...]:
    return tuple(container.items() if isinstance(container, dict) else container)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _place(tensor: Tensor) -> int:
    """Where the numbers are, which assigning to `.data` changes."""
    return tensor.data_ptr() if tensor.layout == torch.strided else 0


def _has_changed(tensor: Tensor, value: Tensor) -> bool:
    """Whether `.data` was written, which makes no new version; only a dense tensor tells."""
    return tensor.layout == torch.strided and not torch.equal(tensor, value)
