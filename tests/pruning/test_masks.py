"""`set_masks`, `get_masks`, and that dead means zero while training goes on."""

import copy
import functools
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, random_masks, unchanged


def prepared_resnet() -> dspfx.PreparedModule:
    prepared = copy.deepcopy(_prepared_resnet())
    torch.manual_seed(0)
    return prepared


@functools.cache
def _prepared_resnet() -> dspfx.PreparedModule:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, num_classes=5)
    return dspfx.prepare(model, torch.randn(2, 3, 32, 32))


def test_masks_come_back_with_their_consequences() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.a = nn.Conv2d(4, 4, 1)
            self.b = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(self.stem(x))))

    prepared = dspfx.prepare(Chain(), torch.randn(2, 3, 4, 4))
    a = torch.ones(4, 4, dtype=torch.bool)
    a[1] = False  # filter 1 is dead,
    b = torch.zeros(4, 4, dtype=torch.bool)
    b[0, 1] = True  # so filter 0 of b, which reads nothing else, is dead too
    b[1:, 2] = True
    dspfx.set_masks(prepared, {"a": a, "b": b})
    masks = dspfx.get_masks(prepared)
    assert torch.equal(masks["a"], a)
    assert not masks["b"][0].any()
    assert torch.equal(masks["b"][1:], b[1:])
    assert not prepared(torch.randn(2, 3, 4, 4))[:, 0].any()
    dspfx.set_masks(prepared, masks)
    assert all(torch.equal(masks[k], v) for k, v in dspfx.get_masks(prepared).items())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_masked_weights_have_no_effect_while_fine_tuning(kind: Any) -> None:
    prepared = prepared_resnet().train()
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.2))
    settings = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(prepared.parameters(), lr=0.01, weight_decay=1e-3, **settings)
    # poisoned on purpose: momentum and decay alone would already move masked weights
    for layer in gated_layers(prepared).values():
        layer.weight.data[~layer.gate.mask] = 1.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x = torch.randn(8, 3, 32, 32, generator=generator)
        y = torch.randint(5, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(prepared(x), y).backward()
        optimizer.step()
    x = torch.randn(4, 3, 32, 32)
    compact = dspfx.convert(prepared)
    with torch.no_grad():
        expected = prepared.eval()(x)
        for layer in gated_layers(prepared).values():
            layer.weight.data[~layer.gate.mask] = float("nan")
        assert_equal(expected, prepared(x), tolerance=0)
        assert_equal(expected, compact(x), tolerance=1e-4)


def test_masks_travel_with_the_state() -> None:
    prepared, other = prepared_resnet().eval(), prepared_resnet().eval()
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    other.load_state_dict(prepared.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert_equal(prepared(x), other(x), tolerance=0)
    assert dspfx.report(other).after == dspfx.report(prepared).after


def test_given_masks_set_the_groups() -> None:
    prepared = prepared_resnet()
    masks = random_masks(prepared)
    dspfx.set_masks(prepared, masks)
    for name, layer in gated_layers(prepared).items():
        for group in layer.gate.assignment.unique():
            rows = masks[name][layer.gate.assignment == group]
            assert len(rows.unique(dim=0)) == 1


NAME = "layer1.0.conv1"


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ({"nowhere": torch.ones(1, 1, dtype=torch.bool)}, "'nowhere' is no gated layer"),
        ({"conv1": torch.ones(64, 3, dtype=torch.bool)}, "'conv1' is no gated layer"),
        ({NAME: torch.ones(64, 63, dtype=torch.bool)}, r"shape \(64, 63\).*\(64, 64\)"),
        ({NAME: torch.ones(64, 64)}, "bool tensor"),
        (None, "must be a dict"),
        ({NAME: torch.eye(64, dtype=torch.bool)}, "64 groups.*prepared for 4"),
        ({NAME: torch.zeros(64, 64, dtype=torch.bool), "x": torch.ones(1)}, "no gated layer"),
    ],
)
def test_bad_masks_change_nothing(masks: Any, words: str) -> None:
    prepared = prepared_resnet()
    with unchanged(prepared), pytest.raises(dspfx.MaskError, match=words):
        dspfx.set_masks(prepared, masks)


def test_what_was_never_prepared() -> None:
    model: Any = torchvision.models.resnet18(weights=None)
    for call in (dspfx.get_masks, dspfx.convert, lambda m: dspfx.set_masks(m, {})):
        with unchanged(model), pytest.raises(dspfx.ConvertError, match="never prepared"):
            call(model)
    with pytest.raises(dspfx.ConvertError, match="never prepared"):
        dspfx.report(model)
    with pytest.raises(dspfx.ConvertError, match="never prepared"):
        dspfx.prune(model, dspfx.Budget(macs=0.5))
