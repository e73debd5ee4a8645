"""The regulariser against plain loops and finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from penalties import central_difference, plain_penalty
from torch import Tensor, nn

import dspfx
from dspfx.layers.weights import energy
from dspfx.training.groups.penalty import LayerPenalty


def draw_layer(seed: int, groups: int, filters: int, channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(filters, channels, 3, dtype=torch.float64, generator=generator)
    logits = torch.randn(groups, filters, dtype=torch.float64, generator=generator)
    return weight, logits.softmax(0)


SIZES = {
    "seed": st.integers(0, 999),
    "groups": st.integers(1, 4),
    "half": st.integers(1, 3),
    "channels": st.integers(1, 4),
    "structural": st.integers(1, 2),
}


@settings(deadline=None, max_examples=40)
@given(**SIZES)
def test_value_and_slope(seed: int, groups: int, half: int, channels: int, structural: int) -> None:
    weight, p = draw_layer(seed, groups, 2 * half, channels)
    penalty = LayerPenalty(0.7, structural)
    expected = plain_penalty(weight, p, 0.7, structural)
    torch.testing.assert_close(
        penalty(energy(weight), p), torch.tensor(expected, dtype=torch.float64)
    )
    slope = 2 * weight * penalty.slope(energy(weight), p)[:, :, None]
    numeric = central_difference(lambda w: plain_penalty(w, p, 0.7, structural), weight)
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=40)
@given(**SIZES)
def test_equivariance(seed: int, groups: int, half: int, channels: int, structural: int) -> None:
    weight, p = draw_layer(seed, groups, 2 * half, channels)
    penalty = LayerPenalty(1.0, structural)
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.arange(2 * half).chunk(structural)  # filters move within their structural group
    order = torch.cat([b[torch.randperm(len(b), generator=generator)] for b in blocks])
    group_order = torch.randperm(groups, generator=generator)
    e = energy(weight)
    torch.testing.assert_close(penalty(e, p), penalty(e[order], p[:, order]))
    torch.testing.assert_close(penalty(e, p), penalty(e, p[group_order]))
    torch.testing.assert_close(penalty.slope(e, p)[order], penalty.slope(e[order], p[:, order]))


def test_zero_weights_and_hard_assignments_have_finite_slopes() -> None:
    weight, _ = draw_layer(0, 2, 4, 3)
    weight[:, 1] = 0
    weight[2] = 0
    hard = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.float64)
    penalty = LayerPenalty(1.0)
    e = energy(weight)
    assert torch.isfinite(penalty.slope(e, hard)).all()
    soft = hard.clamp(min=torch.finfo(torch.float64).tiny)
    gradient = penalty.assignment_gradient(soft, e, e, torch.zeros_like(e))
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiny_weights_and_empty_groups_have_finite_derivatives(dtype: torch.dtype) -> None:
    """Not only zero: 1 / N^2 of the second order overflows long before N underflows."""
    weight, _ = draw_layer(0, 2, 4, 3)
    smallest = torch.finfo(dtype).tiny
    penalty = LayerPenalty(1.0)
    for fraction in torch.linspace(0, 1, 41).tolist():
        small = smallest**fraction
        share = torch.tensor([[0.5] * 4, [0.5] * 4], dtype=dtype)
        empty = torch.tensor([[1.0] * 4, [small] * 4], dtype=dtype)
        for scale, p in [(small, share), (1.0, empty), (small**0.5, empty)]:
            w = (weight * scale).to(dtype)
            step = 2 * energy(w, torch.ones_like(w))
            assert torch.isfinite(penalty.slope(energy(w), p)).all()
            gradient = penalty.assignment_gradient(p, energy(w), energy(w), step)
            assert torch.isfinite(gradient).all()


def test_kappa() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3))
    prepared = dspfx.prepare(model, torch.randn(2, 3, 6, 7), config=dspfx.PrepareConfig(groups=2))
    layer = prepared.get_submodule("1")
    expected = (8 * 6 * 7 / 16384) ** 0.5 * 3 * (2 / 4) ** 1.5
    assert abs(LayerPenalty.of(layer).kappa - expected) < 1e-12
