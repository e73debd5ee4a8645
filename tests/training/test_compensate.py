"""`compensate`: exact where it can be, never worse, and nothing else touched."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detector import IMAGES, Detector
from hypothesis import given, settings
from hypothesis import strategies as st
from test_properties import COUNT, EXAMPLES, inputs, prepare
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import dspfx
from dspfx.layers.gated import gated_layers
from dspfx.layers.weights import spread
from dspfx.training.repair import compensate as own
from dspfx.training.repair.least_squares import NormalEquations
from helpers import assert_equal, random_masks, randomise, unchanged
from random_networks import MaskRecipe, Mirrored, Twice, mask_recipes, networks

X = torch.randn(12, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(seed: int = 0) -> nn.Sequential:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False)),
        *(nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, groups=6)),
        *(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)),
    )
    return randomise(model, seed).double().eval()  # type: ignore[return-value]


def pruned(model: nn.Module, x: Any = X, seed: int = 0, **config: Any) -> Any:
    prepared = dspfx.prepare(model, x, config=dspfx.PrepareConfig(**config))
    dspfx.set_masks(prepared, random_masks(prepared, seed=seed))
    return prepared


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# -- exact ---------------------------------------------------------------------------------------


def dependent(first: Any) -> Any:
    """The last filter of a layer is a combination of the first two."""
    with torch.no_grad():
        for tensor in first.double().parameters():
            tensor[-1] = 2 * tensor[0] - tensor[1]
    return first


def sized(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, *size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("first", "second", "x"),
    [
        (nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, 2, 1), sized(3, 8, 7)),
        (nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, (3, 1), padding="same", dilation=2), sized(3, 8, 7)),
        (
            nn.Conv2d(3, 6, 3),
            nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"),
            sized(3, 8, 7),
        ),
        (nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, groups=2), sized(3, 8, 7)),
        (nn.Conv1d(3, 6, 2), nn.Conv1d(6, 4, 3, bias=False), sized(3, 12)),
        (nn.Conv3d(3, 6, 1), nn.Conv3d(6, 4, (1, 2, 2)), sized(3, 4, 5, 4)),
        (nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), sized(3, 5, 4)),
        (nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 4, 3, 1, 2, groups=2), sized(3, 5, 4)),
        (nn.Conv1d(3, 6, 1), nn.ConvTranspose1d(6, 4, 2, 3), sized(3, 7)),
        (nn.Linear(3, 6), nn.Linear(6, 4), sized(3)),
        (nn.Linear(3, 6), nn.Linear(6, 4, bias=False), sized(5, 3)),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_what_can_be_had_from_the_other_inputs_is_repaired_exactly(
    first: nn.Module, second: nn.Module, x: Tensor
) -> None:
    torch.manual_seed(0)
    last = nn.Linear(4, 4) if isinstance(second, nn.Linear) else nn.Identity()
    model = nn.Sequential(dependent(first), second, last).double()
    prepared: Any = dspfx.prepare(model, x)
    mask = dspfx.get_masks(prepared)["1"]
    mask[:, -1] = False  # of grouped layers also the third, which others cannot tell
    if getattr(second, "groups", 1) > 1:
        with torch.no_grad():
            for tensor in first.parameters():
                tensor[2] = tensor[0] - tensor[1]
                tensor[5] = tensor[3] + tensor[4]
        prepared = dspfx.prepare(model, x)
    dspfx.set_masks(prepared, {"1": mask})
    with torch.no_grad():
        assert float((prepared(x) - model(x)).abs().max()) > 0.01
        done = dspfx.compensate(prepared, [x[:5], x[5:]], ridge=0.0)
        assert_equal(model(x), prepared(x))
        assert_equal(model(x), dspfx.convert(prepared)(x))
    assert done.before["1"] > 1e-4
    assert done.after["1"] < 1e-12
    assert not done.left_alone


def test_every_group_is_fitted_to_its_own_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(dependent(nn.Conv2d(3, 6, 1)), nn.Conv2d(6, 4, 3), nn.Conv2d(4, 4, 1))
    prepared: Any = dspfx.prepare(model.double(), X)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:2, 5], mask[2:, 0] = False, False  # either can be had from the others
    dspfx.set_masks(prepared, {"1": mask})
    dspfx.compensate(prepared, [X], ridge=0.0)
    with torch.no_grad():
        assert_equal(model(X), prepared(X))


@pytest.mark.parametrize("bias", [True, False])
def test_the_constant_goes_into_the_bias_or_the_norm(bias: bool) -> None:
    """A channel that does not vary is all constant."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 6, 1)
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        first.weight[2], first.bias[2] = 0, 5.0
    model = nn.Sequential(first, nn.ReLU(), nn.Conv2d(6, 4, 3, bias=bias), norm, nn.Conv2d(4, 4, 1))
    randomise(norm)
    prepared: Any = dspfx.prepare(model.double().eval(), X)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, 2] = False
    dspfx.set_masks(prepared, {"2": mask})
    dspfx.compensate(prepared, [X])
    with torch.no_grad():
        assert_equal(model(X), prepared(X))
        assert_equal(model(X), dspfx.convert(prepared)(X))
    assert torch.equal(prepared.get_submodule("3").running_mean, norm.running_mean) == bias


def test_filters_of_depthwise_layers_are_scaled_again() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 3, groups=6))
    model.append(nn.Conv2d(6, 4, 1))
    prepared: Any = dspfx.prepare(model.double(), X)
    masks = random_masks(prepared)
    dspfx.set_masks(prepared, masks)
    twin = copy.deepcopy(prepared)
    done = dspfx.compensate(prepared, [X], ridge=0.0)
    # channel by channel, what the layer gives is regressed on what it is given
    with torch.no_grad():
        wanted, read = model[:3](X), prepared.get_submodule("1")(model[0](X))
    own = prepared.get_submodule("2")
    for c in range(6):
        windows = nn.functional.unfold(read[:, [c]], 3).transpose(1, 2).reshape(-1, 9)
        windows = torch.cat([windows, torch.ones_like(windows[:, :1])], 1)
        found = torch.linalg.lstsq(windows, wanted[:, c].reshape(-1, 1)).solution[:, 0]
        assert_equal(found[:9], own.weight[c].flatten(), 1e-7)
        assert_equal(found[9:], own.bias[c : c + 1], 1e-7)
    assert done.after.keys() == {"1", "2", "3"}
    assert not torch.equal(own.weight, twin.get_submodule("2").weight)


# -- never worse ---------------------------------------------------------------------------------


def errors(dense: nn.Module, prepared: Any, names: list[str]) -> dict[str, float]:
    """What each layer lacks of the dense one, relative to its variance, of filters alive; hooks."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, y, name=name: seen[name].append(y.clone())
        )
        for model in (dense, prepared)
        for name in names
    ]
    with torch.no_grad():
        dense(X)
        prepared(X)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, (wanted, actual) in seen.items():
        layer = prepared.get_submodule(name)
        alive = layer.gate.alive if hasattr(layer, "gate") else slice(None)
        wanted, actual = (y.transpose(0, 1)[alive].flatten(1) for y in (wanted, actual))
        variance = wanted.var(1, correction=0).sum()
        found[name] = float((wanted - actual).square().mean(1).sum() / variance)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
def test_no_layer_is_worse_on_what_it_was_fitted_on(seed: int, ridge: float) -> None:
    model = network(seed)
    prepared = pruned(model, seed=seed)
    done = dspfx.compensate(prepared, [X[:7], X[7:]], ridge=ridge)
    assert list(done.after) == ["3", "6", "7", "10"]
    for name in done.after:
        assert done.after[name] <= done.before[name] * (1 + 1e-12)
    for name, error in errors(model, prepared, ["7", "10"]).items():
        assert done.after[name] == pytest.approx(error)
    dspfx.convert(prepared)


def test_errors_are_those_of_the_layers() -> None:
    model = network()
    prepared = dspfx.prepare(model, X)
    dspfx.set_masks(prepared, {"7": random_masks(prepared)["7"]})
    before = errors(model, prepared, ["7"])["7"]
    done = dspfx.compensate(prepared, [X])
    assert done.before["7"] == pytest.approx(before)
    assert done.after["7"] == pytest.approx(errors(model, prepared, ["7"])["7"])
    assert done.after["7"] < before
    assert str(done).splitlines()[-2].startswith(f"7: error {before:.2%} -> ")


def test_stronger_ridges_stay_closer_to_the_weights() -> None:
    model = network()
    moved = []
    for ridge in (1e-6, 1e-2, 1.0, 1e6):
        prepared = pruned(model)
        dspfx.compensate(prepared, [X], ridge=ridge)
        moved.append(float((prepared.get_submodule("3").weight - model[3].weight).detach().norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 1e-4


@settings(EXAMPLES, max_examples=max(1, COUNT // 4))
@given(model=networks(), recipe=mask_recipes(), groups=st.integers(1, 4))
def test_any_network(model: nn.Module, recipe: MaskRecipe, groups: int) -> None:
    """Masked equals compact, dead weights stay as they are, and no fit is worse."""
    prepared = prepare(model, groups)
    if prepared is None:
        return
    dspfx.set_masks(prepared, recipe.masks(prepared))
    before = weights_of(prepared)
    x = inputs(model, 1, samples=5)
    with torch.no_grad():
        x_before = x.clone()
        done = dspfx.compensate(prepared, [x[:2].clone(), x[2:].clone()])
        assert torch.equal(x, x_before)
        compact = dspfx.convert(prepared)
        assert_equal(prepared(x.clone()), compact(x.clone()))
    for name, after in done.after.items():
        assert after <= done.before[name] * (1 + 1e-9) + 1e-12
    changed = {f"{name}.weight" for name in done.after} | {f"{name}.bias" for name in done.after}
    for name, tensor in prepared.state_dict().items():
        if name not in changed and not name.endswith("running_mean"):
            assert torch.equal(tensor, before[name])
    for name, layer in gated_layers(prepared).items():
        if name in done.after:
            masked = ~spread(layer, layer.gate.mask).expand_as(layer.weight)
            assert torch.equal(layer.weight[masked], before[f"{name}.weight"][masked])


def test_large_layers_are_fitted_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    whole, blocks = pruned(model), pruned(model)
    at_once = dspfx.compensate(whole, [X])
    monkeypatch.setattr(own, "LARGEST", 20)
    done = dspfx.compensate(blocks, [X])
    for name in ("3", "7", "10"):
        assert done.after[name] < done.before[name]
    assert at_once.after["3"] <= done.after["3"]
    dspfx.convert(blocks)


def test_a_network_that_is_not_pruned_stays_as_it_is() -> None:
    prepared = dspfx.prepare(network(), X)
    with unchanged(prepared):
        done = dspfx.compensate(prepared, [X])
    assert not done.after
    with pytest.raises(dspfx.DataError, match="no batch"):
        dspfx.compensate(prepared, [])


def test_where_nothing_is_left_there_is_nothing_to_fit() -> None:
    prepared = dspfx.prepare(network()[:4], X)
    dspfx.set_masks(prepared, {"3": torch.zeros(6, 8, dtype=torch.bool)})
    with unchanged(prepared):
        assert not dspfx.compensate(prepared, [X]).after


# -- what is fitted ------------------------------------------------------------------------------


class Around(nn.Module):
    """A step between convolutions."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)
        self.step, self.last = step, nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.step(self.second(self.first(x))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x)) + self.b(x)


class Opaque(Mirrored):
    """It is not traced."""


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def with_a_hook() -> nn.Module:
    layer = nn.Conv2d(6, 6, 1)
    layer.register_forward_hook(lambda _, __, y: y * 2)
    return layer


@pytest.mark.parametrize(
    ("step", "fitted", "left_alone"),
    [
        (lambda: Mirrored(6, "silu"), {"step.body.conv"}, {}),
        (lambda: Twice(6, "silu"), set(), {"step.body.conv": "depends on its own output"}),
        (Tied, set(), {"step.a": "with step.b", "step.b": "with step.a"}),
        (
            lambda: parametrizations.weight_norm(nn.Conv2d(6, 6, 1)),
            set(),
            {"step": "a parametrisation computes its weight"},
        ),
        (with_a_hook, set(), {"step": "hooks"}),
        (lambda: Doubled(6, 6, 1), set(), {"step": "Doubled may compute something else"}),
        (lambda: Opaque(6, "silu"), set(), {"step.body.conv": "called as a whole"}),
    ],
    ids=["two calls", "again", "tied", "computed", "hook", "own class", "opaque"],
)
def test_layers_that_cannot_be_fitted_stay_and_say_why(
    step: Callable[[], nn.Module], fitted: set[str], left_alone: dict[str, str]
) -> None:
    torch.manual_seed(0)
    model = Around(randomise(step())).double().eval()
    prepared: Any = pruned(
        model, opaque=("step",) if isinstance(model.step, Opaque | Doubled) else ()
    )
    before = weights_of(prepared)
    done = dspfx.compensate(prepared, [X])
    assert done.after.keys() == {"second", "last"} | fitted
    assert done.left_alone.keys() == left_alone.keys()
    for name, words in left_alone.items():
        assert words in done.left_alone[name]
        assert name in str(done)
        for key, tensor in prepared.state_dict().items():
            if key.startswith(f"{name}."):
                assert torch.equal(tensor, before[key])
    for name in done.after:
        assert done.after[name] <= done.before[name] * (1 + 1e-12)
    dspfx.convert(prepared)


def test_models_in_parts() -> None:
    """Each part comes closer to what it gave, dense, for the same inputs."""
    model = randomise(Detector()).double().eval()
    prepared: Any = dspfx.prepare(model, (IMAGES,))
    assert not isinstance(prepared, dspfx.PreparedModule)
    dspfx.set_masks(prepared, random_masks(prepared))
    done = dspfx.compensate(prepared, [(IMAGES,)])
    assert {"backbone.2", "head.conv", "head.out"} <= done.after.keys()
    for name, after in done.after.items():
        assert after <= done.before[name] * (1 + 1e-12)
    assert_equal(prepared(IMAGES), dspfx.convert(prepared)(IMAGES))


# -- what is changed -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_only_weights_change(dtype: torch.dtype, training: bool) -> None:
    prepared = pruned(network().to(dtype), X.to(dtype)).train(training)
    prepared.get_submodule("4").eval()  # frozen by the user
    modes = {name: module.training for name, module in prepared.named_modules()}
    graph, before = prepared.graph, weights_of(prepared)
    done = dspfx.compensate(prepared, [X.to(dtype)])
    assert {name: module.training for name, module in prepared.named_modules()} == modes
    assert prepared.graph is graph
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in prepared.modules())
    written = {"3.weight", "4.running_mean", "6.weight", "6.bias", "7.weight", "7.bias"}
    written |= {"10.weight", "10.bias"}
    for name, tensor in prepared.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]) == (name not in written)
    assert list(done.after) == ["3", "6", "7", "10"]
    assert all(p.requires_grad and p.grad is None for p in prepared.parameters())
    dspfx.convert(prepared.eval())


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.middle, self.last = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(torch.relu(self.middle(self.a(x) + self.b(y))))


def test_batches_of_any_form() -> None:
    torch.manual_seed(0)
    model = Pair().double()
    y, label = X.flip(1), torch.zeros(12)
    found = []
    for batches, call in [
        ([(X, y)], None),
        ([[X, y, label]], None),
        ([{"x": X, "y": y}], None),
        (iter([(X, y)]), None),  # gone through more than once
        ([{"left": X, "label": label}], lambda m, b: m(b["left"], b["left"].flip(1))),
    ]:
        prepared = pruned(model, (X, y))
        own = None if call is None else (lambda b, m=prepared, call=call: call(m, b))
        dspfx.compensate(prepared, batches, call=own)
        found.append(weights_of(prepared))
    for state in found[1:]:
        assert all(torch.equal(state[name], found[0][name]) for name in state)


def test_errors_change_nothing() -> None:
    prepared = pruned(network())
    last = X.clone()
    last[-1, 0, 0, 0] = float("nan")
    calls = []

    def fails_later(batch: Tensor) -> None:
        calls.append(batch)
        if len(calls) > 4:
            raise RuntimeError("no more")
        prepared(batch)

    for batches, options, error, words in [
        ([], {}, dspfx.DataError, "no batch"),
        (iter(()), {}, dspfx.DataError, "no batch"),
        ([X, last], {}, dspfx.DataError, "not finite at 3"),
        ([X, X[:, :2]], {}, RuntimeError, "channels"),
        ([X], {"ridge": -1.0}, dspfx.DataError, "ridge"),
        ([X], {"ridge": float("nan")}, dspfx.DataError, "ridge"),
        ([X], {"call": network()}, dspfx.DataError, "reached no layer"),
        ([X, X], {"call": fails_later}, RuntimeError, "no more"),
    ]:
        with unchanged(prepared), pytest.raises(error, match=words):
            dspfx.compensate(prepared, batches, **options)
    with pytest.raises(dspfx.ConvertError, match="never prepared"):
        dspfx.compensate(network(), [X])


def test_outputs_of_other_shapes_cannot_be_compared() -> None:
    layer = nn.Conv2d(3, 4, 1).double()
    mask = torch.ones(4, 3, dtype=torch.bool)
    system = NormalEquations("layer", layer, mask, None, intercept=True)
    with pytest.raises(dspfx.DataError, match=r"layer gives \(12, 4, 9, 9\), and \(5, 4, 9, 9\)"):
        system.see(X, layer(X[:5]), layer(X))


def test_wrapped_models() -> None:
    plain = pruned(network())
    wrapped = torch.nn.DataParallel(copy.deepcopy(plain))
    dspfx.compensate(plain, [X])
    dspfx.compensate(wrapped, [X])
    for name, tensor in wrapped.module.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name])
