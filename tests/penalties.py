"""The regulariser by plain loops, and its finite differences."""

from collections.abc import Callable

import torch
from torch import Tensor


def plain_penalty(weight: Tensor, p: Tensor, kappa: float, structural: int = 1) -> float:
    """R as the paper writes it, in loops."""
    filters, channels = weight.shape[:2]
    total = 0.0
    for g in range(len(p)):
        size = sum(float(p[g, o]) ** 0.5 for o in range(filters)) ** 2
        for s in range(structural):
            members = range(s * filters // structural, (s + 1) * filters // structural)
            for c in range(channels):
                square = sum(float((p[g, o] * weight[o, c]).square().sum()) for o in members)
                total += kappa * size * square**0.5
    return total


def central_difference(
    function: Callable[[Tensor], float], at: Tensor, width: float = 1e-5
) -> Tensor:
    """Numerical derivative of a scalar function, entry by entry."""
    slope = torch.zeros_like(at)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in at.shape]).tolist():
        up, down = at.clone(), at.clone()
        up[tuple(index)] += width
        down[tuple(index)] -= width
        slope[tuple(index)] = (function(up) - function(down)) / (2 * width)
    return slope
