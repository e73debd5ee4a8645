"""`recalibrate`: exact statistics, any inputs, and nothing else touched."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dspfx
from helpers import random_masks, unchanged

X = torch.randn(10, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.3), nn.Dropout(0.5), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)),
    )


def test_mean_and_variance_are_those_of_all_values_together() -> None:
    """Batches differ in size and in level: neither is averaged over."""
    model = network()
    batches = [X[:1], X[1:4] * 2 + 5, X[4:]]
    dspfx.recalibrate(model, batches)
    seen = torch.cat([model[0](b) for b in batches]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, seen.mean(1))
    torch.testing.assert_close(model[1].running_var, seen.var(1))
    assert int(model[1].num_batches_tracked) == 3
    assert model[1].momentum == 0.3


def test_one_batch_is_normalised_in_evaluation_as_in_training() -> None:
    """Later norms see what earlier ones make of the batch, and no dropout."""
    model = network()
    dspfx.recalibrate(model, [X])
    variances = model[5].running_var.clone()
    model[2].p = 0.0
    expected = model.train()(X)
    seen = model[:5](X).transpose(0, 1).flatten(1)
    torch.testing.assert_close(variances, seen.var(1))
    dspfx.recalibrate(model, [X])
    torch.testing.assert_close(model[5].running_var, seen.var(1))
    torch.testing.assert_close(model.eval()(X), expected, rtol=0.02, atol=0.02)  # n or n - 1


@pytest.mark.parametrize("training", [True, False])
def test_prepared_and_masked(training: bool) -> None:
    prepared = dspfx.prepare(network(), X).train(training)
    dspfx.set_masks(prepared, random_masks(prepared))
    prepared.get_submodule("5").eval()  # frozen by the user
    modes = {name: m.training for name, m in prepared.named_modules()}
    graph = prepared.graph
    weights = {name: p.clone() for name, p in prepared.named_parameters()}
    dspfx.recalibrate(prepared, [(X, torch.zeros(10)), (X, torch.zeros(10))])
    assert {name: m.training for name, m in prepared.named_modules()} == modes
    assert prepared.graph is graph
    assert not any(m._forward_pre_hooks for m in prepared.modules())
    for name, parameter in prepared.named_parameters():
        assert torch.equal(parameter, weights[name])
    seen = prepared.get_submodule("0")(X).transpose(0, 1).flatten(1)
    torch.testing.assert_close(prepared.get_submodule("1").running_mean, seen.mean(1))
    gone = ~prepared.get_submodule("4").gate.alive
    torch.testing.assert_close(
        prepared.get_submodule("5").running_var[gone], torch.zeros(int(gone.sum()))
    )
    dspfx.convert(prepared.eval())  # verified


def test_a_compact_model_with_a_norm_that_could_not_be_folded() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()
    )
    prepared = dspfx.prepare(model.eval(), X)
    dspfx.set_masks(prepared, random_masks(prepared))
    compact = dspfx.convert(prepared)
    left = [m for m in compact.modules() if isinstance(m, nn.BatchNorm2d)]
    assert left
    batches = [X * 2, X + 3]
    dspfx.recalibrate(compact, batches)
    dspfx.recalibrate(prepared, batches)
    torch.testing.assert_close(compact(X), prepared(X), rtol=1e-4, atol=1e-5)
    assert not any(m.training for m in compact.modules())


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.last(self.norm(input=self.a(x) + scale * self.b(y)))


@pytest.mark.parametrize("prepared", [True, False])
def test_several_inputs(prepared: bool) -> None:
    torch.manual_seed(0)
    model: Any = Pair().eval()
    if prepared:
        model = dspfx.prepare(model, (X, X))
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    means = []
    label = torch.zeros(10)
    for batch, call in [
        ((X, X.flip(1)), None),
        ([X, X.flip(1), label], None),
        ({"x": X, "y": X.flip(1)}, None),
        ({"left": X, "label": label}, lambda b: model(b["left"], b["left"].flip(1))),
    ]:
        norm.reset_running_stats()
        dspfx.recalibrate(model, [batch], call=call)
        means.append(norm.running_mean.clone())
    assert means[0].abs().min() > 0
    assert all(torch.equal(mean, means[0]) for mean in means)


def test_a_model_whose_inputs_are_all_optional_gets_the_first() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
            assert y is None  # it is the label
            return self.norm(torch.zeros(1, 3, 1, 1) if x is None else x)

    model = Optional()
    dspfx.recalibrate(model, [(X, torch.zeros(10))])
    torch.testing.assert_close(model.norm.running_mean, X.mean((0, 2, 3)))


def test_norms_without_statistics_and_norms_that_are_not_reached_stay() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.BatchNorm2d(3, track_running_stats=False)
            self.tracked = nn.BatchNorm2d(3)
            self.unused = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.tracked(self.used(x))

    model = Unused()
    with unchanged(model.used), unchanged(model.unused):
        dspfx.recalibrate(model, [X])
    assert int(model.tracked.num_batches_tracked) == 1


def test_a_model_without_statistics_is_fine() -> None:
    """It sees every batch all the same, in its own mode, and stays as it is."""
    for norm in (nn.BatchNorm2d(3, track_running_stats=False), nn.Identity()):
        seen = []
        norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with unchanged(norm):
            assert dspfx.recalibrate(norm, [X, X[:3]]) is None
        assert [len(x) for x in seen] == [10, 3]
        assert norm.training
        assert not norm.state_dict().keys() & {"running_mean", "running_var"}
        with unchanged(norm), pytest.raises(dspfx.DataError, match="no batch"):
            dspfx.recalibrate(norm, [])


def test_batches_that_reach_no_norm_are_an_error() -> None:
    model, other = network(), network()
    for call in (other, lambda batch: None):
        with unchanged(model), pytest.raises(dspfx.DataError, match="reached no batch norm"):
            dspfx.recalibrate(model, [X], call=call)


def test_errors_change_nothing() -> None:
    model = network()
    for batches, error, words in [
        ([], dspfx.DataError, "no batch"),
        ([X, X * float("nan")], dspfx.DataError, "not finite"),
        ([X, X[:, :2]], RuntimeError, "channels"),
        ([X, X[:1, :, :5, :5]], dspfx.DataError, "leave that batch out"),
    ]:
        with unchanged(model), pytest.raises(error, match=words):
            dspfx.recalibrate(model, batches)
