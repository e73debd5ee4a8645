"""`cluster_groups` finds groups that were planted, and keeps more energy than chance does."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from dspfx.layers.weights import as_weight, energy, filters_first
from dspfx.training.groups.cluster import _improved
from helpers import unchanged

GROUPS = 3


def planted(structural: int = 1, kind: type[nn.Module] = nn.Conv2d) -> tuple[nn.Module, list]:
    """A prepared chain in which three sets of filters read three sets of channels, and the sets."""
    generator = torch.Generator().manual_seed(0)
    convs = [kind(24, 24, 3, padding=1, bias=False, groups=structural) for _ in range(3)]
    sets = []
    for conv in convs:
        weight = torch.randn(24, 24 // structural, 3, 3, generator=generator)
        group = torch.arange(24) % GROUPS
        group = torch.cat(
            [b[torch.randperm(len(b), generator=generator)] for b in group.chunk(structural)]
        )
        channel = torch.randint(GROUPS, (24 // structural,), generator=generator)
        weight[group[:, None] != channel] *= 0.2
        conv.weight.data.copy_(as_weight(conv, weight, structural))
        sets.append(group)
    model = nn.Sequential(nn.Conv2d(3, 24, 1), *convs, nn.Conv2d(24, 4, 1))
    config = dspfx.PrepareConfig(groups=GROUPS, ignore=("4",))
    return dspfx.prepare(model, torch.zeros(2, 3, 6, 6), config=config), sets


def kept_energy(prepared: nn.Module, macs: float) -> float:
    """The share of the energy of the gated weights that is left at a budget of masks."""
    pruned = copy.deepcopy(prepared)
    dspfx.prune(pruned, dspfx.Budget(macs=macs, count="masks"))
    layers = gated_layers(pruned).values()
    energies = [energy(filters_first(layer).detach()) for layer in layers]
    left = [(e * layer.gate.mask).sum() for e, layer in zip(energies, layers, strict=True)]
    return float(sum(left) / sum(e.sum() for e in energies))


def randomly_grouped(prepared: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    twin = copy.deepcopy(prepared)
    for layer in gated_layers(twin).values():
        layer.gate.assign(torch.randperm(layer.gate.logits.shape[1], generator=generator) % GROUPS)
    return twin


def same_partition(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a[:, None] == a, b[:, None] == b)


def test_planted_groups_are_found() -> None:
    prepared, sets = planted()
    weights = {name: p.clone() for name, p in prepared.named_parameters()}
    found = dspfx.cluster_groups(prepared)
    assert list(found) == ["1", "2", "3"]
    for (name, group), expected in zip(found.items(), sets, strict=True):
        assert same_partition(group, expected)
        assert torch.equal(gated_layers(prepared)[name].gate.assignment, group)
    for name, parameter in prepared.named_parameters():
        assert torch.equal(parameter, weights[name])


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_structural_groups_are_clustered_each_by_itself(kind: type[nn.Module]) -> None:
    prepared, sets = planted(2, kind)
    found = dspfx.cluster_groups(prepared)
    for group, expected in zip(found.values(), sets, strict=True):
        for mine, theirs in zip(group.chunk(2), expected.chunk(2), strict=True):
            assert same_partition(mine, theirs)


@pytest.mark.parametrize("macs", [0.6, 0.4, 0.25])
def test_clustered_groups_keep_more_energy_than_random_ones(macs: float) -> None:
    prepared, _ = planted()
    chance = [kept_energy(randomly_grouped(prepared, seed), macs) for seed in range(5)]
    dspfx.cluster_groups(prepared)
    assert kept_energy(prepared, macs) > max(chance) + 0.1


def test_equal_seeds_give_equal_groups_whatever_the_global_generators_say() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3))
    prepared = dspfx.prepare(model, torch.zeros(2, 3, 8, 8))
    first = dspfx.cluster_groups(prepared)["1"]
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(dspfx.cluster_groups(prepared)["1"], first)
    assert not torch.equal(dspfx.cluster_groups(prepared, seed=7)["1"], first)


def test_against_every_partition() -> None:
    """Of five filters in two groups, the best partition, by trying all of them."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.Conv2d(6, 5, 1))
    model[1].weight.data.normal_(generator=generator)
    prepared = dspfx.prepare(model, torch.zeros(2, 2, 4, 4), config=dspfx.PrepareConfig(groups=2))
    energies = energy(model[1].weight.detach().double()).numpy()

    def kept(group: tuple[int, ...]) -> float:
        total = 0.0
        for g in set(group):
            rows = energies[[o for o in range(5) if group[o] == g]]
            total += sum(float(np.sort(rows.sum(0))[::-1][:k].sum()) for k in range(1, 7)) / 6
        return total

    best = max(kept(group) for group in itertools.product((0, 1), repeat=5))
    found = dspfx.cluster_groups(prepared)["1"]
    assert kept(tuple(found.tolist())) == pytest.approx(best)
    assert _improved(energies, found.numpy(), 2)[0] == pytest.approx(best)


def test_what_is_pruned_already_does_not_count() -> None:
    prepared, _ = planted()
    mask = torch.zeros(24, 24, dtype=torch.bool)
    mask[:12, :5] = True
    mask[12:, 5:] = True
    dspfx.set_masks(prepared, {"1": mask})
    found = dspfx.cluster_groups(prepared)["1"]
    assert not set(found[:12].tolist()) & set(found[12:].tolist())


def test_errors() -> None:
    prepared, _ = planted()
    gated_layers(prepared)["3"].weight.data[0] = float("nan")
    with pytest.raises(dspfx.PrepareError, match="3 holds NaN"):
        dspfx.cluster_groups(prepared)
    assert not gated_layers(prepared)["1"].gate.logits.any()
    plain = nn.Conv2d(3, 3, 3)
    with unchanged(plain), pytest.raises(dspfx.ConvertError, match="never prepared"):
        dspfx.cluster_groups(plain)


@torch.no_grad()
def test_the_whole_way_without_training() -> None:
    """prepare, cluster, prune, recalibrate, convert: statistics fit, and the result is verified."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)),
    )
    x = torch.randn(64, 3, 10, 10)
    dspfx.recalibrate(model.eval(), [x])
    prepared = dspfx.prepare(model, x[:2])
    dspfx.cluster_groups(prepared)
    dspfx.prune(prepared, dspfx.Budget(macs=0.3, count="masks"))
    expected = model(x)
    before = float((prepared(x) - expected).square().mean())
    dspfx.recalibrate(prepared, [x])
    assert float((prepared(x) - expected).square().mean()) < before
    compact = dspfx.convert(prepared)
    torch.testing.assert_close(compact(x), prepared(x), rtol=1e-4, atol=1e-5)
