"""A model that does not train as its graph would is refused, or runs as it is."""

import contextlib
import copy
import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, randomise

X = torch.randn(3, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Convs(nn.Module):
    """Two convolutions, between which something happens that shows in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.norm(self.a(x)).relu()))

    def between(self, y: Tensor) -> Tensor:
        return y


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Reverses(Convs):
    def between(self, y: Tensor) -> Tensor:
        return Reverse.apply(y)


class SetsAMode(Convs):
    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        return super().forward(x)


class AsksForGradients(Convs):
    def between(self, y: Tensor) -> Tensor:
        return 2 * y if y.requires_grad else y


class Decays(Convs):
    def between(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter in self.b.parameters() if self.training else ():
                parameter.mul_(0.9)
        return y


class WritesThroughAList(Convs):
    def between(self, y: Tensor) -> Tensor:
        for buffer in self.buffers(recurse=False) if self.training else ():
            buffer.add_(1)
        return y


class CallsHooks(Convs):
    def __init__(self) -> None:
        super().__init__()
        self.b.register_full_backward_hook(self.twice)

    def twice(self, _: nn.Module, given: tuple[Tensor, ...], *__: Any) -> tuple[Tensor, ...]:
        return tuple(2 * gradient for gradient in given)


class PassesOnWhatIsNotRecorded(Convs):
    def between(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            parts = (2 * y).chunk(2, 1)
        return torch.cat(parts, 1)


REFUSED = [
    (Reverses, "the gradient of inner.a.weight"),
    (SetsAMode, "the gradient of inner.a.weight"),
    (AsksForGradients, "the gradient of inner.a.weight"),
    (Decays, "the gradient of inner.a.weight"),
    (WritesThroughAList, "the buffer inner.calls"),
    (PassesOnWhatIsNotRecorded, "the gradient of inner.a.weight"),
]


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.c, self.d = inner, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.inner(x)).relu())


@pytest.mark.parametrize(("kind", "what"), REFUSED)
def test_a_graph_that_trains_otherwise_is_refused(kind: type[Convs], what: str) -> None:
    """All of these were prepared, and learned something else than the model."""
    model = randomise(Around(kind())).double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(dspfx.TraceError, match=f"after one pass, {what} differs"):
        dspfx.prepare(model, X)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    prepared = dspfx.prepare(model, X, config=dspfx.PrepareConfig(opaque=("inner",)))
    assert list(gated_layers(prepared)) == ["c", "d"]
    assert_trains_alike(model, prepared)


def assert_trains_alike(model: nn.Module, prepared: nn.Module) -> None:
    """For three steps: outputs, gradients and buffers."""
    model, prepared = copy.deepcopy(model), copy.deepcopy(prepared)
    model.train(), prepared.train()
    for step in range(3):
        results = []
        for module in (model, prepared):
            torch.manual_seed(step)
            random.seed(step)
            np.random.seed(step)
            results.append(module(X + step))
            results[-1].square().mean().backward()
        assert_equal(*results, tolerance=1e-12)
    for name, buffer in model.named_buffers():
        assert_equal(buffer, prepared.get_buffer(name), tolerance=1e-12)
    for name, parameter in model.named_parameters():
        expected, actual = parameter.grad, prepared.get_parameter(name).grad
        assert (expected is None) == (actual is None)
        if expected is not None:
            assert_equal(expected, actual, tolerance=1e-12)


class SkipsByChance(Convs):
    def between(self, y: Tensor) -> Tensor:
        return y if self.training and random.random() < 0.5 else 2 * y


class ScalesByChance(Convs):
    def between(self, y: Tensor) -> Tensor:
        return y * np.random.uniform(0.5, 1.5) if self.training else y


class TossesACoin(Convs):
    def between(self, y: Tensor) -> Tensor:
        return y if self.training and torch.rand(1) < 0.5 else 2 * y


@pytest.mark.parametrize("kind", [SkipsByChance, ScalesByChance, TossesACoin])
def test_chance_is_not_fixed_to_what_it_was(kind: type[Convs]) -> None:
    """The branch that was taken, or the number that was drawn, while tracing was taken for good."""
    state = random.getstate()
    with pytest.raises(dspfx.TraceError, match=r"draws random numbers|depends on the values"):
        dspfx.prepare(randomise(kind()).double(), X)
    model = randomise(Around(kind())).double()
    prepared = dspfx.prepare(model, X)
    assert list(gated_layers(prepared)) == ["c", "d"]
    assert_trains_alike(model, prepared)
    assert random.getstate() != state or kind is TossesACoin  # drawn by the steps above


class AddsNoise(Convs):
    def between(self, y: Tensor) -> Tensor:
        if not self.training:
            return y
        some = torch.randn(8, 1, 1) + torch.rand(8, 1, 1) + torch.normal(0.0, 1.0, (8, 1, 1))
        return y[torch.randperm(3)] + some * torch.randint(0, 8, (8, 1, 1))


@pytest.mark.parametrize("kind", [AddsNoise, CallsHooks])
def test_noise_and_hooks_are_kept(kind: type[Convs]) -> None:
    """Noise of a constant size was drawn once, while tracing; hooks of gated layers were lost."""
    model = randomise(kind()).double()
    prepared = dspfx.prepare(model, X)
    assert "b" in gated_layers(prepared)
    assert_trains_alike(model, prepared)


def test_preparing_draws_nothing() -> None:
    models = [Around(kind()).double() for kind in (ScalesByChance, SkipsByChance)]

    def draw() -> tuple[float, ...]:
        return random.random(), np.random.random(), torch.rand(1).item()

    def start() -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)

    start()
    expected = draw()
    start()
    for model in models:
        dspfx.prepare(model, X)
    assert draw() == expected


class FreezesItsNorm(Convs):
    def train(self, mode: bool = True) -> "FreezesItsNorm":
        super().train(mode)
        self.norm.eval()
        return self


@pytest.mark.parametrize("inside", [False, True])
def test_modules_that_the_model_keeps_in_evaluation_stay_there(inside: bool) -> None:
    """The batch norm learned, since a prepared module had only torch's `train`."""
    model = randomise(Around(FreezesItsNorm()) if inside else FreezesItsNorm()).double().train()
    norm = "inner.norm" if inside else "norm"
    prepared = dspfx.prepare(model, X)
    copies = [prepared, copy.deepcopy(prepared)]
    dspfx.prune(prepared.eval(), dspfx.Budget(macs=0.8))
    narrow = dspfx.narrow(prepared.train())
    for module in (*copies, narrow, copy.deepcopy(narrow)):
        for mode in (False, True):
            module.train(mode)
            frozen = {name for name, child in module.named_modules() if not child.training}
            assert frozen == {norm} if mode else norm in frozen
    assert_trains_alike(model, copies[1])
    assert_equal(prepared.train()(X), narrow.train()(X))


class WritesData(Convs):
    def between(self, y: Tensor) -> Tensor:
        self.calls.data += 1
        return y


def test_values_that_were_written_without_a_trace_are_put_back() -> None:
    model = Around(WritesData()).double()
    config = dspfx.PrepareConfig(opaque=("inner",))
    prepared = dspfx.prepare(model, X, config=config)
    assert float(prepared.get_buffer("inner.calls")) == 0
    dspfx.convert(prepared.eval())
    assert float(prepared.get_buffer("inner.calls")) == 0


class TrainReturnsNothing(Convs):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)


def test_train_may_return_nothing(tmp_path: Path) -> None:
    """`prepare` said that the model does not accept its inputs."""
    model = TrainReturnsNothing().double()
    prepared = dspfx.prepare(model, X)
    dspfx.prune(prepared, dspfx.Budget(macs=0.8))
    compact = dspfx.convert(prepared)
    assert_equal(prepared.eval()(X), compact(X))
    dspfx.save(compact, tmp_path / "compact.dspfx")
    assert_equal(compact(X), dspfx.load(tmp_path / "compact.dspfx", model)(X), tolerance=0)


class Detects(nn.Module):
    """Its own code has no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Convs(), nn.Conv2d(8, 4, 1)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.body.norm.eval()

    def forward(self, x: Tensor) -> Any:
        y = self.head(self.body(x))
        return y if y.isfinite().all() else None


def test_train_may_return_nothing_of_a_model_in_parts(tmp_path: Path) -> None:
    model = randomise(Detects()).double()
    prepared = dspfx.prepare(model, X)
    assert "body.b" in gated_layers(prepared)
    prepared.train()
    assert not prepared.get_submodule("body.norm").training
    assert_trains_alike(model, prepared)
    dspfx.prune(prepared, dspfx.Budget(macs=0.8))
    prepared.eval()
    compact = dspfx.convert(prepared)
    assert_equal(prepared(X), compact(X))
    dspfx.save(compact, tmp_path / "compact.dspfx")
    assert_equal(compact(X), dspfx.load(tmp_path / "compact.dspfx", model)(X), tolerance=0)


def alike(model: nn.Module, *gated: str, **named: Any) -> nn.Module:
    """`model`, prepared whole, with these layers gated."""
    prepared = dspfx.prepare(model, X, **named)
    assert isinstance(prepared, dspfx.PreparedModule)
    assert set(gated) <= gated_layers(prepared).keys()
    assert_trains_alike(model, prepared)
    return prepared


def test_other_devices_are_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed of 0 waited for CUDA, in place of the user's."""

    def fail(seed: int) -> None:
        raise AssertionError(f"seeded with {seed}")

    for place in (torch, torch.cuda):
        monkeypatch.setattr(place, "manual_seed", fail)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    assert "b" in gated_layers(dspfx.prepare(Convs().double(), X))


def test_gradients_of_what_is_shared_are_left_alone() -> None:
    """Closures and globals are not copied with a model, and backward reached them."""
    scale = nn.Parameter(torch.ones(8, 1, 1, dtype=torch.float64))

    class Shares(Convs):
        def between(self, y: Tensor) -> Tensor:
            return y * scale

    with contextlib.suppress(dspfx.TraceError):
        dspfx.prepare(Shares().double(), X)
    assert scale.grad is None


class Checkpoints(Convs):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        for _ in range(2):
            if self.training:
                y = checkpoint(self.block, y, use_reentrant=self.reentrant)
            else:
                y = self.block(y)
        return self.b(y)

    def block(self, y: Tensor) -> Tensor:
        return y + self.norm(y).relu()


class ChecksReentrantly(Checkpoints):
    reentrant = True


@pytest.mark.parametrize("kind", [Checkpoints, ChecksReentrantly])
def test_checkpoints_are_no_difference(kind: type[Convs]) -> None:
    """Their batch norms see each batch twice; gradients came in several pieces."""
    model = randomise(kind()).double()
    prepared = dspfx.prepare(model, X)
    assert isinstance(prepared, dspfx.PreparedModule)
    assert "b" in gated_layers(prepared)
    model.train(), prepared.train()
    assert_equal(model(X), prepared(X), tolerance=1e-12)


class DrawsItself(Convs):
    """From a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def between(self, y: Tensor) -> Tensor:
        return y + torch.randn(8, 1, 1, generator=self.generator) if self.training else y


class DrawsByNumpy(Convs):
    def __init__(self) -> None:
        super().__init__()
        self.generator = np.random.default_rng(0)

    def between(self, y: Tensor) -> Tensor:
        return y * self.generator.random() if self.training else y


@pytest.mark.parametrize("kind", [DrawsItself, DrawsByNumpy])
def test_generators_of_modules_go_on_drawing(kind: type[Convs]) -> None:
    """An attribute error; and a number that was drawn once."""
    model = randomise(Around(kind())).double()
    prepared = alike(model, "c", "d")
    assert not {"inner.a", "inner.b"} & gated_layers(prepared).keys()


def test_sparse_buffers() -> None:
    """They were compared as dense ones are."""

    class Sparse(Convs):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacency", torch.eye(8).to_sparse())

    assert "b" in gated_layers(dspfx.prepare(Sparse().double(), X))


class FreezesItsStem(Convs):
    def train(self, mode: bool) -> Any:  # there is no default
        super().train(mode)
        for parameter in self.a.parameters():
            parameter.requires_grad = not mode


def test_what_train_freezes_is_frozen() -> None:
    """It was refused, and a `train` without a default was an error."""
    model = randomise(FreezesItsStem()).double()
    prepared = dspfx.prepare(model, X)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(p.requires_grad for p in prepared.get_submodule("a").parameters())
    assert all(p.requires_grad for p in prepared.get_submodule("b").parameters())


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, given: Any, output: Tensor) -> None:
        self.seen.append(output)


def test_hooks_that_record_do_not_keep_a_copy_from_being_made() -> None:
    model = Convs().double()
    model.b.register_forward_hook(Recorder())
    prepared = alike(model, "b")
    assert_trains_alike(model, copy.deepcopy(prepared))


class FollowsItsWeights(Convs):
    """As a momentum encoder does, which starts where the other one is."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = copy.deepcopy(self.b)

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            pairs = zip(self.b.parameters(), self.slow.parameters(), strict=True)
            for own, slow in pairs if self.training else ():
                slow.mul_(0.99).add_(own, alpha=0.01)
            target = self.slow(self.a(x))
        return super().forward(x), target


class WarmsUp(Convs):
    steps = 0

    def between(self, y: Tensor) -> Tensor:
        self.steps += self.training
        return y * min(1.0, self.steps / 10)


class DrawsUnseen(Convs):
    def between(self, y: Tensor) -> Tensor:
        return y + torch.empty(8, 1, 1).normal_() if self.training else y


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (FollowsItsWeights, "the parameter slow.weight"),
        (WarmsUp, "output 0"),
        (DrawsUnseen, "output 0"),
    ],
)
def test_what_shows_later_or_by_chance_is_refused(kind: type[Convs], what: str) -> None:
    model = kind().double()
    torch.manual_seed(0)
    with pytest.raises(dspfx.TraceError, match=rf"after one pass, .*differs|{what}"):
        dspfx.prepare(model, X)


class LooksUp(AsksForGradients):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 8, sparse=True)

    def between(self, y: Tensor) -> Tensor:
        return super().between(y) + self.table(torch.zeros(1, dtype=torch.long))[..., None, None]


def test_sparse_gradients_and_another_default_type_do_not_switch_the_proof_off() -> None:
    with pytest.raises(dspfx.TraceError, match="does not train as the model does"):
        dspfx.prepare(LooksUp().double(), X)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(dspfx.TraceError, match="does not train as the model does"):
            dspfx.prepare(AsksForGradients(), X)
    finally:
        torch.set_default_dtype(torch.float32)


class VariesInEvaluation(Convs):
    def between(self, y: Tensor) -> Tensor:
        return y + torch.randn_like(y)


class VariesAndIsRefused(AsksForGradients):
    def between(self, y: Tensor) -> Tensor:
        return super().between(y) + torch.randn_like(y)


@pytest.mark.parametrize("kind", [VariesInEvaluation, VariesAndIsRefused])
def test_a_model_has_drawn_nothing_whether_it_is_refused_or_not(kind: type[Convs]) -> None:
    model = kind().double()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    refused = kind is VariesAndIsRefused
    with pytest.raises(dspfx.TraceError) if refused else contextlib.nullcontext():
        dspfx.prepare(model, X)
    assert torch.equal(torch.rand(1), expected)


def test_a_narrow_model_would_lose_hooks_that_see_gradients() -> None:
    prepared = dspfx.prepare(randomise(CallsHooks()).double(), X)
    dspfx.prune(prepared, dspfx.Budget(macs=0.8))
    with pytest.raises(dspfx.NarrowError, match="'b' has hooks"):
        dspfx.narrow(prepared)


class FourConvs(Convs):
    """Of which the first two have no hooks in the tests."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.c, self.d = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.act(self.c(super().forward(x))))


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
@pytest.mark.parametrize("name", ["c", "act", "norm"])
def test_a_module_whose_hook_changes_what_it_computes_stays_as_it_is(name: str, kind: str) -> None:
    """It was compacted without its hook, which showed in `convert` alone, after all training."""
    model = randomise(FourConvs()).double()
    hook = (lambda m, x, y: y.flip(1)) if kind == "forward" else (lambda m, x: x[0].flip(1))
    getattr(model.get_submodule(name), f"register_{kind}_hook")(hook)
    prepared = alike(model, "d")
    assert name not in gated_layers(prepared)
    dspfx.prune(prepared.eval(), dspfx.Budget(macs=0.7))
    compact = dspfx.convert(prepared)
    assert_equal(compact(X), prepared(X))
    why = f"a hook, or a 'forward' of its own, changes what '{name}' computes"
    assert why in [declined.reason for declined in dspfx.report(compact).declined]


@pytest.mark.parametrize("changes", [False, True])
def test_a_forward_of_its_own_is_kept(changes: bool) -> None:
    """It was lost, or read the original's weights; a copy of the layer had no gate."""
    model = randomise(FourConvs()).double()

    def forward(layer: nn.Conv2d, x: Tensor) -> Tensor:
        y = nn.Conv2d.forward(layer, x)
        return y.flip(1) if changes else y

    model.c.forward = functools.partial(forward, model.c)  # type: ignore[method-assign]
    prepared = alike(model, "d")
    assert "c" not in gated_layers(prepared)
    dspfx.prune(prepared.eval(), dspfx.Budget(macs=0.7))
    compact = dspfx.convert(prepared)
    assert_equal(compact(X), prepared(X))
    kept = [d.node for d in dspfx.report(compact).declined]
    assert ("c" in kept) == changes


@pytest.mark.filterwarnings("ignore")  # torch would rather that it were forgotten
@pytest.mark.parametrize("traced", [False, True])
def test_torchscript_is_opaque(traced: bool) -> None:
    """It has no buffers that could be put back, and refused `requires_grad_`."""
    model = randomise(FourConvs()).double()
    inner = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).double()
    example = torch.zeros(2, 8, 3, 2, dtype=torch.float64)
    model.act = torch.jit.trace(inner, example) if traced else torch.jit.script(inner)
    prepared = dspfx.prepare(model, X)
    assert {"b", "d"} <= gated_layers(prepared).keys()
    dspfx.prune(prepared.eval(), dspfx.Budget(macs=0.9))
    compact = dspfx.convert(prepared)
    assert_equal(compact(X), prepared(X))


def test_a_hook_that_only_looks_costs_nothing() -> None:
    model = randomise(FourConvs()).double()
    for module in (model.b, model.norm, model.act):
        module.register_forward_hook(lambda module, given, output: None)
    assert {"b", "c", "d"} == set(gated_layers(alike(model, "b")))


def test_a_later_hook_that_changes_outputs_is_named_where_it_is_lost() -> None:
    prepared = dspfx.prepare(randomise(Convs()).double(), X)
    prepared.get_submodule("b").register_forward_hook(lambda module, given, output: output + 1)
    dspfx.prune(prepared.eval(), dspfx.Budget(macs=0.8))
    with pytest.raises(dspfx.EquivalenceError, match=r"first at .*forward hook"):
        dspfx.convert(prepared)


class RemembersInEvaluation(Convs):
    """What it computes from its parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> "RemembersInEvaluation":
        super().train(mode)
        if mode:
            self.known = {}
        return self

    def between(self, y: Tensor) -> Tensor:
        if self.training:
            return y * self.b.weight.mean()
        if "scale" not in self.known:
            self.known["scale"] = self.b.weight.mean()
        return y * self.known["scale"]


def test_caches_do_not_keep_what_stood_for_values() -> None:
    """A prepared LeViT could not be copied."""
    model = randomise(Around(RemembersInEvaluation())).double()
    prepared = alike(model, "inner.b", "c")
    dspfx.prune(prepared.eval(), dspfx.Budget(macs=0.8))
    assert_equal(copy.deepcopy(prepared)(X), dspfx.convert(prepared)(X))
    assert not model.get_submodule("inner").known


class Shrinks(Convs):
    """Its weights are others after every call."""

    def between(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            self.b.weight.mul_(0.5)
        return y


def test_weights_that_every_call_changes_are_those_of_the_model() -> None:
    """They had been changed by the calls that `prepare` and `report` make."""
    model = randomise(Shrinks()).double()
    prepared = alike(model, "b")
    dspfx.report(prepared)
    assert torch.equal(prepared.get_parameter("b.weight"), model.b.weight)


class Swish(torch.autograd.Function):
    """Saves memory: its gradient is that of its code, but for rounding."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y * torch.sigmoid(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        s = torch.sigmoid(y)
        return gradient * (s * (1 + y * (1 - s)))


class Swishes(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return Swish.apply(y)


class Centre(torch.autograd.Function):
    """The gradient of the offset is zero, whichever way it is summed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, offset: Tensor) -> Tensor:
        y = y + offset
        return y - y.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        own = gradient - gradient.mean((2, 3), keepdim=True)
        return own, own.double().sum((0, 2, 3), keepdim=True).to(own.dtype)


class Centres(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, y: Tensor) -> Tensor:
        return Centre.apply(y, self.offset)


ZEROS = {
    "a shift before a norm": lambda: [nn.BatchNorm2d(16), nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32)],
    "a bias before a norm of each image": lambda: [nn.Conv2d(16, 32, 3), nn.InstanceNorm2d(32)],
    "a bias before a norm of one group": lambda: [nn.Conv2d(16, 32, 1), nn.GroupNorm(32, 32)],
    "an offset that is taken away": lambda: [nn.Conv2d(16, 32, 1), Centres(32)],
}


@pytest.mark.parametrize("kind", ZEROS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_are_zero_but_for_rounding_are_the_same(
    kind: str, dtype: torch.dtype
) -> None:
    """Rounding errors were compared with each other, and half of the networks refused."""
    for seed in range(3):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 16, 3), Swishes(), *ZEROS[kind](), Swishes(), nn.Conv2d(32, 8, 1)]
        model = nn.Sequential(*layers, nn.BatchNorm2d(8)).to(dtype)
        prepared = dspfx.prepare(model, torch.randn(2, 3, 16, 16, dtype=dtype))
        assert "opaque" not in str(dspfx.report(prepared))


class Leaks(nn.Module):
    """Adds a gradient of size `much`, where there is none, that is another at every call."""

    def __init__(self, much: float) -> None:
        super().__init__()
        self.much, self.calls = much, 0

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        self.calls += 1
        return y + self.much * self.calls * (z.square() - z.square().detach())


@pytest.mark.parametrize("much", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("where", ["zero", "small"])
def test_a_wrong_gradient_is_found_however_small_it_is(much: float, where: str) -> None:
    """Of a bias that has none, by exact arithmetic, and of a branch that hardly matters."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
            self.side, self.leaks, self.c = nn.Conv2d(3, 8, 5), Leaks(much), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = Swish.apply(self.a(x))
            y = self.c(Swish.apply(self.norm(self.b(y))))
            if where == "zero":
                return self.leaks(y, self.b.bias.sum())
            return y + 1e-6 * self.leaks(self.side(x), self.side.weight.sum())

    model = Net()
    what = "b.bias" if where == "zero" else "side.weight"
    with pytest.raises(dspfx.TraceError, match=f"the gradient of {what} differs"):
        dspfx.prepare(model, torch.randn(2, 3, 12, 12))
