"""Concrete proxies: symbolic values that also hold the concrete value of this run.

Code that asks for a number (`len`, `int`, `if x.shape[2] > 32`, iteration, unpacking) gets the
concrete one; `guards` checks in every call that it still holds.
"""

import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from dspfx.layers.statements import set_item
from dspfx.passes.tracing.frames import unpacks
from dspfx.passes.tracing.types_followed import FOLLOWED
from dspfx.utils.pytree import map_leaves

PLAIN = int | float | str | bool | None  # values that an input can be compared with


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    """The in-place operator for tensors, the ordinary one for numbers, which are immutable."""

    def overwrite(self: Any, other: Any) -> Any:
        if not isinstance(self.concrete, Tensor):
            return NotImplemented
        return self.tracer.create_proxy("call_method", name, (self, other), {})

    return overwrite


class ConcreteProxy(Proxy):
    """A proxy with the value it had in this run."""

    concrete: Any
    tracer: Any  # a `ConcreteTracer`, which is made of proxies and so defined after them

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "concrete"):
            raise TypeError(f"'{self.node.name}.{name}' is assigned")
        object.__setattr__(self, name, value)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError(f"'{self.node.name}' is copied")

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.concrete, name)
        if name in ("values", "items") and isinstance(self.concrete, Mapping):
            return getattr({key: self._item(key) for key in self.keys()}, name)
        if name in ("dim", "ndim", "shape", "size") and isinstance(self.concrete, Tensor):
            if self.node.op == "get_attr":  # of a parameter: it has one for good
                return value
            if name in ("dim", "ndim"):
                self.tracer.read_rank()
                return value
        if name in FOLLOWED and self.tracer.types.follow and _is_parameter(self):
            return self.tracer.read_type(self.concrete, name)
        if name == "type" and isinstance(
            self.concrete, torch.device
        ):  # of contexts such as autocast
            return value
        if callable(value):
            return lambda *args, **kwargs: self.tracer.create_proxy(
                "call_method", name, (self, *args), kwargs
            )
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.concrete, Mapping):
            return iter(self.keys())
        count = len(self.concrete)
        if not unpacks(sys._getframe(1)):  # which fails where there are more or fewer
            count = len(self)
        return iter([self._item(i) for i in range(count)])

    def __getitem__(self, key: Any) -> Any:
        """An item; a slice of the pieces of a split tensor is a tuple of proxies."""
        some = type(key) is slice and self.node in self.tracer.guards.cut
        return tuple(self)[key] if some else self._item(key)

    def __add__(self, other: Any) -> Any:
        return self._sum(self, other)

    def __radd__(self, other: Any) -> Any:
        return self._sum(other, self)

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(self.concrete, Tensor):
            raise TypeError(f"an item of '{self.node.name}' is assigned")
        self.tracer.aliases.put_back(self, map_leaves(value_of, key), value)
        written = self.tracer.create_proxy("call_function", set_item, (self, key, value), {})
        written.node.meta["is_wrapped"] = True  # fx's own proxies have no items to assign

    def _sum(self, left: Any, right: Any) -> Any:
        """The concatenation of two lists, where this one is known item by item."""
        if self.node not in self.tracer.guards.cut:
            return self.tracer.create_proxy("call_function", operator.add, (left, right), {})
        return (*left, *right)

    def __len__(self) -> int:
        count = len(self.concrete)
        if isinstance(self.concrete, Tensor):
            return int(self.size(0))
        self.tracer.read_items(self, sys._getframe(1))
        return count

    def __hash__(self) -> int:
        return hash(self._number()) if isinstance(self.concrete, PLAIN) else id(self)

    def __contains__(self, item: Any) -> bool:
        if isinstance(self.concrete, Mapping) and not self.tracer.guards.are_checked(self):
            return value_of(item) in self.concrete
        if isinstance(self.concrete, Tensor):
            return bool(self._number())
        return bool(self.tracer.create_proxy("call_method", "__contains__", (self, item), {}))

    __iadd__, __isub__, __imul__ = _in_place("add_"), _in_place("sub_"), _in_place("mul_")
    __itruediv__, __ifloordiv__ = _in_place("div_"), _in_place("floor_divide_")
    __imod__, __ipow__ = _in_place("remainder_"), _in_place("pow_")
    __iand__, __ior__ = _in_place("bitwise_and_"), _in_place("bitwise_or_")
    __ixor__ = _in_place("bitwise_xor_")

    def __bool__(self) -> bool:
        counts = isinstance(self.concrete, tuple | list | Mapping)
        return len(self) > 0 if counts else bool(self._number())

    def __int__(self) -> int:
        self.tracer.calls_int.add(sys._getframe(1).f_code)
        return int(self._number())

    def __index__(self) -> int:
        return int(self._number().__index__())

    def __float__(self) -> float:
        return float(self._number())

    def __round__(self, *digits: int) -> Any:
        return self._rounded(round, *digits)

    def __ceil__(self) -> Any:
        return self._rounded(math.ceil)

    def __floor__(self) -> Any:
        return self._rounded(math.floor)

    def __trunc__(self) -> Any:
        return self._rounded(math.trunc)

    def _rounded(self, how: Callable[..., Any], *digits: int) -> Any:
        """Rounding of a number: a value of the graph, like its sums and quotients."""
        if isinstance(self.concrete, Tensor):
            return how(self._number(), *digits)
        rounded = self.tracer.create_proxy("call_function", how, (self, *digits), {})
        rounded.node.meta["is_wrapped"] = True  # fx's own proxies cannot be rounded
        return rounded

    def __mul__(self, other: Any) -> Any:
        return self._product(self, other)

    def __rmul__(self, other: Any) -> Any:
        return self._product(other, self)

    def _product(self, left: Any, right: Any) -> Any:
        """The number of items, for code that makes a list of them."""
        if type(left) in (list, tuple) and isinstance(right.concrete, int):
            return left * int(right)
        if type(right) in (list, tuple) and isinstance(left.concrete, int):
            return int(left) * right
        return self.tracer.create_proxy("call_function", operator.mul, (left, right), {})

    def __format__(self, how: str) -> str:
        return format(self._number(), how) if how else str(self)

    def keys(self) -> Any:
        """The keys of a mapping, as concrete values."""
        self.tracer.read_items(self, sys._getframe(1))
        return self.concrete.keys()

    def _item(self, key: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})

    def _number(self) -> Any:
        """The value, unless it depends on the data."""
        if isinstance(self.concrete, Tensor):
            raise TypeError(f"control flow depends on the values of '{self.node.name}'")
        self.tracer.read_value(self, sys._getframe(2))
        return self.concrete


def _is_parameter(proxy: ConcreteProxy) -> bool:
    value = proxy.concrete
    return (
        proxy.node.op == "get_attr"
        and isinstance(value, nn.Parameter)
        and value.is_floating_point()
    )


def value_of(item: Any) -> Any:
    """The value of a proxy, or of a slice of some; anything else is one itself."""
    if type(item) is slice:
        return slice(value_of(item.start), value_of(item.stop), value_of(item.step))
    return item.concrete if isinstance(item, ConcreteProxy) else item
