"""Weights seen as filters, and that every kind of layer learns like the convolution it equals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from dspfx.layers.weights import as_weight, filters_first
from helpers import assert_equal


@settings(deadline=None, max_examples=40)
@given(
    groups=st.integers(1, 3),
    outs=st.integers(1, 3),
    ins=st.integers(1, 3),
    rank=st.integers(1, 3),
)
def test_a_filter_is_what_makes_one_output_of_some_inputs(
    groups: int, outs: int, ins: int, rank: int
) -> None:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
    layer = kind(groups * ins, groups * outs, 2, 2, groups=groups, bias=False).double()
    filters = filters_first(layer)
    assert filters.shape == (groups * outs, ins, *[2] * rank)
    assert torch.equal(as_weight(layer, filters), layer.weight)
    x = torch.randn(1, groups * ins, *[3] * rank, dtype=torch.float64)
    for o in range(groups * outs):
        for c in range(ins):
            only = torch.zeros_like(filters)
            only[o, c] = filters[o, c]
            alone = kind(groups * ins, groups * outs, 2, 2, groups=groups, bias=False).double()
            with torch.no_grad():
                alone.weight.copy_(as_weight(alone, only))
                y = alone(x)
                first = o // outs * ins
                silent = x.clone()
                silent[:, first + c] = 0
                made = y.abs().amax([0, *range(2, y.dim())]) > 0
                assert made.nonzero().flatten().tolist() == [o]
                assert not alone(silent).any()


class Equivalent(nn.Module):
    """Three 1x1 layers; the middle one is a convolution, written in one of three ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.out = nn.Conv2d(3, 6, 1), nn.Conv2d(8, 2, 1)
        made = {
            "conv": nn.Conv2d(6, 8, 1),
            "transposed": nn.ConvTranspose2d(6, 8, 1),
            "linear": nn.Linear(6, 8),
        }
        self.middle = made[kind]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        if self.kind == "linear":
            x = self.middle(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            x = self.middle(x)
        return self.out(x.tanh())


@pytest.mark.parametrize("kind", ["transposed", "linear"])
def test_learns_and_prunes_like_the_convolution_that_it_equals(kind: str) -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    torch.manual_seed(1)
    conv, other = Equivalent("conv").double(), Equivalent(kind).double()
    with torch.no_grad():
        for name in ("stem", "out"):
            other.get_submodule(name).load_state_dict(conv.get_submodule(name).state_dict())
        other.middle.bias.copy_(conv.middle.bias)
        filters = conv.middle.weight if kind == "transposed" else conv.middle.weight[:, :, 0, 0]
        other.middle.weight.copy_(as_weight(other.middle, filters))
    results = []
    for model in (conv, other):
        config = dspfx.PrepareConfig(groups=2)
        prepared = dspfx.prepare(model, x, config=config)
        assert set(gated_layers(prepared)) == {"middle", "out"}
        optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(2)
        learner = dspfx.GroupLearner(
            prepared, optimizer, 0.05, total_steps=20, logits_lr=0.1, generator=generator
        )
        for _ in range(20):
            learner.step(lambda p=prepared: (p(x) - x[:, :2]).square().mean())
        dspfx.prune(prepared, dspfx.Budget(macs=0.7))
        layer = prepared.get_submodule("middle")
        compact = dspfx.convert(prepared)
        assert_equal(prepared.eval()(x), compact(x))
        results.append((filters_first(layer).reshape(8, 6), layer.gate.logits, compact(x)))
        masks = dspfx.get_masks(prepared)["middle"]
        assert not masks.all()
        results[-1] += (masks.double(),)
    assert_equal(*results, 1e-9)
