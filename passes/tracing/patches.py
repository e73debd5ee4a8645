"""Patches of torch and builtins while a model is traced, so that its code accepts proxies."""

import builtins
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.variable import VariableMeta
from torch.fx import Proxy
from torch.fx.node import map_aggregate
from torch.utils import checkpoint
from torch.utils.checkpoint import CheckpointFunction

from dspfx.passes.tracing.frames import is_machinery
from dspfx.passes.tracing.proxy import ConcreteProxy

# fx does not see a proxy among the arguments of these, sizes or types
FACTORIES = (
    *("arange", "zeros", "ones", "full", "empty", "linspace", "eye"),
    *("tensor", "as_tensor", "finfo", "iinfo"),
)
# methods of real tensors: fx does not see a proxy among their sizes
METHODS = ("expand", "roll", "new_zeros", "new_ones", "new_empty")
# of numbers alone they are values too, but other ones in every call
RANDOM = ("rand", "randn", "randint", "randperm", "normal")
# what surrounds a checkpointed call that is not reentrant; torch has no public name for it
_CHECKPOINTING = (
    "_checkpoint_without_reentrant_generator_impl",
    "_checkpoint_without_reentrant_generator",
)
_isinstance, _len, _records = isinstance, len, torch.is_grad_enabled
_call_script: Any = torch.jit.ScriptFunction.__call__
_IS_TENSOR, _SET_ATTRIBUTE = torch.is_tensor.__code__, nn.Module.__setattr__.__code__


def patched(
    call: Callable[..., Any],
    call_method: Callable[..., Any],
    training: bool,
    recording: Callable[[], bool],
    mode_read: Callable[[], None],
) -> ExitStack:
    """Apply the patches, until the result is closed.

    Args:
        call: makes a traced call of a function.
        call_method: makes a traced call of the method of a name.
        training: whether the model is in training; else code that asks sees that there are no
            gradients, as where the model is tried.
        recording: whether calls are traced now.
        mode_read: called when code reads what differs between evaluation and training.
    """
    stack = ExitStack()
    mode = _Mode(recording, mode_read)
    stack.enter_context(mock.patch.object(nn.Module, "training", mode, create=True))
    stack.enter_context(mock.patch.object(builtins, "isinstance", _is_instance))
    stack.enter_context(mock.patch.object(builtins, "len", _length))
    stack.enter_context(checkpoints_run_once())
    stack.enter_context(mock.patch.object(torch.jit.ScriptFunction, "__call__", _inlined))
    stack.enter_context(mock.patch.object(VariableMeta, "__call__", _variable))
    if not training:
        enabled = _gradients_disabled(mode_read)
        stack.enter_context(mock.patch.object(torch, "is_grad_enabled", enabled))
    stack.enter_context(factories_traced(call, recording))
    for name in METHODS:
        method = getattr(torch.Tensor, name)
        noticing = _noticing(method, _by_name(name, call_method), lambda: False)
        stack.enter_context(mock.patch.object(torch.Tensor, name, noticing))
    return stack


def factories_traced(call: Callable[..., Any], recording: Callable[[], bool]) -> ExitStack:
    """Patch the functions that make tensors of numbers alone; see `patched`."""
    stack = ExitStack()
    for name in FACTORIES + RANDOM:
        record = recording if name in RANDOM else lambda: False
        factory = _noticing(getattr(torch, name), call, record)
        stack.enter_context(mock.patch.object(torch, name, factory))
    return stack


def _by_name(name: str, call_method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *args, **kwargs: call_method(name, *args, **kwargs)


def checkpoints_run_once() -> ExitStack:
    """Run checkpointed functions (`torch.utils.checkpoint`) once, until the result is closed."""
    stack = ExitStack()
    stack.enter_context(mock.patch.object(CheckpointFunction, "apply", _call_checkpointed))
    for name in _CHECKPOINTING:
        if hasattr(checkpoint, name):
            stack.enter_context(mock.patch.object(checkpoint, name, _saves_everything))
    return stack


def _saves_everything(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _call_checkpointed(function: Callable[..., Any], _: bool, *args: Any) -> Any:
    """Trace a checkpointed function once, without recomputation."""
    return function(*args)


def _inlined(script: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the Python function that a scripted one was made of, if there are proxies.

    Not for a function that was traced, which repeats what it did for its example.
    """
    traced = any(given.isCompleteTensor() for given in script.graph.inputs())
    if traced or not _holds_a_proxy((args, kwargs)):
        return _call_script(script, *args, **kwargs)
    return script._torchdynamo_inline(*args, **kwargs)


def _variable(kind: Any, data: Any = None, requires_grad: bool = False, **rest: Any) -> Any:
    """`Variable(proxy)`, the deprecated form of `proxy.detach()`."""
    if not _holds_a_proxy(data):
        return type.__call__(kind, data, requires_grad, **rest)
    if requires_grad or rest:
        raise TypeError("a Variable that requires gradients is made")
    return data.detach()


def _holds_a_proxy(given: Any) -> bool:
    found = False

    def look(value: Any) -> Any:
        nonlocal found
        found = found or _isinstance(value, Proxy)
        return value

    map_aggregate(given, look)
    return found


def _noticing(
    factory: Callable[..., Any], call: Callable[..., Any], record: Callable[[], bool]
) -> Callable[..., Any]:
    """`factory`, a traced call if `record` says so or there is a proxy among its arguments."""

    def create(*args: Any, **kwargs: Any) -> Any:
        found = record() or _holds_a_proxy((args, kwargs))
        return call(factory, *args, **kwargs) if found else factory(*args, **kwargs)

    return create


def _is_instance(item: Any, kinds: Any) -> bool:
    """`isinstance`: for user code, a proxy is an instance of the class of its value."""
    if type(item) is not ConcreteProxy:
        return _isinstance(item, kinds)
    frame = sys._getframe(1)
    if frame.f_code is not _SET_ATTRIBUTE:  # which decides where the value goes
        if is_machinery(frame) and frame.f_code is not _IS_TENSOR:
            return _isinstance(item, kinds)
        item.tracer.guards.guard_kind(item)
    return _isinstance(item.concrete, kinds)


def _length(item: Any) -> Any:
    """`len`, which returns the first size of a tensor."""
    if type(item) is not ConcreteProxy or not _isinstance(item.concrete, Tensor):
        return _len(item)
    return _len(item) if is_machinery(sys._getframe(1)) else item.size(0)


def _gradients_disabled(mode_read: Callable[[], None]) -> Callable[[], bool]:
    """`is_grad_enabled` that reports to code that gradients are disabled."""

    def is_grad_enabled() -> bool:
        if is_machinery(sys._getframe(1)):
            return _records()
        mode_read()
        return False

    return is_grad_enabled


class _Mode:
    """The attribute `training` of every module, which notices when code reads it.

    What torch's own code does with it, inside of a call that is one node, changes no graph.
    """

    def __init__(self, recording: Callable[[], bool], mode_read: Callable[[], None]) -> None:
        self.recording, self.mode_read = recording, mode_read

    def __get__(self, module: nn.Module, _: Any = None) -> bool:
        if self.recording() or not is_machinery(sys._getframe(1)):
            self.mode_read()
        try:
            mode: bool = vars(module)["training"]
        except KeyError:
            raise AttributeError("training") from None
        return mode

    def __set__(self, module: nn.Module, mode: bool) -> None:
        vars(module)["training"] = mode

    def __delete__(self, module: nn.Module) -> None:
        del vars(module)["training"]
