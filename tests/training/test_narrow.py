"""`narrow` and `widen`: the living part of a pruned model is trained, and put back."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from test_properties import COST_MODELS, COUNT, EXAMPLES, inputs, prepare
from torch import Tensor, nn

import dspfx
from dspfx.layers.parametrised import is_computed
from dspfx.model.tensors import named_tensors
from helpers import assert_equal, random_masks, randomise, unchanged
from random_networks import MaskRecipe, Mirrored, Twice, mask_recipes, networks


@settings(EXAMPLES, max_examples=COUNT // 8)
@given(
    model=networks(),
    recipe=mask_recipes(),
    groups=st.integers(1, 4),
    cost_model=st.sampled_from(COST_MODELS),
)
def test_a_step_is_that_of_the_masked_model(
    model: nn.Module, recipe: MaskRecipe, groups: int, cost_model: dspfx.CostModel
) -> None:
    prepared = prepare(randomise(model), groups)
    if prepared is None:
        return
    dspfx.set_masks(prepared, recipe.masks(prepared))
    masked = copy.deepcopy(prepared.train())
    with unchanged(prepared):
        try:
            narrow = dspfx.narrow(prepared, cost_model=cost_model)
        except dspfx.NarrowError as error:
            twice = any(isinstance(m, Twice | Mirrored) for m in model.modules())
            if twice and "used more than once" in str(error):
                return  # different channels are dead in the two calls
            if any(map(is_computed, model.modules())) and "computed from others" in str(error):
                return  # a weight norm depends on weights that are masked
            raise
    assert_a_step_is_the_same(masked, narrow, inputs(model, 1))
    dspfx.widen(narrow, prepared)
    x = inputs(model, 2)
    with torch.no_grad():
        assert_equal(masked.eval()(x), prepared.eval()(x), tolerance=1e-7)
        assert_equal(narrow.eval()(x), prepared(x))
        dspfx.convert(prepared)


def assert_a_step_is_the_same(masked: nn.Module, narrow: nn.Module, x: Tensor) -> None:
    """Outputs, gradients and what a step of SGD makes of the weights and the statistics."""
    for model in (masked, narrow):
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-3)
        torch.manual_seed(0)
        first(model(x)).square().mean().backward()
        optimizer.step()
    wide, own = named_tensors(masked), named_tensors(narrow)
    assert narrow.origins
    for name, found in narrow.origins.items():
        source = wide[found.source]
        pairs = [(source, own[name])]
        if source.grad is not None:
            pairs += [(source.grad, own[name].grad)]
        for expected, actual in pairs:
            expected, actual = expected.flatten()[found.places[found.real]], actual[found.real]
            assert torch.allclose(expected, actual, rtol=1e-7, atol=1e-9), name


def first(output: Tensor | dict[str, Tensor]) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output.values()))


class Stochastic(nn.Module):
    """Dropout by a function, and a scale that is a plain parameter, as in many networks of timm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.gamma = nn.Parameter(torch.rand(width))
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.conv(x) * self.gamma.reshape(1, -1, 1, 1)
        return self.fc(F.dropout(x.mean((2, 3)), 0.5, self.training))


def pruned(model: nn.Module, keep: float = 0.5, drop: float = 0.3) -> dspfx.PreparedModule:
    prepared = dspfx.prepare(randomise(model).double(), images(2))
    dspfx.set_masks(prepared, random_masks(prepared, keep=keep, drop=drop))
    return prepared.train()


def images(count: int, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, size, size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_networks_of_torchvision(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # of fewer channels, it draws other numbers
    prepared = pruned(model)
    masked, narrow = copy.deepcopy(prepared), dspfx.narrow(prepared)
    assert count(narrow) < count(prepared) / 1.3
    assert_a_step_is_the_same(masked, narrow, images(4))
    dspfx.widen(narrow, prepared)
    x = images(3)
    assert_equal(narrow.eval()(x), prepared.eval()(x))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_random_functions_know_the_mode() -> None:
    narrow = dspfx.narrow(pruned(Stochastic()))
    x = images(4)
    assert narrow.training
    assert not torch.equal(narrow(x), narrow(x))
    assert torch.equal(narrow.eval()(x), narrow(x))
    assert not torch.equal(narrow.train()(x), narrow(x))


def test_plain_parameters_learn() -> None:
    prepared = pruned(Stochastic())
    before = prepared.gamma.detach().clone()
    narrow = dspfx.narrow(prepared)
    train(narrow)
    dspfx.widen(narrow, prepared)
    moved = prepared.gamma != before
    assert moved.any()
    assert torch.equal(moved, prepared.conv.gate.alive)


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(images(4 + step)).square().mean().backward()
        optimizer.step()


def test_frozen_weights_stay_frozen() -> None:
    prepared = pruned(Stochastic())
    prepared.conv.weight.requires_grad_(False)
    narrow = dspfx.narrow(prepared)
    before = prepared.conv.weight.detach().clone()
    train(narrow)
    dspfx.widen(narrow, prepared)
    assert torch.equal(prepared.conv.weight, before)
    frozen = [name for name, p in narrow.named_parameters() if not p.requires_grad]
    assert frozen == [name for name, own in narrow.origins.items() if own.source == "conv.weight"]


def test_what_fills_a_layer_up_stays_zero() -> None:
    prepared = pruned(torchvision.models.resnet18(num_classes=5))
    dense_only = dspfx.CostModel(call=1, mac=0, copy=0, gather=0, vector=1)
    narrow = dspfx.narrow(prepared, cost_model=dense_only)
    train(narrow, steps=3)
    dspfx.widen(narrow, prepared)
    x = images(3)
    assert_equal(narrow.eval()(x), prepared.eval()(x))
    assert_equal(prepared(x), dspfx.convert(prepared)(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_as_good(copied: Callable[[nn.Module], nn.Module]) -> None:
    prepared = pruned(Stochastic())
    narrow = copied(dspfx.narrow(prepared))
    train(narrow)
    dspfx.widen(narrow, prepared)
    x = images(3)
    assert_equal(narrow.eval()(x), prepared.eval()(x))


def test_a_run_is_resumed() -> None:
    prepared = pruned(Stochastic())
    narrow = dspfx.narrow(prepared)
    train(narrow)
    again = dspfx.narrow(prepared)
    again.load_state_dict(narrow.state_dict())
    assert torch.equal(again.eval()(images(3)), narrow.eval()(images(3)))


class InParts(nn.Module):
    """How often it calls its body depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 4, 3, padding=1),),
        )
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        if y.mean() > 1e9:
            y = y * 2
        return y.mean((2, 3)) + self.shift


def test_a_model_in_parts() -> None:
    prepared = dspfx.prepare(randomise(InParts()).double(), images(2))
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    prepared.train()
    with unchanged(prepared):
        narrow = dspfx.narrow(prepared)
        train(narrow)
    assert isinstance(narrow.body, dspfx.NarrowModule)
    dspfx.widen(narrow, prepared)
    assert prepared.shift.any()
    assert_equal(narrow.eval()(images(3)), prepared.eval()(images(3)))


def test_every_module_keeps_its_mode() -> None:
    """Frozen norms stay frozen, within parts and without."""
    prepared = pruned(Stochastic())
    prepared.norm.eval()
    before = prepared.norm.running_mean.clone()
    narrow = dspfx.narrow(prepared)
    assert narrow.training
    assert not narrow.norm.training
    train(narrow)
    dspfx.widen(narrow, prepared)
    assert torch.equal(prepared.norm.running_mean, before)
    in_parts = dspfx.prepare(randomise(InParts()).double(), images(2)).train()
    in_parts.body.eval()
    narrow = dspfx.narrow(in_parts)
    assert narrow.training
    assert not narrow.body.training


class Scalar(Stochastic):
    """A scale without dimensions, a table that is read in two shapes, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x - self.mean.view(1, -1, 1, 1))))
        x = x + self.conv(x) * self.alpha
        return self.fc(x.mean((2, 3)))


def test_scalars_and_constants() -> None:
    prepared = pruned(Scalar())
    narrow = dspfx.narrow(prepared)
    assert_a_step_is_the_same(copy.deepcopy(prepared), narrow, images(4))
    dspfx.widen(narrow, prepared)
    assert prepared.alpha.item() != 1.5


class Shapes(Stochastic):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = (x + self.conv(x)) * self.gamma.reshape(1, -1, 1, 1)
        return self.fc(x.mean((2, 3)) * self.gamma)


class Complex(Stochastic):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.randn(8, 1, 1, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.conv(x) + torch.view_as_real(x * self.turn)[..., 0]
        return self.fc(x.mean((2, 3)))


class Shifted(Stochastic):
    """What is dead in evaluation is not in training."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(torch.relu(self.norm(self.stem(x))))
        return self.fc((x + (0.5 if self.training else 0.0)).mean((2, 3)))


class Repeated(nn.Module):
    """Calls a layer and its norm, with a state, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_a_module_that_is_called_twice_has_one_state() -> None:
    """Also after a conversion, which takes buffers one by one."""
    prepared = dspfx.prepare(randomise(Repeated()).double(), images(2)).train()
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[:4, :2] = mask[4:, 6:] = False
    dspfx.set_masks(prepared, {"conv": mask})
    masked, narrow = copy.deepcopy(prepared), dspfx.narrow(prepared)
    assert_a_step_is_the_same(masked, narrow.float().double(), images(4))
    assert sum(isinstance(m, nn.BatchNorm2d) for m in narrow.modules()) == 1


class Towers(nn.Module):
    """One norm for two streams, of a trunk for both or of a tower for each."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = self.left if shared else nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.body = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.late, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def features(self, x: Tensor, first: nn.Module) -> Tensor:
        return self.late(self.body(F.silu(self.norm(first(x))))).relu().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.features(x, self.left), self.features(x.flip(3), self.right)
        return self.fc((left - right).abs())


@pytest.mark.parametrize("shared", [True, False])
def test_a_norm_of_two_streams_is_as_narrow_as_they_are(shared: bool) -> None:
    prepared = dspfx.prepare(randomise(Towers(shared)).double(), images(2)).train()
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[:, 1:4] = mask[6] = False
    dspfx.set_masks(prepared, {"body": mask})
    masked, narrow = copy.deepcopy(prepared), dspfx.narrow(prepared)
    assert_a_step_is_the_same(masked, narrow, images(4))
    assert (narrow.norm.num_features, narrow.late.num_features) == (5, 7)
    dspfx.widen(narrow, prepared)
    with torch.no_grad():
        assert_equal(masked.eval()(images(2)), prepared.eval()(images(2)), tolerance=1e-7)
        assert_equal(narrow.eval()(images(2)), dspfx.convert(prepared)(images(2)))


class Counting(nn.Module):
    """Cannot be traced, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("last", torch.zeros(3, dtype=torch.int64))
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.scales = [self.scale]

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) == 0.123:
            return x
        if self.training:
            self.steps += 1
            self.last[1] = self.steps
        return x * self.scales[0] * (1 + self.steps)


class Opaque(Stochastic):
    def __init__(self) -> None:
        super().__init__()
        self.counting = Counting()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.fc(self.counting(self.conv(x)).mean((2, 3)))


def test_what_modules_count_comes_back() -> None:
    prepared = pruned(Opaque())
    masked, narrow = copy.deepcopy(prepared), dspfx.narrow(prepared)
    assert_a_step_is_the_same(masked, narrow, images(4))
    dspfx.widen(narrow, prepared)
    assert int(prepared.counting.steps) == int(masked.counting.steps) == 1
    assert torch.equal(prepared.counting.last, masked.counting.last)
    assert torch.equal(prepared.counting.scale, masked.counting.scale)


class NormAndMore(nn.BatchNorm2d):
    """A norm with a child, as in timm."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class ByFunction(nn.Module):
    """A norm that keeps its statistics itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training)


@pytest.mark.parametrize("norm", [NormAndMore, ByFunction])
def test_norms_of_other_kinds(norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), norm(8)),
        *(nn.ReLU(), nn.Conv2d(8, 4, 3)),
    )
    prepared = pruned(model)
    masked, narrow = copy.deepcopy(prepared), dspfx.narrow(prepared)
    assert_a_step_is_the_same(masked, narrow, images(4, 12))
    dspfx.widen(narrow, prepared)
    averages = [own for own in narrow.origins.values() if "running" in own.source]
    assert len(averages) == 4
    for own in averages:
        there, here = (m.get_buffer(own.source)[own.places[own.real]] for m in (masked, prepared))
        assert_equal(there, here, tolerance=1e-7)
    x = images(3, 12)
    assert_equal(narrow.eval()(x), prepared.eval()(x))


def test_a_depthwise_bias_that_learns_revives_nothing() -> None:
    """It is zero before training, as if zeros stayed zero after it for ever."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 16, 1), nn.SiLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.SiLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    ).double()
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.bias)
    prepared = dspfx.prepare(model, images(2, 8)).train()
    dspfx.prune_channels(prepared, dspfx.Budget(macs=0.5))
    before, narrow = dspfx.report(prepared), dspfx.narrow(prepared)
    for trained in (prepared, narrow):
        train(trained, steps=5)
    assert prepared.get_submodule("4").bias.any()
    assert dspfx.report(prepared).after == before.after
    x = images(3)
    assert_equal(narrow.eval()(x), prepared.eval()(x))


class OtherCode(Stochastic):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        if self.training:
            x = x + self.conv(x)
        return self.fc(self.conv(x).mean((2, 3)))


class Computed(Stochastic):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.conv(x) * self.gamma.exp().reshape(1, -1, 1, 1)
        return self.fc(x.mean((2, 3)))


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


class Standardised(Stochastic):
    def __init__(self) -> None:
        super().__init__()
        self.conv = StandardisedConv(8, 8, 3, padding=1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OtherCode, "calls other code in training"),
        (Computed, "computed from 'gamma'"),
        (Standardised, "the weight of 'conv' is computed"),
        (Shapes, "'gamma' is used more than once"),
        (Complex, "'turn' is complex"),
        (Shifted, "calls other code in training"),
    ],
)
def test_what_cannot_be_trained_narrow_is_declined(kind: type[nn.Module], reason: str) -> None:
    prepared = pruned(kind())
    with unchanged(prepared), pytest.raises(dspfx.NarrowError, match=reason):
        dspfx.narrow(prepared)


def test_what_does_not_fit_changes_nothing() -> None:
    narrow = dspfx.narrow(pruned(Stochastic()))
    other = pruned(torchvision.models.resnet18(num_classes=5))
    with unchanged(other), pytest.raises(dspfx.NarrowError, match=r"no 'stem\.weight'"):
        dspfx.widen(narrow, other)
    wider = pruned(Stochastic(16))
    with unchanged(wider), pytest.raises(dspfx.NarrowError, match=r"of shape"):
        dspfx.widen(narrow, wider)
    with pytest.raises(dspfx.NarrowError, match="not made from"):
        dspfx.widen(nn.Linear(2, 2), other)
    with pytest.raises(dspfx.ConvertError, match="never prepared"):
        dspfx.narrow(Stochastic())
    with pytest.raises(dspfx.ConvertError, match="never prepared"):
        dspfx.widen(narrow, Stochastic())


@pytest.mark.parametrize("verb", [dspfx.convert, dspfx.get_masks, dspfx.report, dspfx.narrow])
def test_other_verbs_ask_for_the_prepared_model(verb: Callable[[nn.Module], object]) -> None:
    with pytest.raises(dspfx.DspfxError, match=r"widen\(narrow"):
        verb(dspfx.narrow(pruned(Stochastic())))


def test_saving_asks_for_the_prepared_model(tmp_path: Path) -> None:
    narrow = dspfx.narrow(pruned(Stochastic()))
    with pytest.raises(dspfx.DspfxError, match=r"widen\(narrow"):
        dspfx.save(narrow, tmp_path / "narrow.safetensors")


def test_training_a_compact_model_points_to_narrow() -> None:
    prepared = pruned(Stochastic())
    compact = dspfx.convert(prepared)
    with pytest.warns(dspfx.DspfxWarning, match=r"dspfx\.narrow"):
        compact.train()
    with pytest.warns(dspfx.DspfxWarning, match=r"dspfx\.narrow"):
        nn.Sequential(dspfx.convert(prepared), nn.Linear(4, 2)).train()
    compact.eval()
    dspfx.narrow(prepared).train()
    prepared.train()
