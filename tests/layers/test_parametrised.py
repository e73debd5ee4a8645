"""Layers with computed weights: gated where a parametrisation does it, else a remedy is named."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import dspfx
from dspfx.layers.gated import gated_layers
from dspfx.layers.weights import spread
from helpers import assert_equal, random_masks, randomise, unchanged

Wrap = Callable[[nn.Module], nn.Module]


class Symmetric(nn.Module):
    """A parametrisation of the user's own: every filter is its own mirror image."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.flip(-1)


def symmetric(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def twice(layer: nn.Module) -> nn.Module:
    """Two parametrisations of the weight, and one of the bias."""
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    return symmetric(parametrizations.weight_norm(layer))


WRAPS: dict[str, Wrap] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": symmetric,
    "twice": twice,
}


class Net(nn.Module):
    """Parametrised: plain, transposed, depthwise and linear layers; `[N, 3, H, W]` -> `[N, 4]`."""

    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        self.first = wrap(nn.Conv2d(3, 8, 3, padding=1))
        self.body, self.norm = wrap(nn.Conv2d(8, 12, 3, padding=1)), nn.BatchNorm2d(12)
        self.depthwise = wrap(nn.Conv2d(12, 12, 3, groups=12))
        self.up, self.down = wrap(nn.ConvTranspose2d(12, 8, 2, 2)), nn.Conv2d(8, 8, 3)
        self.hidden, self.head = wrap(nn.Linear(8, 6)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.body(self.first(x).relu())).relu())
        x = self.down(self.up(x).relu()).relu()
        return self.head(self.hidden(x.mean((2, 3))).relu())


def images(size: int = 8, samples: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 3, size, size, generator=generator, dtype=torch.float64)


@pytest.fixture(params=WRAPS)
def wrap(request: pytest.FixtureRequest) -> Wrap:
    return WRAPS[request.param]


def net(wrap: Wrap) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net(wrap).double()).eval()


def assert_same(prepared: nn.Module) -> nn.Module:
    compact = dspfx.convert(prepared)
    prepared.eval()
    with torch.no_grad():
        for size in (8, 11):
            assert_equal(prepared(images(size, 3)), compact(images(size, 3)))
    return compact


def test_parametrised_layers_are_pruned_as_they_compute(wrap: Wrap) -> None:
    model = net(wrap)
    x = images()
    with torch.no_grad(), unchanged(model):
        prepared = dspfx.prepare(model, x)
        assert list(gated_layers(prepared)) == ["body", "up", "down", "hidden"]
        assert_equal(model(x), prepared(x), tolerance=0)
        masks = random_masks(prepared, drop=0.3)
        dspfx.set_masks(prepared, masks)
        compact = assert_same(prepared)
    assert not any(parametrize.is_parametrized(module) for module in compact.modules())
    kept = dspfx.get_masks(prepared)["body"]
    expected = model.body.weight * spread(model.body, kept)
    for filter, weight in enumerate(prepared.body.masked()[0]):
        assert torch.equal(weight, expected[filter])


def test_parametrised_layers_train_as_they_did(wrap: Wrap) -> None:
    """A power iteration, for one, takes place once in a step."""
    model = net(wrap).train()
    prepared = dspfx.prepare(model, images())
    assert prepared.training
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, prepared)]
    for step in range(3):
        for module, optimizer in zip((model, prepared), optimizers, strict=True):
            optimizer.zero_grad()
            module(images(seed=step)).square().mean().backward()
            optimizer.step()
        state = prepared.state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name]), name
    dspfx.set_masks(prepared, random_masks(prepared))
    for step in range(3):
        prepared.train()
        optimizers[1].zero_grad()
        prepared(images(seed=step)).square().mean().backward()
        optimizers[1].step()
        before = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
        compact = dspfx.convert(prepared)
        assert prepared.training
        for name, tensor in prepared.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        with torch.no_grad():
            assert_equal(prepared.eval()(images()), compact(images()))


@pytest.mark.parametrize("verb", [dspfx.prune, dspfx.prune_channels])
def test_verbs_judge_the_computed_weight_and_write_nothing(wrap: Wrap, verb) -> None:
    prepared = dspfx.prepare(net(wrap), images()).train()
    before = {n: t.clone() for n, t in prepared.state_dict().items() if "parametrizations" in n}
    dspfx.cluster_groups(prepared)
    moments = dspfx.input_moments(prepared, [images()])
    assert verb(prepared, dspfx.Budget(macs=0.5), moments=moments).achieved <= 0.5
    state = prepared.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.items())
    assert_same(prepared)


def test_parametrised_models_are_saved_and_copied(wrap: Wrap, tmp_path: Path) -> None:
    prepared = dspfx.prepare(net(wrap), images())
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.2))
    assert_equal(prepared(images()), copy.deepcopy(prepared)(images()), tolerance=0)
    for saved in (prepared, dspfx.convert(prepared)):
        dspfx.save(saved, tmp_path / "model.dspfx")
        loaded = dspfx.load(tmp_path / "model.dspfx", net(wrap))
        assert_equal(saved(images()), loaded.eval()(images()), tolerance=0)


def test_parametrisations_can_be_removed_before_and_after(wrap: Wrap) -> None:
    model = net(wrap)
    prepared = dspfx.prepare(model, images())
    dspfx.set_masks(prepared, random_masks(prepared))
    with torch.no_grad():
        expected = prepared(images())
        for layer in gated_layers(prepared).values():
            for name in list(getattr(layer, "parametrizations", ())):
                parametrize.remove_parametrizations(layer, name)
        assert_equal(expected, prepared(images()), tolerance=0)
        assert parametrize.is_parametrized(model.body)
        assert_same(prepared)


def test_learners_leave_parametrised_layers_to_others(wrap: Wrap) -> None:
    prepared = dspfx.prepare(net(wrap), images()).train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    learner = dspfx.GroupLearner(prepared, optimizer, total_steps=1)
    assert list(learner.layers) == ["down"]
    learner.step(lambda: prepared(images()).square().mean())
    assert not prepared.body.gate.logits.any()
    pruning = dspfx.GradualPruning(prepared, dspfx.Budget(macs=0.97), total_steps=2, end=1)
    for step in range(2):
        optimizer.zero_grad()
        prepared(images(seed=step)).square().mean().backward()
        pruning.step()
    assert pruning.report is not None
    assert pruning.report.achieved <= 0.97
    assert_same(prepared)


def test_what_cannot_be_done_with_computed_weights_names_the_remedy() -> None:
    wrap = parametrizations.weight_norm
    prepared = dspfx.prepare(net(wrap), images())
    with pytest.raises(dspfx.NarrowError, match="computed"):
        dspfx.narrow(prepared)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), wrap(nn.Conv2d(8, 8, 3)), nn.ReLU()).double()
    prepared = dspfx.prepare(model, images())
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    with pytest.raises(dspfx.LearnError, match="remove_parametrizations"):
        dspfx.GroupLearner(prepared, optimizer, total_steps=2)


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return weight_norm(layer)


HOOKS: list[tuple[Wrap, str]] = [
    (old_weight_norm, "remove_weight_norm"),
    (spectral_norm, "remove_spectral_norm"),
    (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), "prune.remove"),
    (lambda layer: prune.random_structured(layer, "weight", 0.3, dim=1), "prune.remove"),
]


@pytest.mark.parametrize(("hook", "remedy"), HOOKS)
def test_weights_computed_by_hooks_name_the_remedy(hook: Wrap, remedy: str) -> None:
    layers = nn.Conv2d(3, 8, 3), hook(nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 4, 1)
    model = nn.Sequential(*layers).double()
    if hook is not spectral_norm:  # torch cannot copy the others after a pass with gradients
        model(images())
        with pytest.raises(dspfx.TraceError, match=remedy):
            dspfx.prepare(model, images())
    with torch.no_grad():
        model(images())
    prepared = dspfx.prepare(model, images())
    assert list(gated_layers(prepared)) == ["2"]
    assert remedy in " ".join(str(dspfx.report(prepared)).split())
    assert_same(prepared)
    with pytest.raises(dspfx.PrepareError, match=remedy):
        dspfx.prepare(model[:2], images())
