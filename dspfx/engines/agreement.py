"""How far outputs agree: by what they decide, and by their largest difference."""

import math
from typing import Any

import torch
from torch import Tensor

from dspfx.utils.pytree import leaves


def worst_difference(expected: Any, found: Any) -> float:
    """The largest difference between two outputs, relative to each tensor's largest value.

    Infinite where shapes, finite elements or anything that is no floating-point tensor differ.
    """
    pairs = _pairs(expected, found)
    return math.inf if pairs is None else max((_difference(a, b) for a, b in pairs), default=0.0)


def agreement(expected: Any, found: Any) -> float:
    """The share of decisions that are the same in two outputs; 0 where their shapes differ.

    Of a tensor `[N, K, ...]` with K > 1 a decision is the largest of the K for each sample and
    position. Of others, whose numbers decide nothing by themselves, it is one less their relative
    L2 distance. Of several tensors the least counts.
    """
    pairs = _pairs(expected, found)
    return 0.0 if pairs is None else min((_agreement(a, b) for a, b in pairs), default=1.0)


def _pairs(expected: Any, found: Any) -> list[tuple[Tensor, Tensor]] | None:
    """The floating-point tensors side by side; None where anything else differs."""
    one, other = list(leaves(expected)), list(leaves(found))
    if len(one) != len(other):
        return None
    pairs = []
    for a, b in zip(one, other, strict=True):
        if not isinstance(a, Tensor):
            if a is not b and a != b:
                return None
            continue
        if not isinstance(b, Tensor) or a.shape != b.shape:
            return None
        if a.is_floating_point():
            pairs.append((a.double(), b.double()))
        elif not torch.equal(a, b):
            return None
    return pairs


def _difference(a: Tensor, b: Tensor) -> float:
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return math.inf
    a, b = a[finite], b[finite]
    return float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) if len(a) else 0.0


def _agreement(a: Tensor, b: Tensor) -> float:
    if a.dim() > 1 and a.shape[1] > 1:
        return float((a.argmax(1) == b.argmax(1)).double().mean())
    return max(0.0, 1.0 - float((a - b).norm() / a.norm().clamp_min(1e-30)))
