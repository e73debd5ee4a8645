"""`GroupLearner` in the training loops that people have; each is compared with a simpler one."""

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from group_learning import (
    LR,
    SETTINGS,
    X,
    Y,
    adamw,
    assert_same_state,
    conv,
    gate,
    generator,
    learner_of,
    loss,
    sgd,
    tiny,
)
from torch import Tensor, nn

import dspfx
from benchmarks.step import extra_memory
from dspfx.layers.gated import gated_layers
from dspfx.training.groups.lookahead import one_at_a_time
from helpers import unchanged

MAKERS = pytest.mark.parametrize("make", [sgd, adamw])


def assert_equal_models(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    """Weights, buffers and logits are equal; bit for bit if no tolerance is given."""
    theirs = b.state_dict()
    for name, tensor in a.state_dict().items():
        if tolerance:
            torch.testing.assert_close(tensor, theirs[name], **tolerance)
        else:
            assert torch.equal(tensor, theirs[name]), name


def twins(make: Any = sgd, **settings: Any) -> tuple[Any, Any, Any, Any]:
    """Two equal models and a learner for each."""
    one, two = tiny(), tiny()
    return one, two, learner_of(one, make, **settings), learner_of(two, make, **settings)


def without_norm(groups: int = 2) -> nn.Module:
    """A model whose loss is a mean over samples that know nothing of each other."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.Flatten(), nn.Linear(4, 3)
    ).double()
    return dspfx.prepare(model, X, config=dspfx.PrepareConfig(groups=groups)).train()


# -- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, lambda pair: dict(zip("ab", pair, strict=True))])
def test_several_losses_are_added(kind: Callable[[Any], Any]) -> None:
    one, two, mine, theirs = twins()

    def losses(prepared: nn.Module) -> tuple[Tensor, Tensor]:
        y = prepared(X)
        return nn.functional.cross_entropy(y, Y), y.square().mean()[None]

    value = mine.step(lambda: kind(losses(one)))
    expected = theirs.step(lambda: torch.cat([x.reshape(1) for x in losses(two)]).sum())
    torch.testing.assert_close(value, expected)
    assert_equal_models(one, two, rtol=1e-9, atol=1e-12)


def test_several_inputs() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(2, 4, 1)
            self.b = nn.Conv2d(3, 4, 1)
            self.c = nn.Conv2d(4, 3, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.c(torch.tanh(self.a(x) + self.b(y))).flatten(1)

    y = torch.randn(6, 3, 3, 3, dtype=torch.float64)
    prepared = dspfx.prepare(Sum().double(), (X, y)).train()
    learner = learner_of(prepared, sgd)
    first = learner.step(lambda: nn.functional.cross_entropy(prepared(X, y), Y))
    assert float(learner.step(lambda: nn.functional.cross_entropy(prepared(X, y), Y))) < first
    assert gated_layers(prepared)["c"].gate.logits.any()


@MAKERS
def test_accumulated_micro_batches_are_one_batch(make: Any) -> None:
    one, two = without_norm(), without_norm()
    mine, theirs = learner_of(one, make), learner_of(two, make)
    given: list[Tensor] = []

    def micro_batches() -> Iterator[Tensor]:
        for x, y in zip(X.split(2), Y.split(2), strict=True):
            if given:  # the graph of the micro-batch before is gone
                with pytest.raises(RuntimeError, match="second time"):
                    given[-1].backward()
            given.append(nn.functional.cross_entropy(one(x), y) / 3)
            yield given[-1]

    for _ in range(3):
        value = mine.step(micro_batches)
        expected = theirs.step(lambda: nn.functional.cross_entropy(two(X), Y))
        torch.testing.assert_close(value, expected)
    assert len(given) == 3 * 2 * 3
    assert_equal_models(one, two, rtol=1e-6, atol=1e-9)


def test_a_bad_micro_batch_changes_nothing() -> None:
    prepared = tiny()
    learner = learner_of(prepared, sgd)

    def losses() -> Iterator[Tensor]:
        yield loss(prepared)()
        yield loss(prepared)() * float("inf")

    with unchanged(prepared), pytest.raises(dspfx.LearnError, match="the loss is inf"):
        learner.step(losses)
    for nothing in ([], iter(())):
        with unchanged(prepared), pytest.raises(dspfx.LearnError, match="no loss at all"):
            learner.step(lambda nothing=nothing: nothing)
    assert learner.steps_done == 0
    assert not learner.optimizer.state


# -- before the step of the optimizer ------------------------------------------------------------


@MAKERS
def test_clipping_before_the_step(make: Any) -> None:
    """As in a plain loop, and in the look-ahead as well: it is a step of the same kind."""
    one, two, mine, theirs = twins(make, strength=0.0)
    norms = []

    def clip() -> None:
        norms.append(float(nn.utils.clip_grad_norm_(one.parameters(), 0.05)))

    mine.step(loss(one), before_step=clip)
    theirs.optimizer.zero_grad()
    loss(two)().backward()
    norm = nn.utils.clip_grad_norm_(two.parameters(), 0.05)
    theirs.optimizer.step()
    assert norms[0] == float(norm) > 0.05
    assert len(norms) == 2
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_clipping_reaches_the_look_ahead() -> None:
    """Gradients of zero in the second pass leave the momentum's step only."""
    one, two, mine, theirs = twins()
    calls = itertools.count()

    def nothing_from_the_second() -> None:
        if next(calls):
            for p in one.parameters():
                p.grad.zero_()

    passes = itertools.count()
    mine.step(loss(one), before_step=nothing_from_the_second)
    theirs.step(lambda: loss(two)() * (0.0 if next(passes) else 1.0))
    assert_equal_models(one, two)


def test_an_error_before_the_step_changes_nothing() -> None:
    prepared = tiny()
    learner = learner_of(prepared, sgd)
    with unchanged(prepared), pytest.raises(KeyboardInterrupt):
        learner.step(loss(prepared), before_step=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert learner.steps_done == 0


# -- half precision ------------------------------------------------------------------------------


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def test_autocast_around_the_forward_or_around_the_step() -> None:
    """Around the step, autocast remembers casts of weights; the look-ahead needs the new ones."""
    models = [tiny().float() for _ in range(2)]
    x = X.float()
    seen: list[list[float]] = [[], []]

    def closure(which: int) -> Tensor:
        value = nn.functional.cross_entropy(models[which](x), Y)
        seen[which].append(float(value.detach()))
        return value

    def inner() -> Tensor:
        with autocast():
            return closure(0)

    learners = [learner_of(model, sgd) for model in models]
    learners[0].step(inner)
    with autocast():
        learners[1].step(lambda: closure(1))
    assert seen[0] == seen[1]
    assert abs(seen[0][0] - seen[0][1]) > 0.01
    assert_equal_models(models[0], models[1], rtol=2e-2, atol=2e-3)
    for model in models:
        assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_penalty_is_never_in_half_precision() -> None:
    """With gradients of zero the step is the penalty's alone, autocast or not."""
    models = [tiny().float() for _ in range(2)]
    learners = [learner_of(model, sgd) for model in models]

    def nothing(model: nn.Module) -> Tensor:
        return 0.0 * model(X.float()).sum()

    learners[0].step(lambda: nothing(models[0]))
    with autocast():
        learners[1].step(lambda: nothing(models[1]))
    mine, theirs = (gated_layers(model)["2"] for model in models)
    torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-5, atol=1e-6)
    gradients = [
        learner.logits_optimizer.state[gate(model).logits]["exp_avg"]  # a tenth of the first one
        for learner, model in zip(learners, models, strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_refused(dtype: torch.dtype) -> None:
    prepared = tiny().to(dtype)
    with unchanged(prepared), pytest.raises(dspfx.LearnError, match=r"float32.*torch\.autocast"):
        learner_of(prepared, sgd)


@MAKERS
@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_by_powers_of_two_changes_no_bit(make: Any, enabled: bool) -> None:
    one, two, mine, theirs = twins(make)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2, enabled=enabled)
    norms: list[list[float]] = [[], []]

    def look(model: nn.Module, to: list[float]) -> Callable[[], None]:
        return lambda: to.append(
            float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        )

    for _ in range(3):
        mine.step(loss(one), scaler=scaler, before_step=look(one, norms[0]))
        theirs.step(loss(two), before_step=look(two, norms[1]))
    assert norms[0] == norms[1]  # unscaled when they are seen
    assert_equal_models(one, two)
    assert_same_state(mine.optimizer, theirs.optimizer)
    assert scaler.get_scale() == (2.0**9 if enabled else 1.0)


def test_a_step_that_the_scaler_skips_changes_the_scale_only() -> None:
    prepared = tiny()
    learner = learner_of(prepared, sgd)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = {name: value.clone() for name, value in prepared.named_parameters()}
    value = learner.step(lambda: loss(prepared)() * float("inf"), scaler=scaler)
    assert value.isinf()
    assert scaler.get_scale() == 2.0
    assert learner.steps_done == 1
    assert not learner.optimizer.state
    for name, parameter in prepared.named_parameters():
        assert torch.equal(parameter, before[name])
    learner.step(loss(prepared), scaler=scaler)
    assert not torch.equal(prepared.get_parameter("2.weight"), before["2.weight"])


def test_an_error_before_the_step_leaves_the_scaler_usable() -> None:
    one, two, mine, theirs = twins()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def fail() -> None:
        raise KeyError("before the step")

    with unchanged(one), pytest.raises(KeyError):
        mine.step(loss(one), scaler=scaler, before_step=fail)
    assert scaler.get_scale() == 2.0**8
    for _ in range(2):
        mine.step(loss(one), scaler=scaler)
        theirs.step(loss(two))
    assert_equal_models(one, two)


def test_a_look_ahead_that_overflows_leaves_the_logits() -> None:
    prepared, plain, learner, reference = twins()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    logits = gate(prepared).logits.clone()
    calls = itertools.count()
    learner.step(lambda: loss(prepared)() * (float("nan") if next(calls) else 1.0), scaler=scaler)
    assert torch.equal(gate(prepared).logits, logits)
    assert scaler.get_scale() == 4.0
    # the task's step, and the shrink by the groups as they are
    reference.logits_optimizer.param_groups[0]["lr"] = 0.0
    reference.step(loss(plain))
    assert_equal_models(prepared, plain)


# -- optimizers ----------------------------------------------------------------------------------


class OwnSGD(torch.optim.SGD):
    """Not torch's own, so that its look-ahead is taken as a whole."""


class OwnAdamW(torch.optim.AdamW):
    """Not torch's own, so that its look-ahead is taken as a whole."""


@pytest.mark.parametrize(
    ("make", "own"),
    [
        (sgd, lambda ps: OwnSGD(ps, lr=0.5, momentum=0.9, weight_decay=0.1)),
        (adamw, lambda ps: OwnAdamW(ps, lr=0.5, weight_decay=0.1)),
    ],
)
def test_looking_ahead_one_weight_at_a_time_is_looking_ahead(make: Any, own: Any) -> None:
    one, two = tiny(), tiny()
    mine, theirs = learner_of(one, make), learner_of(two, own)
    assert [one_at_a_time(x.optimizer) for x in (mine, theirs)] == [True, False]
    for _ in range(3):
        mine.step(loss(one))
        theirs.step(loss(two))
    assert_equal_models(one, two)
    assert_same_state(mine.optimizer, theirs.optimizer)


@pytest.mark.parametrize("kind", [torch.optim.SGD, OwnSGD])
def test_hooks_of_the_optimizer_do_not_see_the_look_ahead(kind: Any) -> None:
    prepared = tiny()
    learner = learner_of(prepared, lambda ps: kind(ps, lr=LR))
    calls = {"pre": 0, "post": 0}

    def count(which: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[which] += 1

        return hook

    handle = learner.optimizer.register_step_pre_hook(count("pre"))
    learner.optimizer.register_step_post_hook(count("post"))
    learner.step(loss(prepared))
    once = dict(calls)  # of a class of one's own, torch may call them twice
    learner.logits_every = 99  # no look-ahead any more
    learner.step(loss(prepared))
    assert once["pre"] > 0
    assert calls == {which: 2 * count for which, count in once.items()}
    handle.remove()
    learner.step(loss(prepared))
    assert calls["pre"] == 2 * once["pre"]


def test_hooks_of_the_optimizer_are_back_after_an_error() -> None:
    steps = itertools.count(1)

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if next(steps) == 2:
                raise KeyError("the look-ahead")
            return super().step(closure)

    prepared = tiny()
    learner = learner_of(prepared, lambda ps: Failing(ps, lr=LR))
    seen: list[int] = []
    learner.optimizer.register_step_post_hook(lambda *_: seen.append(1))
    with pytest.raises(KeyError):
        learner.step(loss(prepared))
    before = len(seen)
    learner.step(loss(prepared))
    assert len(seen) == 2 * before > 0


def test_a_weight_that_two_layers_share_steps_once() -> None:
    models = []
    for _ in range(2):
        prepared = without_norm()
        model = nn.Sequential(prepared, copy.deepcopy(prepared))
        first, second = (model[i].get_submodule("2") for i in range(2))
        second.weight = first.weight
        models.append(model)
    makers = (sgd, lambda ps: OwnSGD(ps, lr=0.5, momentum=0.9, weight_decay=0.1))
    for model, make in zip(models, makers, strict=True):
        learner = learner_of(model, make)
        assert len({layer.weight for layer in learner.layers.values()}) < len(learner.layers)
        for _ in range(2):
            learner.step(lambda m=model: sum(part(X).square().mean() for part in m))
    assert_equal_models(*models)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
        lambda ps: torch.optim.RMSprop(ps, lr=0.01),
        lambda ps: torch.optim.NAdam(ps, lr=0.01),
        lambda ps: torch.optim.RAdam(ps, lr=0.01),
        lambda ps: torch.optim.Adagrad(ps, lr=0.01),
    ],
)
def test_torchs_other_optimizers(make: Any) -> None:
    prepared = tiny()
    plain = copy.deepcopy(prepared)
    learner = learner_of(prepared, make, strength=0.0)
    optimizer = make(plain.parameters())
    for _ in range(2):
        learner.step(loss(prepared))
        optimizer.zero_grad()
        loss(plain)().backward()
        optimizer.step()
    assert_same_state(learner.optimizer, optimizer)
    for mine, theirs in zip(prepared.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(gate(prepared).logits, gate(plain).logits)


def test_schedulers_and_groups_with_their_own_rates() -> None:
    models = [without_norm() for _ in range(2)]
    optimizers = [
        torch.optim.SGD(
            [
                {"params": [p for n, p in m.named_parameters() if n.startswith("2.")], "lr": 0.2},
                {"params": [p for n, p in m.named_parameters() if not n.startswith("2.")]},
            ],
            lr=0.1,
        )
        for m in models
    ]
    learners = [
        dspfx.GroupLearner(m, o, 0.3, total_steps=3, generator=generator(5))
        for m, o in zip(models, optimizers, strict=True)
    ]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizers[0], 1, gamma=0.5)
    for step in range(3):
        learners[0].step(lambda: nn.functional.cross_entropy(models[0](X), Y))
        scheduler.step()
        for group, lr in zip(optimizers[1].param_groups, (0.2, 0.1), strict=True):
            group["lr"] = lr * 0.5**step
        learners[1].step(lambda: nn.functional.cross_entropy(models[1](X), Y))
    assert_equal_models(models[0], models[1])


def test_a_layer_that_joins_the_optimizer_later() -> None:
    prepared = without_norm()
    weight = gated_layers(prepared)["2"].weight
    optimizer = torch.optim.SGD([p for p in prepared.parameters() if p is not weight], lr=0.1)
    with pytest.raises(dspfx.LearnError, match="optimizer trains no gated layer"):
        learner_of(prepared, lambda ps: optimizer)
    optimizer.add_param_group({"params": [weight]})
    learner_of(prepared, lambda ps: optimizer).step(lambda: prepared(X).square().mean())
    assert gated_layers(prepared)["2"].gate.logits.any()


# -- models --------------------------------------------------------------------------------------


def test_the_look_ahead_leaves_no_trace_in_buffers() -> None:
    """Batch norm writes into its buffers; others put new tensors there."""

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return x

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.counter = tiny(), Calls()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.counter(x))

    model = Wrapper()
    plain = copy.deepcopy(model)
    learner = dspfx.GroupLearner(model, sgd(model.parameters()), 0.0, total_steps=5)
    optimizer = sgd(plain.parameters())
    for _ in range(2):
        learner.step(loss(model))
        optimizer.zero_grad()
        loss(plain)().backward()
        optimizer.step()
    for (name, mine), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert name.endswith("logits") or torch.equal(mine, theirs), name
    with pytest.raises(dspfx.LearnError, match="the loss is nan"):
        learner.step(lambda: loss(model)() * float("nan"))
    assert int(model.counter.calls) == 2


def test_learning_through_a_compiled_model() -> None:
    """The same steps as without, and one compilation for both passes and all steps."""
    one, two, mine, theirs = twins()
    compilations = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compilations.append(module)
        return module.forward

    torch.compiler.reset()
    compiled = torch.compile(one, backend=backend)
    wrapped = dspfx.GroupLearner(compiled, mine.optimizer, generator=generator(5), **SETTINGS)
    for _ in range(3):
        wrapped.step(loss(compiled))
        theirs.step(loss(two))
    assert len(compilations) == 1
    assert_equal_models(one, two, rtol=1e-9, atol=1e-12)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
        lambda m: torch.optim.AdamW(m.parameters(), 0.1),
    ],
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_extra_memory_of_many_layers(make: Any, kernel: int) -> None:
    """At most twice the parameters, counted tensor by tensor; much less than the model twice."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(32, 32, kernel, padding=kernel // 2, bias=False) for _ in range(6)]
    model = nn.Sequential(nn.Conv2d(3, 32, 1), *convs)
    prepared = dspfx.prepare(model, torch.zeros(2, 3, 8, 8)).train()
    x = torch.randn(2, 3, 8, 8)
    extra = extra_memory(prepared, make, lambda m: m(x).square().mean())
    assert 0.9 < extra < 2


def test_extra_memory_of_one_layer_that_has_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the weight, and one of the optimizer's state; matrices `[O, C]` come in blocks."""
    monkeypatch.setattr("dspfx.training.groups.learner.BLOCK", 2**10)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 128), nn.Tanh(), nn.Linear(128, 256), nn.Linear(256, 2))
    x = torch.randn(2, 3)
    for state, make in [
        (0, lambda m: torch.optim.SGD(m.parameters(), 0.1)),
        (1, lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)),
        (2, lambda m: torch.optim.AdamW(m.parameters(), 0.1)),
    ]:
        prepared = dspfx.prepare(model, x).train()
        extra = extra_memory(prepared, make, lambda m: m(x).square().mean())
        assert extra < 1 + max(state, 1) + 0.15


# -- going on ------------------------------------------------------------------------------------


@MAKERS
def test_going_on_is_not_having_stopped(make: Any) -> None:
    one, two, mine, theirs = twins(make)
    for _ in range(2):
        mine.step(loss(one))
    saved = copy.deepcopy((one.state_dict(), mine.optimizer.state_dict(), mine.state_dict()))
    resumed = tiny()
    again = learner_of(resumed, make)
    again.step(loss(resumed))  # anything
    resumed.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    for _ in range(2):
        again.step(loss(resumed))
    for _ in range(4):
        theirs.step(loss(two))
    assert again.steps_done == 4
    assert_equal_models(resumed, two)


def test_states_that_do_not_fit() -> None:
    prepared = tiny()
    learner = learner_of(prepared, sgd)
    learner.step(loss(prepared))
    state = learner.state_dict()
    other = without_norm(groups=3)
    no_generator = dspfx.GroupLearner(prepared, learner.optimizer, **SETTINGS)
    for target, given, words in [
        (learner_of(tiny(), sgd, strength=0.1), state, "saved with strength=0.3"),
        (learner_of(tiny(), sgd, total_steps=9), state, "saved with total_steps=7"),
        (learner_of(other, sgd), state, "another model"),
        (learner_of(tiny(), sgd), {"epoch": 3}, "no state of a GroupLearner"),
        (no_generator, state, "this learner has no generator"),
        (learner_of(tiny(), sgd), no_generator.state_dict(), "the state has no generator"),
    ]:
        with pytest.raises(dspfx.LearnError, match=words):
            target.load_state_dict(given)
        assert target.steps_done == 0


# -- what is masked, and modes ---------------------------------------------------------------------


def test_masked_weights_have_no_say_in_the_groups() -> None:
    """Two models that compute the same, of which one had other dead weights, learned others."""
    one = tiny()
    mask = gate(one).mask.clone()
    mask[:, 0] = False
    gate(one).set_mask(mask)
    two = copy.deepcopy(one)
    layer, other = conv(one), conv(two)
    with torch.no_grad():
        other.weight[:, 0] = 3 * other.weight[:, 0] + 1
    mine, theirs = learner_of(one, sgd, strength=1.0), learner_of(two, sgd, strength=1.0)
    for _ in range(4):
        mine.step(loss(one))
        theirs.step(loss(two))
    assert torch.equal(layer.gate.logits, other.gate.logits)
    assert torch.equal(layer.weight[:, 1:], other.weight[:, 1:])


class CountsInItsGroups(torch.optim.Optimizer):
    """A step counts in a tensor of each group, in an attribute, and draws from its generator."""

    def __init__(self, parameters: Any, lr: float = LR) -> None:
        super().__init__(list(parameters), {"lr": lr})
        self.draws, self.steps = random.Random(0), 0
        for group in self.param_groups:
            group["step"] = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            group["step"] += 1
            rate = group["lr"] / (float(group["step"]) + self.steps) * (1 + self.draws.random())
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(rate * p.grad)


def test_optimizers_that_count_outside_their_state_are_left_no_trace() -> None:
    """A look-ahead was counted as a step."""
    prepared = tiny()
    plain = copy.deepcopy(prepared)
    learner = learner_of(prepared, CountsInItsGroups, strength=0.0)
    optimizer = CountsInItsGroups(plain.parameters())
    for _ in range(3):
        learner.step(loss(prepared))
        optimizer.zero_grad()
        loss(plain)().backward()
        optimizer.step()
    for mine, theirs in zip(prepared.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert float(learner.optimizer.param_groups[0]["step"]) == 3


class Around(torch.optim.SGD):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=LR)
        self.inside = torch.optim.SGD(self.param_groups[0]["params"], lr=LR)


def test_what_cannot_be_learned_with_says_so() -> None:
    prepared = tiny()
    with pytest.raises(dspfx.LearnError, match="steps another optimizer, its 'inside'"):
        learner_of(prepared, Around)
    learner = learner_of(prepared, sgd)
    with pytest.raises(dspfx.LearnError, match="takes a closure"):
        learner.step(torch.ones(()))  # type: ignore[arg-type]

    def propagates() -> Tensor:
        value = loss(prepared)()
        value.backward()
        return value

    with unchanged(prepared), pytest.raises(dspfx.LearnError, match="backward=False"):
        learner.step(propagates)
    narrow = dspfx.narrow(prepared)
    with pytest.raises(dspfx.LearnError, match="not in a narrow one"):
        learner_of(narrow, sgd)


class FailsToStep(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("wants a closure")


def test_an_optimizer_that_fails_leaves_the_statistics_of_norms() -> None:
    prepared = tiny()
    learner = learner_of(prepared, lambda parameters: FailsToStep(parameters, lr=LR))
    with unchanged(prepared), pytest.raises(RuntimeError, match="wants a closure"):
        learner.step(loss(prepared))


class Drops(nn.Module):
    """Nothing in it but its own mode says that it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.dropout(self.a(x), 0.5, self.training))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_compiled_model_knows_its_mode(first: bool, narrow: bool) -> None:
    """It stayed in the mode of its first call."""
    torch.manual_seed(0)
    model = dspfx.prepare(Drops().double(), X)
    model = dspfx.narrow(model) if narrow else model
    compiled = torch.compile(model, backend="eager")
    for mode in (first, not first, first):
        model.train(mode)
        assert torch.equal(compiled(X), compiled(X)) != mode
