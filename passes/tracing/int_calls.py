"""Calls of `int`: truncating a quotient of sizes stays symbolic, a value of the graph.

`int(x)` always returns a Python number, and so would specialise code to one size. Where a function
uses the name `int` for calls only, these become calls of another function while the model is
traced.
"""

import builtins
import contextlib
import dis
import gc
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from operator import attrgetter
from types import CodeType, FunctionType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dspfx.passes.tracing.proxy import ConcreteProxy

_NAME = "_int_of_dspfx"


def only_calls_int(code: CodeType) -> bool:
    """Whether `code` calls `int`, and uses the name for nothing else."""
    uses = [op for op in dis.get_instructions(code) if op.argval == "int"]
    # the lowest bit of a `LOAD_GLOBAL` says that what is loaded will be called
    calls = [op for op in uses if op.opname == "LOAD_GLOBAL" and (op.arg or 0) & 1]
    return len(uses) == len(calls) > 0


def ints_traced(codes: Iterable[CodeType]) -> ExitStack:
    """Let the functions that run `codes`, which only call `int`, call ours till it is closed."""
    stack = ExitStack()
    stack.enter_context(mock.patch.object(builtins, _NAME, _traced_int, create=True))
    for code in codes:
        names = tuple(_NAME if name == "int" else name for name in code.co_names)
        for function in _functions_of(code):
            if "int" not in function.__globals__:
                function.__code__ = code.replace(co_names=names)
                stack.callback(setattr, function, "__code__", code)
    return stack


def _functions_of(code: CodeType) -> list[FunctionType]:
    """The functions that run `code`.

    Of objects that `gc.freeze` has set aside, as servers do, nobody tells who refers to them; those
    are found by their names, unless they are local to another function.
    """
    found = [f for f in gc.get_referrers(code) if isinstance(f, FunctionType)]
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == code.co_filename:
            with contextlib.suppress(AttributeError):
                function = attrgetter(code.co_qualname)(module)
                if getattr(function, "__code__", None) is code:
                    found.append(function)
    return list(dict.fromkeys(found))


def _traced_int(number: Any = 0, *base: Any, **named: Any) -> Any:
    if type(number) is not ConcreteProxy or isinstance(number.concrete, Tensor):
        return int(number, *base, **named)
    if type(number.concrete) is int:
        return number
    return number.tracer.create_proxy("call_function", torch.sym_int, (number,), {})
