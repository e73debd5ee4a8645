"""Whole networks of torchvision, at small image sizes, in float64."""

import pytest
import torch
import torchvision
from torch import nn

import dspfx
from helpers import assert_equal, macs, random_masks, randomise, unchanged

NETWORKS = {
    "resnet18": 64,
    "resnet50": 64,
    "vgg11_bn": 32,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "densenet121": 64,
    "squeezenet1_1": 64,
    "googlenet": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "shufflenet_v2_x0_5": 64,
}


def build(name: str) -> nn.Module:
    settings = {"init_weights": False} if name == "googlenet" else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=10, **settings)
    if name == "vgg11_bn":  # 120 of its 129 million weights are in two layers of 4096 neurons
        model.classifier[0], model.classifier[3] = nn.Linear(512 * 7 * 7, 64), nn.Linear(64, 64)
        model.classifier[6] = nn.Linear(64, 10)
    return randomise(model).double()


@pytest.mark.parametrize("name", NETWORKS)
def test_random_group_masks_at_half(name: str) -> None:
    model = build(name)
    x = torch.randn(2, 3, NETWORKS[name], NETWORKS[name], dtype=torch.float64)
    with unchanged(model):
        prepared = dspfx.prepare(model, x, config=dspfx.PrepareConfig(groups=3))
    assert list(model.state_dict()) == [k for k in prepared.state_dict() if "gate" not in k]
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


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "mobilenet_v3_small", "densenet121"])
def test_an_unpruned_model_computes_the_same_bits(name: str) -> None:
    model = build(name)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    prepared = dspfx.prepare(model, x)
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
