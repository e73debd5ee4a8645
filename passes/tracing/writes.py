"""In-place writes: which of its arguments, nested or not, a call has overwritten."""

from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node

from dspfx.passes.tracing.proxy import ConcreteProxy, value_of
from dspfx.utils.pytree import leaves


class Arguments:
    """The arguments of a call, before it is made.

    Args:
        arguments: tensors and proxies, nested in tuples, lists, dicts and slices.
        copied: whether a write that leaves no trace, as one into `.data`, is seen, too.
    """

    def __init__(self, arguments: Any, copied: bool) -> None:
        self._before = [
            (value, x, x._version, x.clone() if copied else None)
            for value in _tensors_and_proxies(arguments)
            for x in leaves(value_of(value))
            if isinstance(x, Tensor) and not x.is_inference()
        ]

    def overwritten(self) -> list[Any]:
        """The arguments that have changed: tensors, and proxies of tensors or containers."""
        changed = {
            id(value): value
            for value, x, version, copied in self._before
            if x._version != version or not (copied is None or _is_same(x, copied))
        }
        return list(changed.values())


def nodes_in(value: Any) -> list[Node]:
    """The nodes of the proxies in a nested value."""
    found = _tensors_and_proxies(value)
    return [item.node for item in found if type(item) is ConcreteProxy]


def _tensors_and_proxies(nested: Any) -> list[Any]:
    found = [x for x in leaves(nested) if type(x) is ConcreteProxy or isinstance(x, Tensor)]
    return list({id(x): x for x in found}.values())


def _is_same(x: Tensor, before: Tensor) -> bool:
    return x.shape == before.shape and torch.equal(x.nan_to_num(), before.nan_to_num())
