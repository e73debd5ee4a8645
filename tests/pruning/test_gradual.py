"""`GradualPruning`: what the loss says about channels and groups, and what goes for it."""

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from test_properties import inputs, prepare
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torchvision_networks import resnet10

import dspfx
from dspfx import Budget
from dspfx.layers.gated import GatedLayer, gated_layers
from dspfx.layers.weights import spread, structural_groups
from dspfx.model.analysed import analyse_prepared
from dspfx.model.liveness import present_liveness
from dspfx.model.parts import parts_of
from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Mix
from dspfx.passes.analysis.cost import layer_costs, total
from dspfx.pruning.latency import Latency
from dspfx.pruning.layer_times import SHARES, LayerTimes
from dspfx.pruning.ranking import sensitive_parts
from dspfx.pruning.search import prune_by
from dspfx.pruning.sensitivity import Sensitivity
from dspfx.utils.distributed import Processes
from dspfx.utils.pytree import leaves
from helpers import assert_equal, randomise, unchanged
from random_networks import networks

X = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    """A stream that two layers write to and three read, one of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.inner = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.outer = nn.Conv2d(6, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.side = nn.Conv2d(8, 6, 2, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = x + self.outer(torch.tanh(self.inner(x)))
        return self.head(torch.tanh(self.up(x) + self.side(x)).mean((2, 3)))


def layers(groups: int = 2) -> dspfx.PreparedModule:
    torch.manual_seed(0)
    model = randomise(Layers()).double()
    prepared = dspfx.prepare(model, X, config=dspfx.PrepareConfig(groups=groups))
    dspfx.cluster_groups(prepared)
    return prepared


def loss(model: nn.Module, x: Tensor = X) -> Tensor:
    """Any scalar that every output has a part in."""
    out: Tensor = model(x)
    return (out.flatten(1) * torch.arange(1.0, 1 + out[0].numel(), dtype=out.dtype)).sin().sum()


def train(
    model: nn.Module, pruning: dspfx.GradualPruning, steps: int, x: Callable[[int], Tensor]
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, x(step)).backward()
        pruning.step()
        optimizer.step()


def drawn(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(X.shape, generator=generator, dtype=torch.float64)


def test_it_says_how_far_it_is_and_what_is_converted_before_its_end(tmp_path: Path) -> None:
    prepared = layers()
    pruning = dspfx.GradualPruning(prepared, Budget(macs=0.4), total_steps=10, prunings=4, end=0.8)
    assert repr(pruning) == "GradualPruning(budget 40.00%, step 0 of 10, pruning 0 of 4)"
    dspfx.convert(prepared)  # nothing has begun
    train(prepared, pruning, 5, drawn)
    assert pruning.report is not None
    left = f"{pruning.report.achieved:.2%}"
    assert f"budget 40.00%, {left} left, step 5 of 10, pruning 2 of 4" in repr(pruning)
    assert str(pruning.report).splitlines()[-1] == "pruning 2 of 4, on the way to 40.00%"
    said = f"GradualPruning has done 2 of 4 prunings, {left} is left and the budget is 40.00%"
    path = tmp_path / "early.dspfx"
    dspfx.save(prepared, path)
    for unfinished in (prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        with pytest.warns(dspfx.DspfxWarning, match=said):
            early = dspfx.convert(unfinished)
        assert_equal(early(X), prepared.eval()(X))
        prepared.train()
    train(prepared, pruning, 3, drawn)
    assert "on the way" not in str(pruning.report)
    dspfx.convert(prepared)  # all prunings are done, what is left is training


# -- sensitivity -----------------------------------------------------------------------------------


def factors_in_front(prepared: dspfx.PreparedModule) -> Tensor:
    """A factor for every coupling class, with which every layer multiplies what it reads."""
    analysis = analyse_prepared(prepared)
    factors = torch.ones(int(analysis.classes.max()) + 1, dtype=torch.float64, requires_grad=True)
    read = {op.layer: op.operands[0] for op in analysis.ops.values() if isinstance(op, Mix)}
    for name, value in read.items():
        classes = torch.from_numpy(analysis.class_of(value))

        def hook(layer: nn.Module, args: Any, classes: Tensor = classes) -> Any:
            trailing = [1] * (args[0].dim() - 2)
            return args[0] * factors[classes].reshape(-1, *trailing)

        prepared.get_submodule(name).register_forward_pre_hook(hook)
    return factors


def test_channels_are_derived_by_a_factor_in_front_of_all_that_reads_them() -> None:
    prepared = layers()
    factors, sensitivity = factors_in_front(prepared), Sensitivity(prepared)
    expected = torch.zeros_like(factors)
    for step in range(3):
        prepared.zero_grad()
        (slopes,) = torch.autograd.grad(loss(prepared, drawn(step)), factors)
        expected += slopes.square()
        loss(prepared, drawn(step)).backward()
        sensitivity.update()
    assert (expected > 0).sum() == 3 + 8 + 6 + 6
    assert_equal(expected, sensitivity.classes)


class Thrice(nn.Module):
    """A layer that is called several times, on the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + torch.tanh(self.conv(x))
        return self.head(x.mean((2, 3)))


def test_the_gradient_of_a_layer_that_is_called_often_counts_once() -> None:
    prepared = dspfx.prepare(randomise(Thrice()).double(), X)
    factors, sensitivity = factors_in_front(prepared), Sensitivity(prepared)
    (slopes,) = torch.autograd.grad(loss(prepared), factors)
    loss(prepared).backward()
    sensitivity.update()
    assert_equal(slopes.square(), sensitivity.classes)


def test_groups_are_derived_by_a_factor_in_front_of_what_they_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared = layers()
    sensitivity = Sensitivity(prepared)
    loss(prepared).backward()
    sensitivity.update()
    factors: dict[nn.Module, Tensor] = {}
    plain = GatedLayer.masked

    def multiplied(self: GatedLayer, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        structural, (filters, _) = structural_groups(self), self.gate.mask.shape
        own = torch.arange(filters) // (filters // structural)
        weight, bias = plain(self, weight)
        return weight * spread(self, factors[self][own, self.gate.assignment]), bias

    monkeypatch.setattr(GatedLayer, "masked", multiplied)
    for name, layer in gated_layers(prepared).items():
        factors[layer] = torch.ones_like(sensitivity.groups[name], requires_grad=True)
    loss(prepared).backward()
    assert sensitivity.groups.keys() == {"inner", "outer", "up", "side"}
    for name, layer in gated_layers(prepared).items():
        assert factors[layer].grad is not None
        assert_equal(factors[layer].grad.square(), sensitivity.groups[name])


def test_gradients_that_are_not_finite_are_passed_over() -> None:
    prepared = layers()
    sensitivity = Sensitivity(prepared)
    loss(prepared).backward()
    sensitivity.update()
    before = [values.clone() for values in sensitivity.values()]
    prepared.get_submodule("side").weight.grad[0, 0] = torch.inf
    sensitivity.update()
    assert all(torch.equal(a, b) for a, b in zip(before, sensitivity.values(), strict=True))


# -- what goes -------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Two hidden channels' worth of layers without any stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1, bias=False)
        self.second = nn.Conv2d(4, 5, 3, bias=False)
        self.last = nn.Conv2d(5, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_the_least_sensitivity_for_its_cost_goes_first() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    prepared = dspfx.prepare(Chain().double(), x, config=dspfx.PrepareConfig(groups=1))
    # MACs: 4*3*25 = 300, 5*4*9*9 = 1620, 2*5*9 = 90
    loss(prepared, x).backward()
    weights = {n: layer.weight for n, layer in prepared.named_modules() if hasattr(layer, "weight")}
    slopes = {n: (w * w.grad).detach().sum((0, 2, 3)).square() for n, w in weights.items()}
    first = [(float(s) / (75 + 405), "first", c) for c, s in enumerate(slopes["second"])]
    second = [(float(s) / (324 + 18), "second", c) for c, s in enumerate(slopes["last"])]
    # the same channels, dropped by the one group of the layer, without the filter that writes them
    second_reads = [(float(s) / 405, "first", c) for c, s in enumerate(slopes["second"])]
    last_reads = [(float(s) / 18, "second", c) for c, s in enumerate(slopes["last"])]
    order = sorted([*first, *second, *second_reads, *last_reads])
    pruning = dspfx.GradualPruning(prepared, Budget(macs=0.85), total_steps=1, end=1, prunings=1)
    pruning.step()
    masks = dspfx.get_masks(prepared)
    _, where, channel = order[0]
    gone = masks["second"].any(0) if where == "first" else masks["last"].any(0)
    assert gone.tolist() == [c != channel for c in range(len(gone))]
    assert pruning.report is not None
    assert pruning.report.achieved <= 0.85


def test_it_falls_geometrically_between_begin_and_end() -> None:
    prepared = layers()
    pruning = dspfx.GradualPruning(
        prepared, Budget(macs=0.25), total_steps=20, begin=0.2, end=0.6, prunings=4
    )
    kept = []
    for step in range(20):
        prepared.zero_grad()
        loss(prepared, drawn(step)).backward()
        pruning.step()
        kept.append(1.0 if pruning.report is None else pruning.report.budget)
    assert kept[:5] == [1.0] * 5
    expected = [0.25 ** (n / 4) for n in (1, 1, 2, 2, 3, 3, 4)]
    assert kept[5:12] == pytest.approx(expected)
    assert kept[12:] == [pytest.approx(0.25)] * 8
    assert pruning.report is not None
    assert 0.2 < pruning.report.achieved <= 0.25


@pytest.mark.parametrize("fraction", [0.97, 0.8, 0.5, 0.3, 0.15])
def test_no_more_goes_than_must(fraction: float) -> None:
    prepared, budget = layers(), Budget(macs=fraction, count="masks")
    sensitivity = Sensitivity(prepared)
    loss(prepared).backward()
    sensitivity.update()
    (part,) = sensitive_parts(parts_of(prepared), [sensitivity], budget, [], groups=True)
    share = 2 * part.resolution  # of one of all that can go

    def macs(threshold: float) -> int:
        live = part.liveness(threshold)
        return total(part.analysis, live).macs

    left = [macs((number + 0.5) * share) for number in range(round(1 / share) + 1)]
    limit = fraction * total(part.analysis).macs
    found = prune_by(None, [part], budget, "")
    best = max(count for count in left if count <= limit)
    assert best <= found.after.macs <= limit  # with what fits in besides


def layers_take(monkeypatch: pytest.MonkeyPatch, a_mac: dict[str, float]) -> None:
    """A multiply-accumulate takes so long from now on, by layer, 1 by default."""

    def times(module: nn.Module, analysis: ChannelAnalysis, _: Budget) -> LayerTimes:
        macs = {node.name: cost.macs for node, cost in layer_costs(analysis).items()}
        found = {
            name: tuple(a_mac.get(name, 1.0) * share * whole for share in SHARES)
            for name, whole in macs.items()
        }
        return LayerTimes(found, {})

    monkeypatch.setattr(dspfx.pruning.latency, "layer_times", times)
    monkeypatch.setattr(dspfx.pruning.gradual, "WholeTimes", AsPredicted)


class AsPredicted:
    """Whole networks take what their layers promise, of which a test knows nothing else."""

    def __init__(self, budget: Budget, modules: Sequence[nn.Module]) -> None:
        (self.module,) = modules

    def fraction(self, modules: Sequence[nn.Module]) -> float:
        latency = Latency.of(parts_of(self.module), Budget(latency=0.5), Processes.of(self.module))
        assert latency is not None
        _, live = present_liveness(self.module)
        return latency.predict([live])


def pruned_to(budget: Budget) -> dspfx.PreparedModule:
    prepared = layers()
    pruning = dspfx.GradualPruning(prepared, budget, total_steps=8, prunings=4)
    train(prepared, pruning, 8, drawn)
    assert pruning.report is not None
    assert pruning.report.measured is None
    assert budget.fraction - 0.05 < pruning.report.achieved <= budget.fraction
    return prepared


def test_a_budget_of_latency_goes_by_the_time_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    layers_take(monkeypatch, {})
    like_macs = pruned_to(Budget(latency=0.4))
    by_macs = pruned_to(Budget(macs=0.4, count="masks"))
    for name, mask in dspfx.get_masks(by_macs).items():
        assert torch.equal(mask, dspfx.get_masks(like_macs)[name])
    layers_take(monkeypatch, {"side": 30.0})
    slow_side = pruned_to(Budget(latency=0.4))
    left, before = (dspfx.get_masks(p)["side"].sum() for p in (slow_side, like_macs))
    assert left < before


@pytest.mark.parametrize(("at", "step"), [(0.0, 1), (0.5, 2), (1.0, 4)])
def test_all_may_go_at_once(at: float, step: int) -> None:
    prepared = layers()
    pruning = dspfx.GradualPruning(prepared, Budget(macs=0.4), total_steps=4, begin=at, end=at)
    done = []
    for number in range(4):
        loss(prepared, drawn(number)).backward()
        pruning.step()
        done.append(pruning.prunings_done)
    assert done == [0] * (step - 1) + [40] * (5 - step)
    assert pruning.report is not None
    assert pruning.report.budget == pytest.approx(0.4)


@pytest.mark.parametrize("groups", [True, False])
def test_resnets_are_pruned_and_converted(groups: bool) -> None:
    torch.manual_seed(0)
    model = randomise(torchvision.models.resnet18(num_classes=10)).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    prepared = dspfx.prepare(model, x)
    dspfx.cluster_groups(prepared)
    prepared.train()
    pruning = dspfx.GradualPruning(
        prepared, Budget(macs=0.2), total_steps=8, begin=0, end=0.5, prunings=4, groups=groups
    )
    train(prepared, pruning, 8, lambda _: x)
    assert pruning.report is not None
    assert 0.18 < pruning.report.achieved <= 0.2
    masks = dspfx.get_masks(prepared)
    several = [len(torch.unique(m[m.any(1)], dim=0)) > 1 for m in masks.values()]
    assert any(several) == groups
    assert dspfx.convert(prepared)(x).shape == (2, 10)


def test_what_is_pruned_stays_so_with_other_groups() -> None:
    prepared = layers()
    dspfx.prune(prepared, Budget(macs=0.7))
    before = dspfx.get_masks(prepared)
    for layer in gated_layers(prepared).values():
        layer.gate.assign(torch.arange(len(layer.gate.mask)) % 2)
    pruning = dspfx.GradualPruning(
        prepared, Budget(macs=0.3), total_steps=4, begin=0, end=1, prunings=2
    )
    train(prepared, pruning, 4, drawn)
    after = dspfx.get_masks(prepared)
    assert not any((after[name] & ~before[name]).any() for name in before)
    assert pruning.report is not None
    assert pruning.report.achieved <= 0.3


def test_parameters_can_be_budgeted() -> None:
    prepared = layers()
    pruning = dspfx.GradualPruning(prepared, Budget(params=0.5), total_steps=4, end=1, prunings=2)
    train(prepared, pruning, 4, drawn)
    found = dspfx.report(prepared)
    assert found.after.parameters <= 0.5 * found.before.parameters


def test_widths_are_rounded() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    config = dspfx.PrepareConfig(round_to=8)
    prepared = dspfx.prepare(resnet10(num_classes=10), x, config=config)
    prepared.train()
    pruning = dspfx.GradualPruning(
        prepared, Budget(macs=0.4), total_steps=2, end=1, prunings=1, groups=False
    )
    train(prepared, pruning, 2, lambda _: x)
    convolutions = [m for m in dspfx.convert(prepared).modules() if isinstance(m, nn.Conv2d)]
    assert all(m.out_channels % 8 == 0 for m in convolutions)


def test_frozen_layers_and_what_they_read_stay() -> None:
    prepared = layers()
    for name in ("inner", "side"):
        prepared.get_submodule(name).weight.requires_grad_(False)
    pruning = dspfx.GradualPruning(
        prepared, Budget(macs=0.8), total_steps=2, begin=0, end=1, prunings=2
    )
    for step in range(2):
        prepared.zero_grad()
        loss(prepared, drawn(step)).backward()
        pruning.step()
    masks = dspfx.get_masks(prepared)
    assert masks["inner"].any(0).all()  # the stream, which two frozen layers read
    side = masks["side"]
    assert side[side.any(1)].all()
    assert not all(mask.all() for mask in masks.values())


@settings(max_examples=30, deadline=None)
@given(model=networks(), fraction=st.floats(0.05, 1.0), groups=st.booleans())
def test_pruned_random_networks_are_converted(
    model: nn.Module, fraction: float, groups: bool
) -> None:
    prepared = prepare(model, 2)
    if prepared is None:
        return
    dspfx.cluster_groups(prepared)
    try:
        pruning = dspfx.GradualPruning(
            prepared, Budget(macs=fraction), total_steps=3, end=1, prunings=3, groups=groups
        )
    except dspfx.BudgetError:
        return
    before = dspfx.get_masks(prepared)
    for step in range(3):
        prepared.zero_grad()
        x = inputs(model, step)
        try:
            sum(out.sin().sum() for out in leaves(prepared(x))).backward()
        except RuntimeError:  # what the model itself overwrites, too
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                sum(out.sin().sum() for out in leaves(model.train()(x))).backward()
            return
        try:
            pruning.step()
        except dspfx.BudgetError:
            return
        after = dspfx.get_masks(prepared)
        assert not any((after[name] & ~before[name]).any() for name in before)
        before = after
    assert pruning.report is not None
    assert pruning.report.achieved <= fraction
    x = inputs(model, 9)
    assert_equal(prepared.eval()(x), dspfx.convert(prepared)(x))


# -- around it -------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_same_to_the_last_bit() -> None:
    def made() -> tuple[dspfx.PreparedModule, dspfx.GradualPruning]:
        prepared = layers()
        return prepared, dspfx.GradualPruning(
            prepared, Budget(macs=0.3), total_steps=10, end=0.8, prunings=5
        )

    whole, pruning = made()
    train(whole, pruning, 10, drawn)
    model, begun = made()
    train(model, begun, 4, drawn)
    saved = copy.deepcopy((model.state_dict(), begun.state_dict()))
    resumed, pruning = made()
    for layer in gated_layers(resumed).values():  # the groups are in the model's state
        layer.gate.logits.zero_()
    pruning.load_state_dict(saved[1])
    resumed.load_state_dict(saved[0])
    train(resumed, pruning, 6, lambda step: drawn(step + 4))
    assert pruning.steps_done == 10
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_measuring_leaves_the_random_numbers_of_the_user_alone() -> None:
    prepared, before = layers(), torch.get_rng_state()
    budget = Budget(latency=0.5)
    latency = Latency.of(parts_of(prepared), budget, Processes.of(prepared))  # in float64
    assert latency is not None
    assert latency.tables[0].predict() > 0
    assert torch.equal(before, torch.get_rng_state())


def test_layers_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    none = LayerTimes({}, {})
    monkeypatch.setattr(dspfx.pruning.latency, "layer_times", lambda *_: measured.append(1) or none)
    dspfx.GradualPruning(layers(), Budget(latency=0.4), total_steps=10)
    assert len(measured) == 1


def test_a_resumed_run_knows_the_times_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(a_mac: dict[str, float]) -> dspfx.GradualPruning:
        layers_take(monkeypatch, a_mac)
        return dspfx.GradualPruning(layers(), Budget(latency=0.4), total_steps=10)

    first, resumed = made({"side": 30.0}), made({"side": 3.0, "up": 7.0})
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert resumed.latency is not None
    assert first.latency is not None
    assert resumed.latency.state() == first.latency.state()
    assert resumed.latency.tables[0].predict() == first.latency.tables[0].predict()
    others = LayerTimes({"stem": (1.0,) * len(SHARES)}, {})
    monkeypatch.setattr(dspfx.pruning.latency, "layer_times", lambda *_: others)
    with pytest.raises(dspfx.LearnError, match="another model"):
        dspfx.GradualPruning(layers(), Budget(latency=0.4), total_steps=10).load_state_dict(
            first.state_dict()
        )


def test_states_of_others_are_refused() -> None:
    state = dspfx.GradualPruning(layers(), Budget(macs=0.5), total_steps=10).state_dict()
    pruning = dspfx.GradualPruning(layers(), Budget(macs=0.5), total_steps=11)
    with pytest.raises(dspfx.LearnError, match="total_steps=10"):
        pruning.load_state_dict(state)
    with pytest.raises(dspfx.LearnError, match="no state of a GradualPruning"):
        pruning.load_state_dict({})
    other = dspfx.GradualPruning(layers(), Budget(macs=0.4), total_steps=10)
    with pytest.raises(dspfx.LearnError, match=r"saved with budget=.*0\.5"):
        other.load_state_dict(state)
    with pytest.raises(dspfx.LearnError, match="another model"):
        dspfx.GradualPruning(layers(3), Budget(macs=0.5), total_steps=10).load_state_dict(state)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"total_steps": 0}, "at least 1"),
        ({"prunings": 0}, "at least 1"),
        ({"begin": 0.5, "end": 0.4}, "begin <= end"),
        ({"decay": 1.5}, "decay must be in"),
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(dspfx.LearnError, match=message):
        dspfx.GradualPruning(layers(), Budget(macs=0.5), **{"total_steps": 10, **wrong})


def test_a_budget_that_cannot_be_is_refused_at_once() -> None:
    prepared = layers()
    refused = pytest.raises(dspfx.BudgetError, match="one channel left to every layer")
    with unchanged(prepared), refused:
        dspfx.GradualPruning(prepared, Budget(macs=1e-5), total_steps=10)
    with pytest.raises(dspfx.ConvertError):
        dspfx.GradualPruning(nn.Conv2d(3, 3, 1), Budget(macs=0.5), total_steps=10)


def test_it_ends() -> None:
    prepared = layers()
    pruning = dspfx.GradualPruning(prepared, Budget(macs=0.9), total_steps=1)
    train(prepared, pruning, 1, drawn)
    with pytest.raises(dspfx.LearnError, match="all 1 steps are done"):
        pruning.step()


def test_a_step_without_gradients_is_an_error() -> None:
    prepared = layers()
    pruning = dspfx.GradualPruning(prepared, Budget(macs=0.5), total_steps=1, begin=0, prunings=1)
    with pytest.raises(dspfx.LearnError, match="after the backward pass"):
        pruning.step()
    assert pruning.steps_done == 0
    loss(prepared).backward()
    pruning.step()
    assert pruning.report is not None
    assert pruning.report.achieved <= 0.5


def test_gradients_that_were_all_zeroed_are_an_error() -> None:
    """Everything went in the order of the layers."""
    prepared = layers()
    pruning = dspfx.GradualPruning(prepared, Budget(macs=0.5), total_steps=1, begin=0, prunings=1)
    loss(prepared).backward()
    for parameter in prepared.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    before = dspfx.get_masks(prepared)
    with pytest.raises(dspfx.LearnError, match="all gradients were zero"):
        pruning.step()
    assert all(torch.equal(mask, before[name]) for name, mask in dspfx.get_masks(prepared).items())


@pytest.mark.parametrize("budget", [0.5, None])
def test_a_number_is_no_budget(budget: Any) -> None:
    prepared = layers()
    with pytest.raises(dspfx.BudgetError, match="is no budget"):
        dspfx.GradualPruning(prepared, budget, total_steps=1)
    with pytest.raises(dspfx.BudgetError, match="is no budget"):
        dspfx.prune(prepared, budget)
    with pytest.raises(dspfx.BudgetError, match="fraction in"):
        Budget(macs="0.5")  # type: ignore[arg-type]


def test_a_model_that_is_compiled_is_not_compiled_at_every_pruning() -> None:
    """Whether anything is masked was a guard, and layer after layer broke it."""
    prepared = layers()
    dspfx.cluster_groups(prepared)
    counter = CompileCounter()
    compiled = torch.compile(prepared, backend=counter, fullgraph=True)
    pruning = dspfx.GradualPruning(prepared, Budget(macs=0.3), total_steps=20, end=1.0)
    for step in range(20):
        loss(compiled, drawn(step)).backward()
        pruning.step()
    assert counter.frame_count == 1
    assert not all(mask.all() for mask in dspfx.get_masks(prepared).values())
    assert_equal(compiled(X), prepared(X))


# -- layers that are not always trained ------------------------------------------------------------


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.right, self.more = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        right = self.more(self.right(x).relu()).relu()
        return self.heads[0](self.left(x).relu().mean((2, 3))), self.heads[1](right.mean((2, 3)))


def test_a_layer_that_one_batch_does_not_reach_is_known_all_the_same() -> None:
    prepared = dspfx.prepare(randomise(TwoHeads()).double(), X).train()
    pruning = dspfx.GradualPruning(
        prepared, Budget(macs=0.3), total_steps=20, begin=0.1, end=0.9, prunings=5
    )
    for step in range(20):
        prepared.zero_grad()
        left, right = prepared(drawn(step))
        (left if step == 1 else left + right).sin().sum().backward()
        pruning.step()
    assert pruning.report is not None
    assert pruning.report.achieved <= 0.3


@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_frozen_layers_read_stays_whatever_gradient_is_left_there(set_to_none: bool) -> None:
    prepared = layers()
    loss(prepared).backward()
    for name in ("inner", "side", "up"):
        prepared.get_submodule(name).weight.requires_grad_(False)
    pruning = dspfx.GradualPruning(
        prepared, Budget(macs=0.9), total_steps=4, begin=0, end=1, prunings=2
    )
    for step in range(4):
        prepared.zero_grad(set_to_none=set_to_none)
        loss(prepared, drawn(step)).backward()
        pruning.step()
    masks = dspfx.get_masks(prepared)
    for name in ("inner", "side", "up"):
        assert masks[name][masks[name].any(1)].all()


def test_a_budget_that_frozen_layers_put_out_of_reach_is_refused_at_once() -> None:
    prepared = layers()
    for name in ("inner", "side", "up"):
        prepared.get_submodule(name).weight.requires_grad_(False)
    with unchanged(prepared), pytest.raises(dspfx.BudgetError, match="cannot be reached"):
        dspfx.GradualPruning(prepared, Budget(macs=0.15), total_steps=10)


def test_a_layer_that_thaws_counts_and_a_resumed_run_knows_it() -> None:
    def made() -> tuple[dspfx.PreparedModule, dspfx.GradualPruning]:
        prepared = layers()
        return prepared, dspfx.GradualPruning(
            prepared, Budget(macs=0.3), total_steps=12, begin=0.5, end=1, prunings=3
        )

    def go_on(prepared: nn.Module, pruning: dspfx.GradualPruning, steps: range) -> None:
        for step in steps:
            prepared.get_submodule("side").weight.requires_grad_(step >= 2)
            prepared.zero_grad()
            loss(prepared, drawn(step)).backward()
            pruning.step()

    whole, pruning = made()
    go_on(whole, pruning, range(12))
    first, begun = made()
    go_on(first, begun, range(4))
    resumed, again = made()
    again.load_state_dict(copy.deepcopy(begun.state_dict()))
    go_on(resumed, again, range(4, 12))
    expected, found = dspfx.get_masks(whole), dspfx.get_masks(resumed)
    assert not expected["side"].all()
    assert all(torch.equal(mask, found[name]) for name, mask in expected.items())


def test_nothing_goes_before_anything_is_known() -> None:
    prepared = layers()
    pruning = dspfx.GradualPruning(
        prepared, Budget(macs=0.5), total_steps=4, begin=0, end=1, prunings=4
    )
    for step in range(4):
        prepared.zero_grad()
        (loss(prepared, drawn(step)) * (torch.inf if step < 2 else 1.0)).backward()
        pruning.step()
        assert (pruning.report is None) == (step < 2)
    assert pruning.report is not None
    assert pruning.report.achieved <= 0.5


def test_groups_that_change_on_the_way_are_an_error() -> None:
    prepared = layers()
    pruning = dspfx.GradualPruning(
        prepared, Budget(macs=0.5), total_steps=4, begin=0, end=1, prunings=2
    )
    train(prepared, pruning, 1, drawn)
    gate = gated_layers(prepared)["side"].gate
    gate.assign(1 - gate.assignment)
    masks = dspfx.get_masks(prepared)
    with pytest.raises(dspfx.LearnError, match="changed groups"):
        train(prepared, pruning, 1, drawn)
    assert all(torch.equal(mask, masks[name]) for name, mask in dspfx.get_masks(prepared).items())


@pytest.mark.parametrize(("width", "n"), [(20, 8), (24, 16)])
def test_widths_are_rounded_again_and_again(width: int, n: int) -> None:
    """What is dead is no part of them."""
    torch.manual_seed(0)
    chain = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(2):
        chain += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*chain, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    prepared = dspfx.prepare(model.double(), x, config=dspfx.PrepareConfig(round_to=n)).train()
    pruning = dspfx.GradualPruning(
        prepared, Budget(macs=0.5), total_steps=8, begin=0, end=1, prunings=8, groups=False
    )
    train(prepared, pruning, 8, lambda _: x)
    convolutions = [m for m in dspfx.convert(prepared).modules() if isinstance(m, nn.Conv2d)]
    widths = [m.out_channels for m in convolutions]
    assert all(w % n == 0 or w == width for w in widths)


def test_a_pruning_says_where_it_is() -> None:
    prepared = layers().train()
    pruning = dspfx.GradualPruning(prepared, Budget(macs=0.5), total_steps=10, prunings=4, end=1)
    assert repr(pruning) == "GradualPruning(budget 50.00%, step 0 of 10, pruning 0 of 4)"
    train(prepared, pruning, 6, drawn)
    assert pruning.report is not None
    left = f"{pruning.report.achieved:.2%} left"
    assert repr(pruning) == f"GradualPruning(budget 50.00%, {left}, step 6 of 10, pruning 2 of 4)"
