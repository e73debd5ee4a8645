"""`prune`: budgets met, the rule of the threshold, and budgets that cannot be."""

import copy
import functools

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision_networks import network

import dspfx
from dspfx import Budget
from dspfx.layers.gated import gated_layers
from dspfx.model.analysed import analyse_prepared
from dspfx.passes.analysis.removable import droppable_layers
from dspfx.passes.lowering.measure import Measured
from helpers import assert_equal, macs, randomise, unchanged


def prepared_model(name: str = "resnet18", groups: int = 4) -> dspfx.PreparedModule:
    prepared = copy.deepcopy(_prepared(name, groups))
    torch.manual_seed(0)
    return prepared


@functools.cache
def _prepared(name: str, groups: int) -> dspfx.PreparedModule:
    torch.manual_seed(0)
    model = network(name, num_classes=10)
    config = dspfx.PrepareConfig(groups=groups)
    prepared = dspfx.prepare(model, torch.randn(2, 3, 32, 32), config=config)
    for layer in gated_layers(prepared).values():
        layer.gate.assign(torch.randint(len(layer.gate.logits), (layer.out_channels,)))
    return prepared


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "regnet_y", "densenet"])
@pytest.mark.parametrize("budget", [Budget(macs=0.5), Budget(macs=0.2), Budget(params=0.4)])
def test_budgets_are_met_within_half_a_point(name: str, budget: Budget) -> None:
    prepared = prepared_model(name)
    report = dspfx.prune(prepared, budget)
    assert budget.fraction - 0.005 <= report.achieved <= budget.fraction
    assert report.note == ""
    assert dspfx.report(prepared).after == report.after
    assert f"{report.achieved:.2%}" in str(report)
    x = torch.randn(2, 3, 32, 32)
    compact = dspfx.convert(prepared)
    assert macs(compact, x) == dspfx.report(compact).emitted.macs >= report.after.macs
    fewest = dspfx.convert(prepared, cost_model=dspfx.FEWEST_WEIGHTS)
    assert macs(fewest, x) == report.after.macs
    assert_equal(prepared.eval()(x), compact(x), 1e-4)


def test_the_longest_prefix_below_the_threshold_is_dropped() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 5, 1)
            self.conv = nn.Conv2d(5, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.stem(x))

    torch.manual_seed(0)  # a share that is the threshold itself depends on the order of sums
    prepared = dspfx.prepare(Chain(), torch.randn(2, 3, 4, 4), config=dspfx.PrepareConfig(groups=2))
    layer = gated_layers(prepared)["conv"]
    layer.gate.assign(torch.tensor([0, 1, 0, 1, 1, 0]))
    weight = layer.weight.detach().double()  # the threshold is a share to 40 bits
    report = dspfx.prune(prepared, Budget(macs=0.6, count="masks"))
    assert "closest below" in report.note
    for group in (0, 1):
        members = layer.gate.assignment == group
        energy = weight[members].square().sum((0, 2, 3))
        share = energy / energy.sum()
        running, dropped = 0.0, []
        for channel in share.argsort().tolist():
            running += float(share[channel])
            if running >= report.threshold:
                break
            dropped.append(channel)
        kept = [c for c in range(5) if c not in dropped]
        for row in layer.gate.mask[members]:
            assert row.nonzero().flatten().tolist() == kept


def test_what_is_pruned_stays_pruned() -> None:
    prepared = prepared_model()
    dspfx.prune(prepared, Budget(macs=0.6))
    first = dspfx.get_masks(prepared)
    dspfx.prune(prepared, Budget(macs=0.4))
    for name, mask in dspfx.get_masks(prepared).items():
        assert not (mask & ~first[name]).any()


def test_what_is_pruned_stays_pruned_in_other_groups() -> None:
    prepared = prepared_model(groups=2)
    dspfx.prune(prepared, Budget(macs=0.6))
    before = dspfx.get_masks(prepared)
    for layer in gated_layers(prepared).values():
        layer.gate.assign(torch.randint(len(layer.gate.logits), (layer.out_channels,)))
    report = dspfx.prune(prepared, Budget(macs=0.5))
    after = dspfx.get_masks(prepared)
    assert not any((after[name] & ~before[name]).any() for name in before)
    assert report.achieved <= 0.5
    kept = dspfx.prune(prepared, Budget(macs=0.9))
    assert kept.after == report.after
    assert kept.note == ""


def test_the_whole_budget_prunes_nothing() -> None:
    prepared = prepared_model()
    assert dspfx.prune(prepared, Budget(macs=1.0)).achieved == 1.0
    assert all(mask.all() for mask in dspfx.get_masks(prepared).values())


def test_dead_layers_are_never_chosen() -> None:
    prepared = prepared_model(groups=1)
    report = dspfx.prune(prepared, Budget(macs=0.08))
    assert report.achieved <= 0.08
    assert all(mask.any() for mask in dspfx.get_masks(prepared).values())


def test_filters_are_dropped_only_where_a_sum_follows() -> None:
    prepared = prepared_model()
    analysis = analyse_prepared(prepared)
    droppable = droppable_layers(analysis)
    assert {n for n in droppable if n.endswith("conv2")} == {
        f"layer{i}.{j}.conv2" for i in range(1, 5) for j in range(2)
    }
    assert {n for n in droppable if "downsample" in n} == {
        f"layer{i}.0.downsample.0" for i in range(2, 5)
    }
    assert not any(n.endswith("conv1") for n in droppable)


def test_filters_are_dropped_only_if_wanted() -> None:
    dropping = prepared_model()
    keeping = copy.deepcopy(dropping)
    dspfx.prune(dropping, Budget(macs=0.4))
    assert not all(mask.any(1).all() for mask in dspfx.get_masks(dropping).values())
    report = dspfx.prune(keeping, Budget(macs=0.4), drop_filters=False)
    assert 0.36 <= report.achieved <= 0.4
    assert all(
        mask.any(1).all()
        for name, mask in dspfx.get_masks(keeping).items()
        if name.endswith("conv2")
    )


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan")])
def test_budgets_out_of_range(value: float) -> None:
    with pytest.raises(dspfx.BudgetError, match=r"in \(0, 1\]"):
        Budget(macs=value)


def test_exactly_one_budget() -> None:
    for values in ({}, {"macs": 0.5, "params": 0.5}):
        with pytest.raises(dspfx.BudgetError, match="exactly one"):
            Budget(**values)


def test_an_unreachable_budget_says_what_is_reachable() -> None:
    prepared = prepared_model()
    with (
        unchanged(prepared),
        pytest.raises(dspfx.BudgetError, match=r"([\d.]+)% remains") as caught,
    ):
        dspfx.prune(prepared, Budget(macs=0.001))
    least = float(str(caught.value).split(" remains")[0].split()[-1].rstrip("%")) / 100
    report = dspfx.prune(prepared, Budget(macs=least + 0.0001))
    assert report.achieved == pytest.approx(least, abs=1e-4)


def test_weights_that_are_not_finite() -> None:
    prepared = prepared_model()
    gated_layers(prepared)["layer1.0.conv1"].weight.data[0] = np.nan
    before = dspfx.get_masks(prepared)
    with pytest.raises(dspfx.PrepareError, match=r"layer1\.0\.conv1 holds NaN"):
        dspfx.prune(prepared, Budget(macs=0.5))
    assert all(torch.equal(before[k], v) for k, v in dspfx.get_masks(prepared).items())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_round_to_keeps_widths_and_inputs_to_multiples(name: str) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    config = dspfx.PrepareConfig(groups=2, round_to=8)
    prepared = dspfx.prepare(model, x, config=config)
    report = dspfx.prune(prepared, dspfx.Budget(macs=0.4))
    assert 0.38 < report.achieved <= 0.4
    compact = dspfx.convert(prepared)
    layers = dspfx.report(compact).layers
    assert all(layer.filters[1] % 8 == 0 for layer in layers[:-1])
    assert all(n % 8 == 0 for layer in layers if layer.gated for n in layer.inputs[1])
    assert report.after.macs == dspfx.report(compact).after.macs
    assert macs(compact, x) <= dspfx.report(compact).emitted.macs
    assert any(layer.filters[1] < layer.filters[0] for layer in layers)


@pytest.mark.usefixtures("own_cache")
def test_a_budget_of_latency_is_met_as_predicted_and_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU()),
        *(nn.Conv2d(48, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 1)),
    )
    prepared = dspfx.prepare(randomise(model), torch.randn(2, 3, 24, 24))
    # times in a row are like multiply-accumulates: the test must not depend on the machine
    monkeypatch.setattr(Measured, "__call__", _like_macs)
    report = dspfx.prune(prepared, Budget(latency=0.5))
    assert 0.49 < report.achieved <= 0.5
    assert report.measured is not None
    assert report.measured > 0
    assert f"latency {report.achieved:.2%} predicted, {report.measured:.2%} measured" in str(report)
    assert report.after.macs < report.before.macs


def _like_macs(self: Measured, modules: dict[str, nn.Module], x: torch.Tensor) -> dict[str, float]:
    weights = {
        name: sum(p.numel() for p in (*module.parameters(), *module.buffers()) if p.dim())
        for name, module in modules.items()
    }
    return {name: count * 1e-9 for name, count in weights.items()}
