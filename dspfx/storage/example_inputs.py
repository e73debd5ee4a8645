"""Example inputs as JSON: their structure, shapes and types.

Numbers that a model may use as indices are stored too. What a floating-point tensor holds is not:
no graph depends on it, and it may be somebody's data. Random values stand for it.
"""

from typing import Any

import torch
from torch import Tensor

from dspfx.errors import SaveError

MOST_ELEMENTS = 2**24
MOST_DIMENSIONS = 16
DTYPES = {
    str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)
}
_PLAIN = (bool, int, str, type(None))


def to_plain(tree: Any) -> Any:
    """`tree`, made of tensors, numbers, strings, None, tuples, lists and dicts, as JSON.

    Raises:
        SaveError: it holds something else, or too much.
    """
    if isinstance(tree, Tensor):
        return ["tensor", _tensor_to_plain(tree)]
    if type(tree) in (tuple, torch.Size):
        return ["tuple", [to_plain(item) for item in tree]]
    if type(tree) is list:
        return ["list", [to_plain(item) for item in tree]]
    if type(tree) is dict:
        return ["dict", [[to_plain(key), to_plain(item)] for key, item in tree.items()]]
    if type(tree) is float:
        return ["float", repr(tree)]
    if type(tree) in _PLAIN:
        return ["plain", tree]
    raise SaveError(
        f"the example inputs hold a {type(tree).__name__}, which is not stored; prepare the model "
        "with tensors, numbers, strings, tuples, lists and dicts, or wrap it in a module that "
        "takes such"
    )


def from_plain(plain: Any, budget: int = MOST_ELEMENTS) -> Any:
    """What `to_plain` made `plain` of, with random values for those not stored.

    Args:
        plain: JSON.
        budget: the elements that all tensors together may have.

    Raises:
        ValueError: it is something else, or holds more.
    """
    return _CallReader(budget).read(plain)


def _tensor_to_plain(tensor: Tensor) -> dict[str, Any]:
    if tensor.numel() > MOST_ELEMENTS:
        raise SaveError(
            f"an example input has {tensor.numel():,} elements, more than {MOST_ELEMENTS:,}; "
            "prepare the model with fewer samples, two are enough, or smaller ones"
        )
    exact = not (tensor.is_floating_point() or tensor.is_complex())
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "values": [int(v) for v in tensor.flatten().tolist()] if exact else None,
    }


class _CallReader:
    def __init__(self, budget: int) -> None:
        self.left = budget
        self.generator = torch.Generator().manual_seed(0)

    def read(self, plain: Any) -> Any:
        match plain:
            case ["tensor", {"shape": list(shape), "dtype": str(dtype), "values": values}]:
                return self._tensor(shape, dtype, values)
            case ["tuple", list(items)]:
                return tuple(self.read(item) for item in items)
            case ["list", list(items)]:
                return [self.read(item) for item in items]
            case ["dict", list(items)]:
                return {self.read(key): self.read(item) for key, item in items}
            case ["float", str(text)]:
                return float(text)
            case ["plain", value] if type(value) in _PLAIN:
                return value
        raise ValueError(f"{str(plain)[:60]} is no example input")

    def _tensor(self, shape: list[Any], dtype: str, values: Any) -> Tensor:
        sizes = [n for n in shape if type(n) is int and 0 <= n <= MOST_ELEMENTS]
        kind = DTYPES.get(dtype)
        if len(sizes) != len(shape) or len(shape) > MOST_DIMENSIONS or kind is None:
            raise ValueError(f"no tensor has the shape {str(shape)[:60]} and the type {dtype[:20]}")
        count = 1
        for n in sizes:
            count *= n
        self.left -= count
        if self.left < 0:
            raise ValueError(f"the example inputs have more than {MOST_ELEMENTS:,} elements")
        if kind.is_floating_point or kind.is_complex:
            drawn = torch.complex64 if kind.is_complex else torch.float32
            return torch.randn(sizes, generator=self.generator, dtype=drawn).to(kind)
        if not isinstance(values, list) or not all(type(v) is int for v in values):
            raise ValueError("an example input of integers has no values")
        return torch.tensor(values, dtype=kind).reshape(sizes)
