"""`input_moments`: how strong the inputs of layers are, and what pruning makes of it."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from detector import Detector
from torch import Tensor, nn

import dspfx
from dspfx import Budget
from dspfx.layers.gated import GatedLayer, gated_layers
from dspfx.layers.weights import spread, structural_groups
from helpers import assert_equal, randomise, unchanged

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1


class Layers(nn.Module):
    """Every kind of layer; one is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.twice = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(torch.relu(self.norm(self.conv(x))))
        x = self.up(x).mean((2, 3))
        return self.head(torch.relu(self.twice(torch.relu(self.twice(x)))))


def layers() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Layers()).eval()


def weighted(prepared: nn.Module, moments: dict[str, Tensor]) -> nn.Module:
    """A copy in which every gated weight is multiplied by the root of its channel's moment."""
    scaled = copy.deepcopy(prepared)
    with torch.no_grad():
        for name, layer in gated_layers(scaled).items():
            layer.weight.mul_(_by_channel(layer, moments[name].sqrt().float()))
    return scaled


def _by_channel(layer: GatedLayer, roots: Tensor) -> Tensor:
    filters, channels = layer.gate.mask.shape
    groups = structural_groups(layer)
    return spread(layer, roots.reshape(groups, channels).repeat_interleave(filters // groups, 0))


def test_they_are_the_mean_squares_of_all_values_together() -> None:
    model = layers()
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_children():
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0])
        )
    prepared = dspfx.prepare(layers(), X)
    batches = [X[:1], X[1:] * 3]  # of different sizes and levels
    moments = dspfx.input_moments(prepared, batches)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    assert moments.keys() == {"conv", "grouped", "up", "twice", "head"}
    for name, moment in moments.items():
        flat = torch.cat([x.double().movedim(1, 0).flatten(1) for x in seen[name]], 1)
        torch.testing.assert_close(moment, flat.square().mean(1), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_changed(training: bool) -> None:
    prepared = dspfx.prepare(layers(), X).train(training)
    modes = {name: m.training for name, m in prepared.named_modules()}
    with unchanged(prepared):
        dspfx.input_moments(prepared, [X])
        with pytest.raises(dspfx.DataError, match="not finite"):
            dspfx.input_moments(prepared, [X, X * float("nan")])
    assert {name: m.training for name, m in prepared.named_modules()} == modes
    assert not any(m._forward_pre_hooks for m in prepared.modules())


def test_batches_of_any_kind() -> None:
    prepared = dspfx.prepare(layers(), X)
    expected = dspfx.input_moments(prepared, [X])
    labelled = dspfx.input_moments(prepared, [(X, torch.zeros(6))])
    called = dspfx.input_moments(prepared, [{"image": X}], call=lambda b: prepared(b["image"]))
    for name, moment in expected.items():
        assert torch.equal(labelled[name], moment)
        assert torch.equal(called[name], moment)


def test_a_batch_of_nothing_changes_nothing() -> None:
    prepared = dspfx.prepare(layers(), X)
    expected = dspfx.input_moments(prepared, [X])
    found = dspfx.input_moments(prepared, [X[:0], X, X[:0]])
    assert all(torch.equal(found[name], moment) for name, moment in expected.items())
    with pytest.raises(dspfx.DataError, match="reached no layer"):
        dspfx.input_moments(prepared, [X[:0]])


def test_without_batches_or_layers() -> None:
    prepared = dspfx.prepare(layers(), X)
    with pytest.raises(dspfx.DataError, match="no batch"):
        dspfx.input_moments(prepared, [])
    with pytest.raises(dspfx.DataError, match="reached no layer"):
        dspfx.input_moments(prepared, [X], call=lambda batch: None)
    with pytest.raises(dspfx.ConvertError):
        dspfx.input_moments(layers(), [X])


@pytest.fixture(scope="module", params=["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5"])
def known(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Tensor], nn.Module]:
    """A network, its moments, and one whose weights are larger by their roots."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = torchvision.models.get_model(request.param, weights=None, num_classes=10)
    prepared = dspfx.prepare(randomise(model.eval()), x)
    moments = {n: m.float().double() for n, m in dspfx.input_moments(prepared, [x]).items()}
    same = weighted(prepared, moments)
    dspfx.cluster_groups(prepared)
    return prepared, moments, same


def test_they_weigh_the_energies(
    known: tuple[nn.Module, dict[str, Tensor], nn.Module],
) -> None:
    """Moments have the effect of weights that are larger by their roots."""
    prepared, moments, same = copy.deepcopy(known)
    for layer, other in zip(
        gated_layers(prepared).values(), gated_layers(same).values(), strict=True
    ):
        other.gate.assign(layer.gate.assignment)
    report = dspfx.prune(prepared, Budget(macs=0.5), moments=moments)
    assert dspfx.prune(same, Budget(macs=0.5)).after.macs == pytest.approx(
        report.after.macs, rel=1e-3
    )
    agree = [
        (a == b).float().mean()
        for a, b in zip(
            dspfx.get_masks(prepared).values(), dspfx.get_masks(same).values(), strict=True
        )
    ]
    assert min(agree) > 0.99  # the weights are rounded to float32


def test_they_weigh_the_energies_that_groups_keep(
    known: tuple[nn.Module, dict[str, Tensor], nn.Module],
) -> None:
    prepared, moments, same = copy.deepcopy(known)
    own = {name: layer.gate.assignment for name, layer in gated_layers(prepared).items()}
    groups = dspfx.cluster_groups(prepared, moments=moments)
    plain = dspfx.cluster_groups(same)
    different = [n for n, group in groups.items() if not torch.equal(group, plain[n])]
    assert len(different) <= len(groups) // 10  # ties, by rounding
    assert any(not torch.equal(group, own[name]) for name, group in groups.items())


def test_a_channel_that_is_always_zero_goes_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU()),
        *(nn.Conv2d(6, 4, 1), nn.Conv2d(4, 2, 1)),
    ).eval()
    with torch.no_grad():
        model[1].bias[5], model[1].weight[5] = -100.0, 0.1
        model[3].weight[:, 5] *= 2  # that it reads most of it is no reason to keep it
        model[0].weight[5] *= 2
    prepared = dspfx.prepare(model, X)
    moments = dspfx.input_moments(prepared, [X])
    assert moments["3"][5] == 0
    by_weight = copy.deepcopy(prepared)
    dspfx.prune_channels(by_weight, Budget(macs=0.9))
    assert dspfx.get_masks(by_weight)["3"][:, 5].any()
    dspfx.prune(prepared, Budget(macs=0.9), moments=moments)
    assert not dspfx.get_masks(prepared)["3"][:, 5].any()


def test_of_a_model_in_parts() -> None:
    torch.manual_seed(0)
    images = [torch.randn(3, 8, 8) for _ in range(2)]
    prepared = dspfx.prepare(Detector().eval(), (images,))
    moments = dspfx.input_moments(prepared, [(images,)])
    assert {"backbone.0", "backbone.2", "head.conv", "head.out"} <= moments.keys()
    levels = prepared.backbone(torch.stack(images))
    flat = [x.transpose(0, 1).flatten(1) for x in (levels, nn.functional.max_pool2d(levels, 2))]
    expected = torch.cat(flat, 1).double().square().mean(1)
    torch.testing.assert_close(moments["head.conv"], expected, rtol=1e-4, atol=1e-9)
    dspfx.prune(prepared, Budget(macs=0.7), moments=moments)
    assert not dspfx.get_masks(prepared)["head.conv"].all()


@pytest.mark.parametrize(
    "wrong", [torch.ones(5), torch.full((8,), -1.0), torch.full((8,), torch.nan)]
)
def test_moments_of_another_model(wrong: Tensor) -> None:
    prepared = dspfx.prepare(layers(), X)
    moments = {**dspfx.input_moments(prepared, [X]), "grouped": wrong}
    verbs: list[Any] = [
        lambda: dspfx.cluster_groups(prepared, moments=moments),
        lambda: dspfx.prune(prepared, Budget(macs=0.5), moments=moments),
        lambda: dspfx.prune_channels(prepared, Budget(macs=0.5), moments=moments),
    ]
    for verb in verbs:
        with unchanged(prepared), pytest.raises(dspfx.DataError, match="grouped"):
            verb()


@pytest.mark.parametrize("wrong", [{"module.first": torch.ones(3)}, [1.0], {"grouped": 1.0}])
def test_moments_of_nothing_here_are_refused(wrong: Any) -> None:
    """They were passed over without a word."""
    prepared = dspfx.prepare(layers(), X)
    verbs: list[Any] = [
        lambda: dspfx.cluster_groups(prepared, moments=wrong),
        lambda: dspfx.prune(prepared, Budget(macs=0.5), moments=wrong),
        lambda: dspfx.prune_channels(prepared, Budget(macs=0.5), moments=wrong),
    ]
    for verb in verbs:
        with unchanged(prepared), pytest.raises(dspfx.DataError, match="no layer of this model"):
            verb()


def test_the_average_of_a_model_has_the_same_layers() -> None:
    prepared = dspfx.prepare(layers(), X)
    average = torch.optim.swa_utils.AveragedModel(prepared)
    moments = dspfx.input_moments(average, [(X, torch.zeros(len(X)))])
    assert moments.keys() == dspfx.input_moments(prepared, [X]).keys()
    dspfx.prune(average, Budget(macs=0.5), moments=moments)
    assert_equal(average.eval()(X), dspfx.convert(average)(X), 1e-5)


def test_layers_without_moments_count_by_their_weights() -> None:
    prepared = dspfx.prepare(layers(), X)
    other = copy.deepcopy(prepared)
    dspfx.prune(prepared, Budget(macs=0.5), moments={})
    dspfx.prune(other, Budget(macs=0.5))
    for a, b in zip(
        dspfx.get_masks(prepared).values(), dspfx.get_masks(other).values(), strict=True
    ):
        assert torch.equal(a, b)
