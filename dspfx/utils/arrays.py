"""Types and small functions of NumPy arrays."""

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


def any_along(array: BoolArray, axis: int) -> BoolArray:
    """`array.any(axis)`, which numpy types as possibly a scalar."""
    result: BoolArray = np.logical_or.reduce(array, axis=axis)
    return result


def is_run(numbers: IntArray) -> bool:
    """Whether `numbers` are consecutive and ascending, from 0 or more."""
    return len(numbers) > 0 and numbers[0] >= 0 and bool((np.diff(numbers) == 1).all())


def equal_rows(rows: BoolArray) -> tuple[IntArray, BoolArray]:
    """Group equal rows: int `[N]`, the group of every row, and bool `[R, C]`, the row of each.

    Groups are numbered in the order in which they first occur.

    Args:
        rows: bool `[N, C]`.
    """
    number: dict[bytes, int] = {}  # hashing rows is far faster than sorting them
    packed = np.packbits(rows, axis=1)
    group = np.array([number.setdefault(row.tobytes(), len(number)) for row in packed], np.int64)
    return group, rows[np.unique(group, return_index=True)[1]]
