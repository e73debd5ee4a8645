"""Custom `autograd.Function`s: traced through where `backward` is the gradient of `forward`.

Autograd differentiates what is traced. For a memory-saving activation that is the same gradient.
For a straight-through estimator, which lets gradients pass through a rounding, it is not: it stays
opaque.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.fx.node import map_aggregate

ZERO = 10.0  # times the rounding errors of a gradient: one that is not larger may be zero


class OwnGradients:
    """The functions in use, and the calls of them that have been checked.

    Args:
        as_leaf: calls a function with the values of proxies; nothing in it is traced.
    """

    def __init__(self, as_leaf: Callable[[Callable[[Any], Any], Any], Any]) -> None:
        self.as_leaf = as_leaf
        self.functions: dict[CodeType, list[Any]] = {}  # a code may be that of many
        for function in _below(Function):
            code = getattr(inspect.unwrap(function.forward), "__code__", None)
            if code is not None and not function.__module__.startswith("torch."):
                self.functions.setdefault(code, []).append(function)
        self.seen: set[FrameType] = set()

    def refuse(self) -> None:
        """Check the calls on the stack.

        Raises:
            TypeError: one is of a function that has another gradient than its code.
        """
        frame: FrameType | None = sys._getframe(1) if self.functions else None
        while frame is not None:
            if frame.f_code in self.functions and frame not in self.seen:
                self.seen.add(frame)
                for function in self.functions[frame.f_code]:
                    self._check(function, _arguments(frame))
                torch.set_grad_enabled(True)  # until it returns: it is like other code
            frame = frame.f_back

    def _check(self, function: Any, args: Any) -> None:
        if not self.as_leaf(lambda values: _is_its_codes(function, values), args):
            raise TypeError(f"the gradient of '{function.__name__}' is not that of its code")


def _below(kind: Any) -> Iterator[Any]:
    for own in kind.__subclasses__():
        yield own
        yield from _below(own)


def _arguments(frame: FrameType) -> list[Any]:
    """What the function that runs in `frame` was given by position."""
    code: CodeType = frame.f_code
    given = [frame.f_locals[name] for name in code.co_varnames[: code.co_argcount]]
    if code.co_flags & inspect.CO_VARARGS:
        given += frame.f_locals[code.co_varnames[code.co_argcount + code.co_kwonlyargcount]]
    return [argument for argument in given if not isinstance(argument, FunctionCtx)]


def _is_its_codes(function: Any, args: Any) -> bool:
    """Whether the gradient of `function` at `args` is that of the code of its `forward`."""
    takes_context = function.setup_context is Function.setup_context
    context = (FunctionCtx(),) if takes_context else ()

    def code(*args: Any) -> Any:
        return function.forward(*context, *args)

    return all(
        _largest(own - traced) <= 1e-3 * _largest(own)
        or max(_largest(own), _largest(traced)) <= ZERO * _largest(own - shaken)
        for scale in (1.0, -1.0, 100.0)  # values of both signs, and some beyond any threshold
        for weight in (1.0, -1e-3)
        for own, shaken, traced in zip(
            _gradients(function.apply, args, scale, weight),
            _gradients(function.apply, args, scale, weight, shaken=True),
            _gradients(code, args, scale, weight),
            strict=True,
        )
    )


def _largest(x: Tensor) -> float:
    return float(x.nan_to_num().abs().max())


def positions(x: Tensor) -> Tensor:
    """Numbers from 0.5 to 1.5, of the shape of `x`: a sum weighted by them knows what is where."""
    return torch.linspace(0.5, 1.5, x.numel()).view(x.shape).to(x)


def _gradients(
    function: Callable[..., Any], args: Any, scale: float, weight: float, *, shaken: bool = False
) -> list[Tensor]:
    """The gradients of a weighted sum of the results, for every argument that can have one.

    Args:
        function: of `args`.
        args: their tensors of numbers are scaled.
        scale: by how much.
        weight: the one in the middle of all.
        shaken: whether the last bits of the arguments are others.
    """
    inputs: list[Tensor] = []

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        by = scale * (1 + 4 * torch.finfo(value.dtype).eps) if shaken else scale
        inputs.append((by * value.detach()).requires_grad_())
        return inputs[-1].clone()  # it may be overwritten

    with torch.inference_mode(mode=False), torch.enable_grad():
        out = function(*map_aggregate(args, fresh))
        results = [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]
        total = sum((x * (weight * positions(x))).sum() for x in results if x.requires_grad)
        if not isinstance(total, Tensor):
            return [torch.zeros_like(x) for x in inputs]
        return list(torch.autograd.grad(total, inputs, materialize_grads=True))
