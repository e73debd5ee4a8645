"""Which layers are computed by Winograd's algorithm."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from dspfx.layers import native
from dspfx.layers.group_conv import group_conv_like
from dspfx.layers.group_conv_run import GroupConvRun
from dspfx.passes.lowering.runs import join_runs
from dspfx.passes.lowering.winograd import choose, measured_choice
from helpers import assert_equal

X = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def traced(model: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(model, Tracer().trace(model))


@pytest.fixture
def model() -> fx.GraphModule:
    """Two layers that the algorithm can compute, and two between them that it cannot."""
    assert native.built()
    convs = [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(6, 6, 1),
        nn.Conv2d(6, 6, 3, stride=2, padding=1),
        nn.Conv2d(6, 5, (3, 2), padding=1),
    ]
    own = [
        group_conv_like(c, [(np.arange(len(c.weight)), np.arange(c.in_channels))], c.weight, c.bias)
        for c in convs
    ]
    model = traced(nn.Sequential(own[0], own[1], nn.Sigmoid(), own[2], own[3]).eval())
    join_runs(model)
    return model


def clock(winners: set[str]) -> Any:
    """In place of a clock: these layers are faster by the algorithm, the others slower."""

    def seconds(run: GroupConvRun, *_: Tensor) -> Tensor:
        own = run.by_winograd()
        gain = [-1.0 if name in winners else 1.0 for name in run.names]
        return torch.tensor([3 + g * (n in own) for n, g in zip(run.names, gain, strict=True)])

    return seconds


@pytest.mark.parametrize("winners", [set(), {"0"}, {"4"}, {"0", "4"}])
def test_the_faster_algorithm_is_chosen(
    model: fx.GraphModule, monkeypatch: pytest.MonkeyPatch, winners: set[str]
) -> None:
    monkeypatch.setattr(GroupConvRun, "seconds", clock(winners))
    wanted = model(X)
    choice = measured_choice(model, (X,))
    assert all(not run.by_winograd() for run in runs(model))
    choose(model, choice)
    assert {name for run in runs(model) for name in run.by_winograd()} == winners
    assert str(model).count(", Winograd") == len(winners)
    assert_equal(wanted, model(X), 1e-5)


def test_it_is_measured(model: fx.GraphModule) -> None:
    choice = measured_choice(model, (X,))
    assert sorted(choice) == ["run_0", "run_1"]
    assert set(choice["run_0"]) <= {0}
    assert set(choice["run_1"]) <= {1}


def test_weights_are_read_back(model: fx.GraphModule) -> None:
    (first, _) = runs(model)
    twice = first.transformed([0]).transformed([])
    assert_equal(first.weight, twice.weight, 1e-6)


def runs(model: nn.Module) -> list[GroupConvRun]:
    return [module for module in model.modules() if isinstance(module, GroupConvRun)]
