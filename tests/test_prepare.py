"""`prepare`: what it gates, what it keeps, and what it refuses."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import dspfx
from dspfx import PrepareConfig
from dspfx.layers.gated import gated_layers
from dspfx.layers.gates import ChannelGate, FilterGate
from helpers import assert_equal, random_masks, unchanged


class Plain(nn.Module):
    """Stem, depthwise, pointwise, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 12, 1)
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.point(self.depthwise(self.stem(x)))).mean((2, 3)))


def test_gates_and_their_state() -> None:
    prepared = dspfx.prepare(Plain(), torch.randn(1, 3, 8, 8), config=PrepareConfig(groups=3))
    assert list(gated_layers(prepared)) == ["point"]
    gate = gated_layers(prepared)["point"].gate
    assert isinstance(gate, FilterGate)
    assert gate.logits.shape == (3, 12)
    assert gate.mask.shape == (12, 8)
    assert gate.mask.all()
    assert gate.input_elements == 8 * 8 * 8
    assert not list(gate.parameters())
    called = {str(n.target) for n in prepared.graph.nodes if n.op == "call_module"}
    gates = {n for n, m in prepared.named_modules() if isinstance(m, ChannelGate)}
    assert gates == {f"channel_gates.{name}" for name in ("stem_1", "depthwise", "norm")}
    assert gates <= called


def test_more_groups_than_filters() -> None:
    prepared = dspfx.prepare(Plain(), config=PrepareConfig(groups=99))
    assert gated_layers(prepared)["point"].gate.logits.shape == (12, 12)


@pytest.mark.parametrize("rule", ["conv_b", "*_b", nn.Conv1d])
def test_ignored_layers_keep_filters_and_inputs(rule: object) -> None:
    class TwoConvs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 1)
            self.conv_a = nn.Conv2d(6, 6, 1)
            self.conv_b = nn.Conv2d(6, 6, 1)
            self.conv_c = nn.Conv2d(6, 6, 1)
            self.other = nn.Conv1d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv_c(self.conv_b(self.conv_a(self.stem(x))))
            return self.other(x.flatten(2))

    prepared = dspfx.prepare(
        TwoConvs(), torch.randn(2, 3, 4, 4), config=PrepareConfig(ignore=(rule,))
    )
    frozen = "other" if rule is nn.Conv1d else "conv_b"
    assert frozen not in gated_layers(prepared)
    dspfx.set_masks(prepared, random_masks(prepared, keep=0.3, drop=0.3))
    layers = {layer.name: layer for layer in dspfx.report(prepared).layers}
    assert layers[frozen].filters == (6, 6)
    assert layers[frozen].inputs == (6, (6,))
    assert_equal(
        *(m(torch.ones(2, 3, 4, 4)) for m in (prepared.eval(), dspfx.convert(prepared))), 1e-5
    )


def test_inferred_inputs_are_reported() -> None:
    prepared = dspfx.prepare(Plain())
    assert "inferred: one tensor of shape (2, 3, 224, 224)" in str(dspfx.report(prepared))


def test_copies_and_pickles() -> None:
    model = torchvision.models.googlenet(weights=None, init_weights=False, num_classes=5)
    prepared = dspfx.prepare(model, torch.randn(2, 3, 64, 64))
    dspfx.set_masks(prepared, random_masks(prepared))
    x = torch.randn(2, 3, 64, 64)
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert isinstance(twin, dspfx.PreparedModule)
        assert list(twin.state_dict()) == list(prepared.state_dict())
        assert_equal(prepared.eval()(x), twin.eval()(x), tolerance=0)
        assert_equal(dspfx.convert(prepared)(x), dspfx.convert(twin)(x), tolerance=0)
        torch.manual_seed(1)
        expected = copy.deepcopy(prepared).train()(x)
        torch.manual_seed(1)
        actual = twin.train()(x)
        assert type(actual).__name__ == "GoogLeNetOutputs"
        assert_equal(expected, actual, tolerance=0)


def test_shared_modules_stay_shared() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.first = nn.Conv2d(4, 4, 1)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(self.stem(x)))

    prepared = dspfx.prepare(Aliased(), torch.randn(2, 3, 4, 4))
    assert prepared.first is prepared.second
    assert "second.weight" in prepared.state_dict()
    twin = copy.deepcopy(prepared)
    assert twin.first is twin.second


def test_what_is_made_in_inference_mode_is_not_bound_to_it() -> None:
    x = torch.rand(2, 3, 8, 8)
    with torch.inference_mode():
        prepared = dspfx.prepare(Plain(), x.clone())
        compact = dspfx.convert(prepared)
    prepared.train()(x).sum().backward()
    assert torch.equal(compact.double().requires_grad_()(x.double()), compact(x.double()))
    for model in (prepared, compact):
        assert not any(tensor.is_inference() for tensor in model.state_dict().values())


def test_a_model_in_either_mode_stays_in_it() -> None:
    model = torchvision.models.resnet18(weights=None)
    model.layer1.eval()
    with unchanged(model):
        prepared = dspfx.prepare(model, torch.randn(2, 3, 32, 32))
    assert prepared.training
    assert not prepared.layer1.training
    assert prepared.layer2.training
    dspfx.convert(prepared)
    assert prepared.training
    assert not prepared.layer1[0].bn1.training


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x if x.sum() > 0 else -x


class Aliases(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        z = y[:, 1:]
        z += 1  # overwrites a part of y, of which a graph says nothing
        return y


def nan_model() -> nn.Module:
    model = Plain()
    model.point.weight.data[0, 0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("model", "inputs", "error", "words"),
    [
        (
            nn.Sequential(nn.Linear(3, 4)),
            torch.randn(2, 3),
            dspfx.PrepareError,
            "no layer to prune",
        ),
        (nn.Sequential(nn.ReLU()), None, dspfx.PrepareError, "pass example_inputs"),
        (Plain(), torch.randn(2, 5, 8, 8), dspfx.PrepareError, "does not accept"),
        (Plain(), (torch.randn(2, 3, 8, 8), 1), dspfx.PrepareError, "does not accept"),
        (nan_model(), None, dspfx.PrepareError, "point.weight holds NaN"),
        (Aliases(), torch.randn(2, 3, 4, 4), dspfx.TraceError, "shares its memory"),
        (Branching(), None, dspfx.TraceError, "after node 'gt'"),
    ],
)
def test_bad_models(model: nn.Module, inputs: object, error: type[Exception], words: str) -> None:
    if "NaN" in words:
        with pytest.raises(error, match=words):
            dspfx.prepare(model, inputs)
        return
    with unchanged(model), pytest.raises(error, match=words):
        dspfx.prepare(model, inputs)


def test_lazy_modules_are_to_be_called_first() -> None:
    """Torch's own error came out of the check for NaN."""
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.LazyConv2d(4, 3))
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(dspfx.PrepareError, match=r"0\.weight has no shape yet"):
        dspfx.prepare(model, x)
    model(x)
    assert list(dspfx.get_masks(dspfx.prepare(model, x))) == ["2"]


def test_bad_settings() -> None:
    with pytest.raises(dspfx.PrepareError, match="at least 1"):
        PrepareConfig(groups=0)
    with pytest.raises(dspfx.PrepareError, match="matches no module"):
        dspfx.prepare(Plain(), config=PrepareConfig(ignore=("nothing.*",)))
    single: Any = {"ignore": "head", "layers": nn.Conv2d, "opaque": nn.ReLU}
    for name, value in single.items():
        with pytest.raises(dspfx.PrepareError, match=rf"{name}=\(('head'|Conv2d|ReLU),\)"):
            PrepareConfig(**{name: value})
    several: Any = [nn.Conv2d]
    assert PrepareConfig(layers=several) == PrepareConfig(layers=(nn.Conv2d,))
    with pytest.raises(dspfx.PrepareError, match="prepared already"):
        dspfx.prepare(dspfx.prepare(Plain()))


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(4, 4, 1),
            nn.Linear(4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x)).mean((2, 3))
        return self.head(nn.functional.dropout(x, 0.5, self.training))


def test_gates_do_not_depend_on_the_mode() -> None:
    """In training mode the last linear layer was gated where the model has a dropout."""

    for mode in (False, True):
        prepared = dspfx.prepare(Drops().train(mode), torch.randn(2, 3, 4, 4))
        assert list(gated_layers(prepared)) == ["conv"]


def test_a_forward_that_was_taken_earlier_follows_the_mode() -> None:
    """Accelerate, for one, wraps the `forward` that it finds, and calls it in both modes."""
    prepared = dspfx.prepare(Drops().train(), torch.randn(2, 3, 4, 4))
    for module in (prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        forward, x = module.forward, torch.ones(20, 3, 4, 4)
        assert list(inspect.signature(forward).parameters) == ["x"]
        assert not torch.equal(forward(x), forward(x))
        module.eval()
        assert torch.equal(forward(x), forward(x))
        assert torch.equal(forward(x), module(x))
        module.train()
        assert not torch.equal(forward(x), forward(x))
