"""Functions that graphs call in place of statements (item assignment, in-place writes)."""

from typing import Any

from torch import Tensor


def set_item(x: Tensor, key: Any, value: Any) -> Tensor:
    """`x[key] = value`; the tensor that is overwritten."""
    x[key] = value
    return x


def as_left_by(value: Any, call: Any) -> Any:
    """`value`, which `call` may have overwritten; a graph reads both."""
    return value


def with_item(x: Tensor, key: Any, value: Any) -> Tensor:
    """A copy of `x` after `x[key] = value`."""
    return set_item(x.clone(), key, value)
