"""Whole networks of torchvision, at small image sizes, in float64."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision_networks import network

import dspfx
from helpers import assert_equal, macs, random_masks, randomise, unchanged

# the smallest sizes of which 2x2 pixels are left where the network is deepest
NETWORKS = {
    "resnet18": 33,
    "resnet50": 33,
    "vgg11_bn": 32,
    "mobilenet_v2": 33,
    "mobilenet_v3_small": 33,
    "densenet": 64,
    "squeezenet1_1": 40,
    "googlenet": 48,
    "efficientnet_b0": 33,
    "regnet_y": 33,
    "shufflenet_v2_x0_5": 33,
}


def build(name: str) -> nn.Module:
    settings = {"init_weights": False} if name == "googlenet" else {}
    model: Any = network(name, num_classes=10, **settings)
    if name == "vgg11_bn":  # 120 of its 129 million weights are in two layers of 4096 neurons
        model.classifier[0], model.classifier[3] = nn.Linear(512 * 7 * 7, 64), nn.Linear(64, 64)
        model.classifier[6] = nn.Linear(64, 10)
    return randomise(model).double()


@pytest.mark.parametrize("name", NETWORKS)
def test_same_bits_unpruned_and_equal_with_random_group_masks_at_half(name: str) -> None:
    model = build(name)
    x = torch.randn(2, 3, NETWORKS[name], NETWORKS[name], dtype=torch.float64)
    with unchanged(model):
        prepared = dspfx.prepare(model, x, config=dspfx.PrepareConfig(groups=3))
    assert list(model.state_dict()) == [k for k in prepared.state_dict() if "gate" not in k]
    assert_computes_the_same_bits(model, prepared, x)
    dense = macs(model.eval(), x)
    assert dspfx.report(prepared).before.macs == dense
    with torch.no_grad():
        dspfx.set_masks(prepared, random_masks(prepared))
        compact = dspfx.convert(prepared, cost_model=dspfx.FEWEST_WEIGHTS)
        assert_equal(prepared.eval()(x), compact(x))
    kept = macs(compact, x)
    assert kept <= dspfx.report(compact).after.macs < dense
    likely = dspfx.convert(prepared)
    assert_equal(prepared(x), likely(x))
    assert dspfx.report(likely).after == dspfx.report(compact).after
    assert macs(likely, x) <= dspfx.report(likely).emitted.macs
    assert kept < 0.72 * dense
    assert dspfx.report(compact).declined == ()


def assert_computes_the_same_bits(model: nn.Module, prepared: nn.Module, x: torch.Tensor) -> None:
    """In both modes; and training leaves the same statistics."""
    for mode in (False, True):
        torch.manual_seed(0)
        expected = model.train(mode)(x)
        torch.manual_seed(0)
        assert_equal(expected, prepared.train(mode)(x), tolerance=0)
    for (key, mine), theirs in zip(
        model.state_dict().items(),
        [v for k, v in prepared.state_dict().items() if "gate" not in k],
        strict=True,
    ):
        assert torch.equal(mine, theirs), key
