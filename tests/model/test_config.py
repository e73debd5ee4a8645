"""`PrepareConfig`: rules for operators, opaque modules, types of layers, and what it refuses."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from unusual import RULES, Squash, Unusual

import dspfx
from dspfx import PrepareConfig
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, random_masks, randomise

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def declined(model: nn.Module) -> set[str]:
    return {d.reason for d in dspfx.report(model).declined}


def converted(prepared: nn.Module) -> nn.Module:
    with torch.no_grad():
        dspfx.set_masks(prepared, random_masks(prepared, keep=0.4, drop=0.3))
        compact = dspfx.convert(prepared)
        assert_equal(prepared(X), compact(X))
    return compact


def test_rules_teach_the_analysis() -> None:
    model = randomise(Unusual()).double().eval()
    untaught = dspfx.prepare(model, X)
    assert len(declined(untaught)) == 2  # what follows an opaque operator loses nothing more
    taught = dspfx.prepare(model, X, config=PrepareConfig(rules=RULES))
    assert declined(taught) == set()
    widths = {layer.name: layer.free for layer in dspfx.report(taught).layers}
    assert widths == {"stem": 6, "a": 8, "b": 6, "head": 0}
    assert [layer.free for layer in dspfx.report(untaught).layers] == [6, 0, 0, 0]
    small, large = (dspfx.report(converted(p)).after.macs for p in (taught, untaught))
    assert small < large
    for twin in (copy.deepcopy(taught), pickle.loads(pickle.dumps(taught))):
        assert declined(twin) == set()


def test_a_wrong_rule_is_found_out() -> None:
    """`convert` proves equality, whatever the analysis was told."""

    class Softmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = (nn.Conv2d(c, 6, 1) for c in (3, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.softmax(self.a(self.stem(x)), 1))

    config = PrepareConfig(rules={torch.softmax: "channelwise"})
    prepared = dspfx.prepare(randomise(Softmax()).double(), X, config=config)
    b = torch.ones(6, 6, dtype=torch.bool)
    b[:, :3] = False  # half of the channels are read by nobody, but they share a sum
    dspfx.set_masks(prepared, {"b": b})
    with pytest.raises(dspfx.EquivalenceError, match="softmax"):
        dspfx.convert(prepared)


@pytest.mark.parametrize("pattern", ["squash", "sq*", Squash])
def test_opaque_modules_are_not_entered(pattern: Any) -> None:
    model = randomise(Unusual()).double().eval()
    rules = {key: rule for key, rule in RULES.items() if key is not Squash}
    prepared = dspfx.prepare(model, X, config=PrepareConfig(opaque=(pattern,), rules=rules))
    assert "Squash is not known to keep channels apart" in declined(prepared)
    assert any("squash" in str(n.target) for n in prepared.graph.nodes if n.op == "call_module")
    converted(prepared)


def test_only_the_layers_asked_for_get_gates() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(144, 6), nn.Linear(6, 2)
    )
    every = dspfx.prepare(model.double(), X)
    assert list(gated_layers(every)) == ["1", "3"]
    only = dspfx.prepare(model, X, config=PrepareConfig(layers=(nn.Conv2d,)))
    assert list(gated_layers(only)) == ["1"]
    reasons = {layer.name: layer.why_not for layer in dspfx.report(only).layers}
    assert reasons == {
        "0": "it reads the model's inputs",
        "1": "",
        "3": "gates for Linear were not asked for",
        "4": "it is the last linear layer",
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"groups": 0}, "at least 1"),
        ({"round_to": 0}, "at least 1"),
        ({"round_to": 1.5}, "whole numbers"),
        ({"groups": "2"}, "whole numbers"),
        ({"layers": (nn.BatchNorm2d,)}, "cannot be gated"),
        ({"rules": {torch.sinc: "harmless"}}, "must be one of elementwise, channelwise"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(dspfx.PrepareError, match=words):
        PrepareConfig(**settings)


@pytest.mark.parametrize("option", ["ignore", "opaque"])
def test_patterns_that_match_nothing(option: str) -> None:
    with pytest.raises(dspfx.PrepareError, match=rf"{option}='nothing\.\*' matches no module"):
        dspfx.prepare(Unusual(), config=PrepareConfig(**{option: ("nothing.*",)}))


def test_what_pins_a_layer_is_named_with_its_line_of_source() -> None:
    report = dspfx.report(dspfx.prepare(randomise(Unusual()).double(), X))
    layers = {layer.name: layer for layer in report.layers}
    pin = layers["a"].pin
    assert pin is not None
    assert pin.reason == "sinc is not known to keep channels apart"
    assert pin.line.startswith("unusual.py:")
    assert pin.line.endswith("torch.special.expit(torch.sinc(self.a(self.stem(x))))")
    assert "0 of 8" in str(report)
    assert "".join(pin.line.split()) in "".join(str(report).split())  # wrapped
    assert layers["head"].pin is not None
    assert layers["head"].pin.reason == "the model's output"


def test_coupled_layers_are_named() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.b, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.b(self.a(x).relu()))

    report = dspfx.report(dspfx.prepare(Residual().double(), X))
    coupled = {layer.name: layer.coupled for layer in report.layers}
    assert coupled == {"stem": ("b",), "a": (), "b": ("stem",), "head": ()}
