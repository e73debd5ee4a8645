"""How often the network is run by `prepare`, `convert` and `GradualPruning`: counts, not times."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.model import same_graph
from dspfx.model.analysed import analyse_prepared
from dspfx.passes.analysis import channels
from dspfx.passes.analysis.products import Products
from dspfx.passes.sandbox.calls import Call
from helpers import randomise

SIZE, SAMPLES = 96, 2  # more than 2**15 numbers: one sample is enough to train


class Net(nn.Module):
    """Convolutions and norms with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.conv_a, self.conv_b = nn.Conv2d(8, 16, 3, 1, 1), nn.Conv2d(16, 8, 3, 1, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.conv_b(torch.relu(self.conv_a(x)))
        return self.head(x.mean((2, 3)))


def macs_of(call: Callable[[], Any]) -> int:
    """The multiply-accumulates that are executed, those of gradients included."""
    with Products() as counted:
        call()
    return counted.macs


@pytest.fixture
def model() -> nn.Module:
    """With random weights."""
    return randomise(Net())


@pytest.mark.parametrize("values", ["zeros", "normal"])
def test_prepare_executes_ten_forward_passes_at_most(model: nn.Module, values: str) -> None:
    x = torch.zeros(SAMPLES, 3, SIZE, SIZE)
    x = x if values == "zeros" else x.normal_()
    one = macs_of(lambda: model(x))
    assert macs_of(lambda: dspfx.prepare(model, x)) <= 10 * one


def test_few_numbers_are_trained_on_all_samples(model: nn.Module) -> None:
    x = torch.randn(SAMPLES, 3, 16, 16)
    one = macs_of(lambda: model(x))
    # forward twice and backward once, by the model and by its graph: eight and not four
    assert 10 * one < macs_of(lambda: dspfx.prepare(model, x)) <= 15 * one


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that are trained on, from now on."""
    shapes: list[torch.Size] = []
    training_pass = same_graph.training_pass

    def noting(module: nn.Module, call: Call) -> Any:
        shapes.append(call.args[0].shape)
        return training_pass(module, call)

    monkeypatch.setattr(same_graph, "training_pass", noting)
    return shapes


def test_one_sample_of_a_smaller_size_is_trained_on(
    model: nn.Module, trained: list[torch.Size]
) -> None:
    dspfx.prepare(model, torch.randn(SAMPLES, 3, 3 * SIZE, 3 * SIZE))
    by_model, by_graph = trained
    assert by_model == by_graph
    assert by_model[0] == 1
    assert by_model[2] < 3 * SIZE


def test_what_is_zero_without_other_samples_is_trained_on_all(trained: list[torch.Size]) -> None:
    class Centred(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x - x.mean(0)

    dspfx.prepare(randomise(Centred()), torch.randn(SAMPLES, 3, 3 * SIZE, 3 * SIZE))
    assert [shape[0] for shape in trained] == [1, 2, 2]  # by the model, and by both
    assert trained[1] == trained[2]


def test_sizes_at_which_another_code_trains_are_refused(trained: list[torch.Size]) -> None:
    class Halved(Net):
        def forward(self, x: Tensor) -> Tensor:
            half = self.training and x.shape[-1] < SIZE
            return super().forward(x) / (2 if half else 1)

    x = torch.randn(SAMPLES, 3, SIZE, SIZE)
    prepared: Any = dspfx.prepare(randomise(Halved()), x)
    assert trained[-1] == x.shape
    assert "for other sizes than its graph" in prepared.notes[-1]
    with pytest.raises(AssertionError, match=f"is {SIZE}"):
        prepared(x[:, :, :-2])


def test_convert_executes_seven_forward_passes_at_most(model: nn.Module) -> None:
    x = torch.zeros(SAMPLES, 3, SIZE, SIZE)
    one = macs_of(lambda: model(x))
    prepared = dspfx.prepare(model, x)
    assert macs_of(lambda: dspfx.convert(prepared)) <= 7 * one


def test_an_analysis_is_kept_until_the_graph_or_what_it_found_changes(model: nn.Module) -> None:
    prepared: Any = dspfx.prepare(model, torch.zeros(2, 3, 24, 24))
    analysis = analyse_prepared(prepared)
    assert analyse_prepared(prepared) is analysis
    dspfx.prune(prepared, dspfx.Budget(macs=0.6))
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.mul_(1.5)
    assert analyse_prepared(prepared) is analysis  # masks and weights are no part of it

    norm = prepared.get_submodule("norm")
    with torch.no_grad():
        norm.bias.zero_()
        norm.running_mean.zero_()
    another = analyse_prepared(prepared)
    assert another is not analysis  # zeros stay zeros
    norm.eps = 0.1
    assert analyse_prepared(prepared) is not another
    another = analyse_prepared(prepared)
    prepared.double()
    assert analyse_prepared(prepared) is not another
    another = analyse_prepared(prepared)
    prepared.norm = nn.BatchNorm2d(8).double()
    assert analyse_prepared(prepared) is not another


class Scale(nn.Module):
    """A user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.by = {"factor": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.by["factor"] * x


def test_an_analysis_is_not_kept_where_a_users_own_code_is_called() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Scale(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3))
    config = dspfx.PrepareConfig(opaque=("1",))
    prepared: Any = dspfx.prepare(model, torch.zeros(2, 3, 24, 24), config=config)
    assert analyse_prepared(prepared) is not analyse_prepared(prepared)


def test_gradual_pruning_analyses_once_for_all_its_steps(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: Any = dspfx.prepare(model, torch.zeros(2, 3, 24, 24))
    count = []
    run = channels._Analyser.run

    def counted(self: Any, *args: Any) -> Any:
        count.append(1)
        return run(self, *args)

    monkeypatch.setattr(channels._Analyser, "run", counted)
    steps = 20
    pruning = dspfx.GradualPruning(
        prepared, dspfx.Budget(macs=0.5), total_steps=steps, begin=0.0, end=1.0, prunings=steps
    )
    at_first = len(count)
    assert at_first <= 2  # of the model, and of the copy that it is tried on
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        prepared(torch.randn(2, 3, 24, 24)).square().mean().backward()
        pruning.step()
        optimizer.step()
    assert pruning.prunings_done == steps
    assert len(count) == at_first
