"""`GroupLearner` against an oracle that shares no code with it.

The oracle unrolls the step by hand: explicit SGD and AdamW updates, dR/dW by numerical
differences of the regulariser written in loops, and the derivative by the assignment of

    U(p) = R(W3, p) + <dR/dW(W1, p), W4 - W2>        (W3 and the difference held fixed)

by central differences of U.
"""

import copy
import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

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
from penalties import central_difference, plain_penalty
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import unchanged


class HandSGD:
    """v = 0.9 v + g + 0.1 w; w -= lr v."""

    def __init__(self) -> None:
        self.velocity: dict[str, Tensor] = {}

    def step(self, name: str, w: Tensor, g: Tensor) -> Tensor:
        self.velocity[name] = 0.9 * self.velocity.get(name, 0.0) + g + 0.1 * w
        return w - LR * self.velocity[name]


class HandAdamW:
    def __init__(self) -> None:
        self.moments: dict[str, tuple[Any, Any, int]] = {}

    def step(self, name: str, w: Tensor, g: Tensor) -> Tensor:
        m, v, t = self.moments.get(name, (0.0, 0.0, 0))
        m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, t + 1
        self.moments[name] = m, v, t
        w = w * (1 - LR * 0.1)
        unbiased = (v / (1 - 0.999**t)) ** 0.5 + 1e-8
        return w - LR * (m / (1 - 0.9**t)) / unbiased


class Oracle:
    """Weights by name, and the steps of the algorithm one by one."""

    def __init__(self, prepared: dspfx.PreparedModule, hand: Any) -> None:
        self.model = copy.deepcopy(prepared)
        self.weights = {n: p.detach().clone() for n, p in prepared.named_parameters()}
        self.hand = hand
        layer = conv(prepared)
        scale = (layer.gate.input_elements / 16384) ** 0.5
        self.kappa = scale * 2 * (2 / 4) ** 1.5

    def task_step(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(self.weights[name])
            parameter.grad = None
        nn.functional.cross_entropy(self.model(X), Y).backward()
        for name, parameter in self.model.named_parameters():
            self.weights[name] = self.hand.step(name, self.weights[name], parameter.grad)

    def slope(self, p: Tensor) -> Tensor:
        """dR/dW of the gated weight, numerically."""
        return central_difference(lambda w: self.penalty(w, p), self.weights["2.weight"])

    def penalty(self, weight: Tensor, p: Tensor) -> float:
        return plain_penalty(weight.flatten(2), p, self.kappa)

    def move(self, p: Tensor, rho: float) -> None:
        self.weights["2.weight"] = self.weights["2.weight"] - rho * self.slope(p)


def soft_assignment(logits: Tensor, seed: int) -> Tensor:
    uniform = torch.rand(logits.shape, dtype=logits.dtype, generator=generator(seed))
    return torch.softmax(logits / 0.5 - torch.log(-torch.log(uniform)), 0)


@pytest.mark.parametrize(("make", "hand"), [(sgd, HandSGD), (adamw, HandAdamW)])
def test_a_whole_step_equals_the_unrolled_oracle(make: Any, hand: Any) -> None:
    prepared = tiny()
    logits = gate(prepared).logits.clone()
    oracle = Oracle(prepared, hand())
    plain = copy.deepcopy(prepared)
    learner = learner_of(prepared, make)
    recorded: dict[str, Tensor] = {}
    adam_step = learner.logits_optimizer.step

    def record() -> None:
        recorded["gradient"] = gate(prepared).logits.grad.clone()
        adam_step()

    learner.logits_optimizer.step = record
    learner.step(loss(prepared))

    rho = SETTINGS["strength"] * LR * 1 / SETTINGS["total_steps"]
    p = soft_assignment(logits, 5)
    oracle.task_step()
    w1, hand_state = dict(oracle.weights), copy.deepcopy(oracle.hand)
    oracle.move(p, rho)
    w2 = oracle.weights["2.weight"]
    oracle.task_step()
    w3 = oracle.weights["2.weight"]
    oracle.move(p, rho)
    delta = oracle.weights["2.weight"] - w2

    # the second-order term alone, from the directional derivative of R at W1 along delta
    width = 1e-4

    def along(p: Tensor) -> float:
        up = oracle.penalty(w1["2.weight"] + width * delta, p)
        return (up - oracle.penalty(w1["2.weight"] - width * delta, p)) / (2 * width)

    def pushed(gradient: Tensor) -> Tensor:
        """Through the soft assignment to the logits."""
        leaf = logits.clone().requires_grad_()
        (result,) = torch.autograd.grad(soft_assignment(leaf, 5), leaf, gradient)
        return result

    first = central_difference(lambda p: oracle.penalty(w3, p), p)
    second = central_difference(along, p, 1e-4)
    expected, without = pushed(first + second), pushed(first)
    torch.testing.assert_close(recorded["gradient"], expected, rtol=1e-4, atol=1e-8)
    assert float((without - expected).abs().max()) > 0.1 * float(expected.abs().max())

    # the weights are W1, shrunk by the hard assignment of the new logits
    new = logits - 0.1 * expected / (expected.abs() + 1e-12)  # Adam's first step
    torch.testing.assert_close(gate(prepared).logits, new, rtol=1e-3, atol=1e-6)
    oracle.weights, oracle.hand = w1, hand_state
    oracle.move(nn.functional.one_hot(new.argmax(0), 2).T.double(), rho)
    for name, parameter in prepared.named_parameters():
        torch.testing.assert_close(parameter.detach(), oracle.weights[name], rtol=1e-7, atol=1e-9)

    # buffers and the optimizer's state are those of one plain step
    optimizer = make(plain.parameters())
    loss(plain)().backward()
    optimizer.step()
    for (name, mine), (_, theirs) in zip(
        prepared.named_buffers(), plain.named_buffers(), strict=True
    ):
        assert name.endswith("logits") or torch.equal(mine, theirs), name
    assert_same_state(learner.optimizer, optimizer)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_without_strength_a_step_is_a_plain_step_bit_for_bit(make: Any) -> None:
    prepared = tiny()
    plain = copy.deepcopy(prepared)
    learner = learner_of(prepared, make, strength=0.0)
    optimizer = make(plain.parameters())
    for _ in range(3):
        seen: list[list[Tensor]] = []
        value = learner.step(
            loss(prepared),
            before_step=lambda s=seen: s.append([p.grad.clone() for p in prepared.parameters()]),
        )
        optimizer.zero_grad()
        expected = loss(plain)()
        expected.backward()
        optimizer.step()
        assert torch.equal(value, expected.detach())
        assert len(seen) == 2  # the step's, and the look-ahead's
        for mine, theirs in zip(seen[0], plain.parameters(), strict=True):
            assert torch.equal(mine, theirs.grad)
    for mine, theirs in zip(prepared.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_logits_every_looks_ahead_less_often() -> None:
    prepared = tiny()
    calls = []
    learner = learner_of(prepared, sgd, logits_every=3)
    logits = [gate(prepared).logits.clone()]
    for _ in range(4):

        def counted() -> Tensor:
            calls.append(1)
            return loss(prepared)()

        learner.step(counted)
        logits.append(gate(prepared).logits.clone())
    assert len(calls) == 6
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(logits)]
    assert moved == [True, False, False, True]
    # the first step of Adam is as long as its rate
    assert float((logits[1] - logits[0]).abs().max()) == pytest.approx(3 * SETTINGS["logits_lr"])


def test_the_present_rate_of_the_layers_own_group_counts() -> None:
    prepared = tiny()
    head = [p for n, p in prepared.named_parameters() if n.startswith("5")]
    rest = [p for n, p in prepared.named_parameters() if not n.startswith("5")]
    optimizer = torch.optim.SGD([{"params": head, "lr": 9.0}, {"params": rest, "lr": 0.2}], lr=1.0)
    learner = dspfx.GroupLearner(prepared, optimizer, 0.5, total_steps=4)
    learner.steps_done = 1
    optimizer.param_groups[1]["lr"] = 0.1
    assert learner._rates()[conv(prepared).weight] == pytest.approx(0.5 * 0.1 * 2 / 4)


class RebindingSGD(torch.optim.SGD):
    """Puts a new tensor into its state at every step, and a counter into its groups."""

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
                for p in (p for p in group["params"] if p.grad is not None):
                    state = self.state[p]
                    state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + p.grad
                    p.sub_(LR * state["m"])


@pytest.mark.parametrize("make", [sgd, adamw, lambda p: RebindingSGD(p, lr=LR)])
def test_the_look_ahead_leaves_no_trace_outside_the_model(make: Any) -> None:
    """The optimizer holds a parameter that the model lacks, and lacks one that the model has."""

    def trained(model: nn.Module) -> tuple[Any, Any, Callable[[], Tensor]]:
        scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        parameters = [p for n, p in model.named_parameters() if n != "5.bias"]
        return scale, make([*parameters, scale]), lambda: scale * loss(model)()

    prepared = tiny()
    plain = copy.deepcopy(prepared)
    scale, optimizer, closure = trained(prepared)
    learner = dspfx.GroupLearner(prepared, optimizer, 0.0, total_steps=2)
    plain_scale, plain_optimizer, plain_closure = trained(plain)
    for _ in range(2):
        learner.step(closure)
        plain_optimizer.zero_grad()
        plain_closure().backward()
        plain_optimizer.step()
    assert torch.equal(scale, plain_scale)
    mine, theirs = prepared.get_submodule("5").bias, plain.get_submodule("5").bias
    assert torch.equal(mine.grad, theirs.grad)
    assert_same_state(optimizer, plain_optimizer)


def test_gradients_outside_the_optimizer_count_once() -> None:
    prepared = tiny()
    plain = copy.deepcopy(prepared)
    learner = dspfx.GroupLearner(prepared, sgd([conv(prepared).weight]), 0.0, total_steps=1)
    learner.step(loss(prepared))
    loss(plain)().backward()
    for (name, mine), theirs in zip(prepared.named_parameters(), plain.parameters(), strict=True):
        assert name == "2.weight" or torch.equal(mine.grad, theirs.grad)


def test_state_first_made_in_the_look_ahead_is_not_kept() -> None:
    prepared = tiny()
    learner = learner_of(prepared, adamw)
    calls = itertools.count()

    def closure() -> Tensor:  # the classifier takes part in the second pass only
        weight = conv(prepared).weight
        return loss(prepared)() if next(calls) else weight.square().sum()

    learner.step(closure)
    assert list(learner.optimizer.state) == [conv(prepared).weight]


def test_a_bad_loss_in_the_look_ahead_leaves_the_plain_step() -> None:
    prepared = tiny()
    plain = copy.deepcopy(prepared)
    learner = learner_of(prepared, sgd)
    calls = itertools.count()
    with pytest.raises(dspfx.LearnError, match="the loss is nan"):
        learner.step(lambda: loss(prepared)() * (float("nan") if next(calls) else 1.0))
    optimizer = sgd(plain.parameters())
    loss(plain)().backward()
    optimizer.step()
    for name, value in plain.state_dict().items():
        assert torch.equal(prepared.state_dict()[name], value), name
    assert_same_state(learner.optimizer, optimizer)


def test_a_model_that_was_cast_since_is_an_error() -> None:
    """`Module.to` replaces the logits; Adam would go on with the old ones."""
    prepared = tiny()
    learner = learner_of(prepared, sgd)
    prepared.float()
    with unchanged(prepared), pytest.raises(dspfx.LearnError, match="logits of 2 were replaced"):
        learner.step(lambda: prepared(X.float()).square().mean())


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_channels_are_worked_on_in_blocks(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few channels give the step that a single one gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 1), kind(8, 4, 2, groups=2), nn.Flatten())
    models = [dspfx.prepare(copy.deepcopy(model).double(), X).train() for _ in range(2)]
    for prepared, block in zip(models, (2**20, 4 * 3), strict=True):
        monkeypatch.setattr("dspfx.training.groups.learner.BLOCK", block)
        learner = learner_of(prepared, sgd)
        for _ in range(2):
            learner.step(lambda m=prepared: m(X).square().mean())
    for mine, theirs in zip(
        models[0].state_dict().values(), models[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_structural_groups_single_groups_and_shared_layers() -> None:
    """Hard shrink of a convolution in two structural groups, and of one that is called twice."""
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 1, bias=False)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), shared, nn.Tanh(), shared
    )
    for groups in (1, 2):
        config = dspfx.PrepareConfig(groups=groups)
        prepared = dspfx.prepare(copy.deepcopy(model).double(), X, config=config).train()
        plain = copy.deepcopy(prepared)
        optimizers = []
        for module in (prepared, plain):
            rest, last = list(module.parameters())[:-1], list(module.parameters())[-1:]
            groups_of = [{"params": rest}, {"params": last, "lr": 0.1}]
            optimizers.append(torch.optim.SGD(groups_of, lr=LR, momentum=0.9, nesterov=True))
        learner = dspfx.GroupLearner(prepared, optimizers[0], 5.0, total_steps=1)
        learner.step(lambda m=prepared: m(X).square().mean())
        plain(X).square().mean().backward()
        optimizers[1].step()
        assert {"1", "3"} <= set(learner.layers)
        for name in ("1", "3"):
            layer, w1 = learner.layers[name], plain.get_submodule(name).weight.detach().flatten(2)
            p = nn.functional.one_hot(layer.gate.assignment, groups).T.double()
            kappa = (layer.gate.input_elements / 16384) ** 0.5
            kappa *= layer.kernel_size[0] * (groups / 4) ** 1.5
            rate = 5.0 * (LR if name == "1" else 0.1)
            slope = central_difference(
                lambda w, p=p, k=kappa, s=layer.groups: plain_penalty(w, p, k, s), w1
            )
            torch.testing.assert_close(
                layer.weight.detach().flatten(2), w1 - rate * slope, rtol=1e-7, atol=1e-9
            )


def test_frozen_layers_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten())
    prepared = dspfx.prepare(model.double(), X)
    prepared.get_submodule("1").weight.requires_grad_(False)
    before = prepared.get_submodule("1").weight.clone()
    learner = learner_of(prepared, sgd)
    logits = {name: layer.gate.logits for name, layer in gated_layers(prepared).items()}
    learner.step(lambda: prepared(X).square().mean())
    assert torch.equal(prepared.get_submodule("1").weight, before)
    assert not logits["1"].any()
    assert logits["2"].any()
    prepared.get_submodule("1").weight.requires_grad_(True)  # thawed, frozen
    prepared.get_submodule("2").weight.requires_grad_(False)
    kept = logits["2"].clone(), prepared.get_submodule("2").weight.clone()
    learner.step(lambda: prepared(X).square().mean())
    assert not torch.equal(prepared.get_submodule("1").weight, before)
    assert logits["1"].any()
    assert torch.equal(logits["2"], kept[0])
    assert torch.equal(prepared.get_submodule("2").weight, kept[1])


def test_groups_are_found_where_filters_need_disjoint_inputs() -> None:
    """Filters 0-3 carry the first half of the inputs, 4-7 the second; learning tells them apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False))
    prepared = dspfx.prepare(model, torch.randn(2, 8, 4, 4), config=dspfx.PrepareConfig(groups=2))
    layer = gated_layers(prepared)["1"]
    with torch.no_grad():
        prepared.get_submodule("0").weight.copy_(torch.eye(8)[:, :, None, None])
        layer.weight.mul_(0.1)
    target = torch.zeros(8, 8)
    target[:4, :4], target[4:, 4:] = torch.randn(4, 4), torch.randn(4, 4)
    optimizer = torch.optim.SGD([layer.weight], lr=0.1, momentum=0.9)
    learner = dspfx.GroupLearner(
        prepared, optimizer, 0.02, total_steps=300, logits_lr=0.05, generator=generator(0)
    )
    for _ in range(300):
        x = torch.randn(16, 8, 4, 4)
        y = torch.einsum("oc,nchw->nohw", target, x)
        learner.step(lambda x=x, y=y: (prepared(x) - y).square().mean())
    groups = layer.gate.assignment.tolist()
    assert len(set(groups[:4])) == len(set(groups[4:])) == 1
    assert groups[0] != groups[4]


def bad_losses() -> list[tuple[Callable[[nn.Module], Any], str]]:
    return [
        (lambda m: m(X).mean() * float("nan"), "the loss is nan"),
        (lambda m: m(X), "must return the loss"),
        (lambda m: m(X).mean().detach(), "must return the loss"),
        (lambda m: 1.0, "must return the loss"),
    ]


@pytest.mark.parametrize(("closure", "words"), bad_losses())
def test_bad_losses_change_nothing(closure: Callable[[nn.Module], Any], words: str) -> None:
    prepared = tiny()
    learner = learner_of(prepared, sgd)
    learner.step(loss(prepared))
    state = copy.deepcopy(learner.optimizer.state_dict())
    with unchanged(prepared), pytest.raises(dspfx.LearnError, match=words):
        learner.step(lambda: closure(prepared))
    after = learner.optimizer.state_dict()["state"]
    for key, values in state["state"].items():
        assert torch.equal(values["momentum_buffer"], after[key]["momentum_buffer"])
    assert learner.steps_done == 1


@pytest.mark.parametrize("value", [None, 1.0, torch.zeros(2)])
def test_a_closure_with_its_own_backward_must_return_its_loss(value: Any) -> None:
    prepared = tiny()
    learner = learner_of(prepared, sgd)
    words = "the loss that it has propagated back, a scalar tensor"
    with unchanged(prepared), pytest.raises(dspfx.LearnError, match=words):
        learner.step(lambda: value, backward=False)


def test_bad_settings() -> None:
    prepared = tiny()
    optimizer = sgd(prepared.parameters())
    for changes, words in [
        ({"total_steps": 0}, "at least 1"),
        ({"temperature": 0.0}, "temperature"),
        ({"strength": float("nan")}, "strength"),
        ({"strength": -1.0}, "strength"),
        ({"logits_lr": float("inf")}, "logits_lr"),
        ({"logits_every": 0}, "at least 1"),
    ]:
        with pytest.raises(dspfx.LearnError, match=words):
            dspfx.GroupLearner(prepared, optimizer, **{**SETTINGS, **changes})
    plain = nn.Linear(2, 2)
    with pytest.raises(dspfx.LearnError, match="no gated layer"):
        dspfx.GroupLearner(plain, sgd(plain.parameters()), total_steps=1)
    with pytest.raises(dspfx.LearnError, match="optimizer trains no gated layer"):
        dspfx.GroupLearner(prepared, sgd(plain.parameters()), total_steps=1)
    conv(prepared).weight.data[0] = float("nan")
    with pytest.raises(dspfx.LearnError, match=r"2\.weight holds NaN"):
        dspfx.GroupLearner(prepared, optimizer, **SETTINGS)


def test_optimizers_that_cannot_look_ahead() -> None:
    prepared = tiny()
    without_rate = sgd(prepared.parameters())
    without_rate.param_groups[0]["lr"] = None
    for optimizer, words in [
        (prepared.parameters(), r"torch\.optim\.Optimizer, got generator; pass"),
        (torch.optim.SGD, "got type; pass"),
        ([sgd(prepared.parameters())], "got list; pass"),
        (torch.optim.LBFGS(prepared.parameters()), "use an optimizer that steps"),
        (without_rate, "parameter group 0 is None; give it a number"),
    ]:
        with unchanged(prepared), pytest.raises(dspfx.LearnError, match=words):
            dspfx.GroupLearner(prepared, optimizer, **SETTINGS)


def test_a_rate_may_be_a_tensor() -> None:
    one, two = tiny(), tiny()
    mine = learner_of(one, lambda ps: torch.optim.SGD(ps, lr=torch.tensor(LR)))
    theirs = learner_of(two, lambda ps: torch.optim.SGD(ps, lr=LR))
    mine.step(loss(one))
    theirs.step(loss(two))
    assert torch.equal(conv(one).weight, conv(two).weight)


def test_a_generator_on_another_device() -> None:
    elsewhere = mock.Mock(spec=torch.Generator, device=torch.device("cuda", 0))
    prepared = tiny()
    words = r"on cuda:0, but the layer 2 on cpu; use torch\.Generator\('cpu'\)"
    with unchanged(prepared), pytest.raises(dspfx.LearnError, match=words):
        dspfx.GroupLearner(prepared, sgd(prepared.parameters()), generator=elsewhere, **SETTINGS)


def test_no_step_beyond_the_last() -> None:
    prepared = tiny()
    learner = learner_of(prepared, sgd, total_steps=1)
    learner.step(loss(prepared))
    with unchanged(prepared), pytest.raises(dspfx.LearnError, match="all 1 steps are done"):
        learner.step(loss(prepared))


def test_what_is_converted_before_its_end_is_warned_of() -> None:
    prepared = tiny()
    learner = learner_of(prepared, sgd)
    for _ in range(SETTINGS["total_steps"] - 1):
        learner.step(loss(prepared))
    with pytest.warns(dspfx.DspfxWarning, match="GroupLearner has done 6 of 7 steps. Train on"):
        dspfx.convert(prepared)
    learner.step(loss(prepared))
    dspfx.convert(prepared)
