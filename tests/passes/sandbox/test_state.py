"""What code writes into its buffers, and does where autograd does not record it, is traced too."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, random_masks, randomise

X = torch.randn(3, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Convs(nn.Module):
    """Two convolutions, between which each test puts something awkward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.register_buffer("mean", torch.ones(8, 1, 1))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x).relu()))

    def between(self, y: Tensor) -> Tensor:
        raise NotImplementedError


def mean(y: Tensor) -> Tensor:
    return y.mean((0, 2, 3))[:, None, None]


class WritesInPlace(Convs):
    def between(self, y: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * mean(y.detach()))
            self.steps.add_(1)
        return y / self.mean


class Assigns(Convs):
    def between(self, y: Tensor) -> Tensor:
        old = self.mean
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * mean(y.detach())
            self.steps += 1
        return y / self.mean - old


class ReadsBeforeItAssigns(Convs):
    """The quotient's gradient needs the buffer as it was."""

    def between(self, y: Tensor) -> Tensor:
        z = y / self.mean
        if self.training:
            self.mean, self.steps = mean(y.detach()).square(), self.steps
        return z


class WritesUnrecorded(Convs):
    def between(self, y: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.copy_(0.9 * self.mean + 0.1 * mean(y))
                self.steps += 1
        return y / self.mean


class Weighs(Convs):
    def between(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            halves = (y * y).mean((2, 3), keepdim=True).chunk(2, 1)
            weights = torch.cat(halves, 1).softmax(1)
        return y * weights + y * halves[0].mean()


class AssignsUnrecorded(Convs):
    """History must not grow from call to call."""

    def between(self, y: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean = 0.9 * self.mean + 0.1 * mean(y)
                self.steps *= 0.5
        return y / self.mean


class ReadsUnrecordedNumbers(Convs):
    """Indices and sizes have no gradient, what is looked up by them has."""

    def between(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            largest = y.mean((2, 3)).argmax(1)
            batch, channels, height, width = y.shape
            mask = y > y.mean()
        rows = y.reshape(batch, channels, height * width).gather(1, largest[:, None, None])
        return y.masked_fill(mask, 0.5) + rows.sum() + y.amax((2, 3), keepdim=True)


class KeepsAMask(Convs):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None)

    def between(self, y: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(8, 1, 1, dtype=torch.float64).tril()
        return y * self.mask


class Checkpoints(Convs):
    def between(self, y: Tensor) -> Tensor:
        return checkpoint(lambda y: y * y.sigmoid(), y, use_reentrant=True) if self.training else y


class Clamps(Convs):
    def between(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            self.b.weight.clamp_(-0.1, 0.1)
        return y


class Freezes(Convs):
    @torch.no_grad()
    def between(self, y: Tensor) -> Tensor:
        return y.clone().mul_(y.mean())

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(False):
            y = self.a(x).relu()
        return self.b(y + self.between(y))


KINDS = [
    *(WritesInPlace, Assigns, ReadsBeforeItAssigns, WritesUnrecorded),
    *(AssignsUnrecorded, ReadsUnrecordedNumbers, KeepsAMask, Checkpoints),
    *(Weighs, Clamps, Freezes),
]


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_like_the_original(kind: type[Convs]) -> None:
    """Buffers were written once, while tracing, and gradients flowed where there are none."""
    model = randomise(kind()).double().train()
    prepared = dspfx.prepare(model, X)
    assert {"b"} <= gated_layers(prepared).keys()
    restored = pickle.loads(pickle.dumps(prepared))
    for module in (prepared, copy.deepcopy(prepared), restored):
        twin = copy.deepcopy(model)
        for step in range(3):
            expected, actual = twin(X + step), module(X + step)
            assert_equal(expected, actual, tolerance=0)
            expected.square().mean().backward()
            actual.square().mean().backward()
        for name in dict(model.named_buffers()):
            assert_equal(twin.get_buffer(name), module.get_buffer(name), tolerance=0)
            assert not module.get_buffer(name).requires_grad
        for name, parameter in twin.named_parameters():
            gradient = module.get_parameter(name).grad
            assert (parameter.grad is None) == (gradient is None), name
            if gradient is not None:
                assert_equal(parameter.grad, gradient, tolerance=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_equal_after_conversion(kind: type[Convs]) -> None:
    prepared = dspfx.prepare(randomise(kind()).double(), X).train()
    prepared(X)
    dspfx.prune(prepared.eval(), dspfx.Budget(macs=0.8))
    compact = dspfx.convert(prepared)
    for x in (X, X + 1, X - 1):
        assert_equal(prepared(x), compact(x))


class Remembers(Convs):
    """A sum over all calls."""

    def between(self, y: Tensor) -> Tensor:
        self.mean = self.mean + mean(y.detach())
        return y / self.mean


class StartsWithTheData(Convs):
    def between(self, y: Tensor) -> Tensor:
        if self.steps.item() == 0:
            self.mean.copy_(mean(y))
            self.steps.fill_(1)
        return y / self.mean


class ForgetsToo(Convs):
    def between(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            y += 1
        return y


class TakesAnotherShape(Convs):
    def between(self, y: Tensor) -> Tensor:
        self.steps = mean(y.detach())
        return y / self.steps


class Forgets(Convs):
    """Autograd goes on to record what `y` was before."""

    def between(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            y.clamp_(0, 1)
        return y


class Replaces(Convs):
    def between(self, y: Tensor) -> Tensor:
        self.b.weight.data = self.b.weight.data.renorm(2, 0, 0.1)
        return y


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Remembers, "depends on earlier calls, by way of its buffer"),
        (StartsWithTheData, "depends on the values of 'eq'"),
        (ForgetsToo, "'relu' is overwritten while autograd does not record"),
        (TakesAnotherShape, "depends on earlier calls, by way of its buffer"),
        (Forgets, "'relu' is overwritten while autograd does not record"),
        (Replaces, "weight.data' is assigned"),
    ],
)
def test_what_a_graph_cannot_say_is_an_opaque_leaf(kind: type[Convs], reason: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.c, self.d = kind(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return self.d(self.c(self.inner(x)).relu())

    with pytest.raises(dspfx.TraceError, match=reason):
        dspfx.prepare(randomise(kind()).double(), X)
    model = randomise(Outer()).double()
    prepared = dspfx.prepare(model, X)
    assert list(gated_layers(prepared)) == ["c", "d"]
    assert reason in " ".join(str(dspfx.report(prepared)).split())
    for mode in (True, False):
        twin, module = copy.deepcopy(model).train(mode), copy.deepcopy(prepared).train(mode)
        for step in range(3):
            assert_equal(twin(X + step), module(X + step), tolerance=0)
    dspfx.set_masks(prepared.eval(), random_masks(prepared))
    compact, masked = dspfx.convert(prepared), copy.deepcopy(prepared)
    for step in range(3):
        assert_equal(masked(X + step), compact(X + step))


def test_constants_that_are_cast_are_verified_in_float64_too() -> None:
    """A buffer that was made float32 met activations that were not."""

    class Rotates(Convs):
        def between(self, y: Tensor) -> Tensor:
            angles = self.mean.flatten(1).float() @ y.mean((0, 2, 3))[None].float()
            return y * angles.cos().sum(1)[:, None, None].to(y.dtype)

    prepared = dspfx.prepare(randomise(Rotates()), X.float())
    dspfx.prune(prepared, dspfx.Budget(macs=0.8))
    assert_equal(prepared.eval()(X.float()), dspfx.convert(prepared)(X.float()), tolerance=1e-5)
