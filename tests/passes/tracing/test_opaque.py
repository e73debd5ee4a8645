"""Modules that the graph of the whole calls as they are: without a graph, or with hooks on them."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, random_masks, randomise

IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.manual_seed(0))


def layers(channels: int) -> nn.Sequential:
    inner = (nn.Conv2d(channels, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU())
    return nn.Sequential(*inner, nn.Conv2d(9, channels, 1))


class Gate(nn.Module):
    """Has no graph, but its layers have one."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.layers = layers(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if x.abs().max() > 0 else x


class Net(nn.Module):
    def __init__(self, inner: nn.Module, outer: int = 6) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 6, 3, padding=1), inner
        self.outer = nn.Sequential(nn.Conv2d(6, outer, 1), nn.ReLU(), nn.Conv2d(outer, 6, 1))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outer(self.inner(self.stem(x))).mean((2, 3)))


def check(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """`model`, prepared, and what is made of that once it is pruned."""
    randomise(model).double().eval()
    prepared = dspfx.prepare(model, IMAGES)
    assert_equal(model(IMAGES), prepared(IMAGES), tolerance=0)
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    compact = dspfx.convert(prepared)
    assert_equal(prepared(IMAGES[:, :, :6]), compact(IMAGES[:, :, :6]))
    return prepared, compact


def notes(prepared: nn.Module) -> str:
    return " ".join(str(dspfx.report(prepared)).split())


def test_a_child_without_a_graph_is_divided_where_most_of_the_model_is_in_it() -> None:
    prepared, _ = check(Net(nn.ModuleList([Gate()])[0]))
    assert list(gated_layers(prepared)) == [
        *("inner.layers.0", "inner.layers.3", "outer.0", "outer.2"),
    ]
    assert "since most of it is in modules that are no part of a graph" in notes(prepared)


def test_a_child_of_a_child_without_a_graph_is_divided() -> None:
    prepared, _ = check(nn.Sequential(nn.Sequential(Net(Gate()), nn.ReLU()), nn.Linear(4, 3)))
    assert {"0.0.inner.layers.0", "0.0.outer.2"} <= set(gated_layers(prepared))


def test_a_child_without_a_graph_is_called_whole_where_most_of_the_model_is_around_it() -> None:
    prepared, _ = check(Net(Gate(), outer=100))
    assert list(gated_layers(prepared)) == ["outer.0", "outer.2"]
    assert isinstance(prepared, dspfx.PreparedModule)
    assert "opaque, since it cannot be traced: inner: TypeError" in notes(prepared)


@pytest.mark.parametrize("place", ["inner", "outer", "inner.0"])
@pytest.mark.parametrize("before", [False, True])
def test_hooks_on_containers_are_called_with_values_and_named(place: str, before: bool) -> None:
    """In models that have a graph."""
    model = Net(nn.Sequential(layers(6), nn.ReLU()))
    called: list[Any] = []

    def note(module: nn.Module, args: tuple[Any, ...], *_: Any) -> None:
        called.extend(args)

    module = model.get_submodule(place)
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    register(note)
    prepared, compact = check(model)
    assert called
    assert not any(isinstance(x, fx.Proxy) for x in called)
    assert place in notes(prepared)
    for twin in (prepared, compact):
        called.clear()
        twin(IMAGES)
        assert len(called) == 1


def test_a_hook_that_changes_outputs_changes_them_still() -> None:
    model = Net(nn.Sequential(layers(6), nn.ReLU()))
    model.outer.register_forward_hook(lambda _, __, y: y * 2 + 1)
    prepared, _ = check(model)
    assert list(gated_layers(prepared)) == ["inner.0.0", "inner.0.3"]


def test_a_hook_on_a_model_is_called_by_what_is_prepared_of_it() -> None:
    model, called = Net(layers(6)), []
    model.register_forward_hook(lambda *_: called.append(1))
    for twin in check(model):
        called.clear()
        twin(IMAGES)
        assert called == [1]
