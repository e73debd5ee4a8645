"""Models that magnify rounding errors: a difference that may be one of them is called so."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dspfx
from helpers import random_masks, randomise

MM = "use_mm_for_euclid_dist"


def distances(x: Tensor) -> Tensor:
    rows = x.flatten(2).transpose(1, 2)
    return torch.cdist(rows, rows, compute_mode=MM)


def spread(x: Tensor) -> Tensor:
    """The root of a variance that is zero but for rounding."""
    rows = x.sum((2, 3))
    square = (rows * rows).sum(1)
    return (square - torch.linalg.vector_norm(rows, dim=1).square()).abs().sqrt()


def exact(x: Tensor) -> Tensor:
    rows = x.flatten(2).transpose(1, 2)
    return torch.cdist(rows, rows, compute_mode=f"donot_{MM}")


class Net(nn.Module):
    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.end = end
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 48, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(48, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 16, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(x))


def masked(end: Callable[[Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    model = randomise(Net(end)).double().eval()
    prepared = dspfx.prepare(model, torch.randn(2, 3, 12, 12, dtype=torch.float64))
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    return prepared


@pytest.mark.parametrize("end", [distances, spread])
def test_roots_of_rounding_errors(end: Callable[[Tensor], Tensor]) -> None:
    prepared = masked(end)
    with pytest.raises(dspfx.EquivalenceError, match="magnifies rounding errors"):
        dspfx.convert(prepared)
    dspfx.convert(prepared, verify=False)


def test_the_way_out_that_is_named() -> None:
    prepared = masked(exact)
    x = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(dspfx.convert(prepared)(x), prepared.eval()(x))


def test_other_differences_are_not_called_so() -> None:
    """A forward hook is not called by a compact layer."""
    prepared = masked(exact)
    prepared.get_submodule("body.3").register_forward_hook(lambda *given: given[-1] * 1.001)
    with pytest.raises(dspfx.EquivalenceError, match="If that layer has no forward hook"):
        dspfx.convert(prepared)
