"""A model is traced in training mode only if its code may do something else there."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.passes.tracing import trace as tracing
from dspfx.passes.tracing.trace import Traced, trace


class Net(nn.Module):
    """Ends with what `end` does."""

    def __init__(self, end: Callable[["Net", Tensor], Any]) -> None:
        super().__init__()
        self.end = end
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)
        self.scaled = Scaled()

    def forward(self, x: Tensor) -> Any:
        return self.end(self, self.head(self.body(x)))


class Scaled(nn.Module):
    """Opaque: other code gets something else of it in training."""

    def forward(self, x: Tensor) -> Any:
        return {"value": 2 * x} if self.training else {"value": x, "score": x.mean()}


def traced(net: nn.Module, opaque: frozenset[str] = frozenset()) -> Traced:
    """The graphs of `net`."""
    return trace(net, {"x": torch.randn(2, 3, 8, 8)}, opaque)


def scripted(module: nn.Module) -> Any:
    """`module` as TorchScript."""
    with warnings.catch_warnings(action="ignore"):  # it is deprecated, and used
        return torch.jit.script(module)


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Those in which anything is traced, from now on."""
    found: list[bool] = []
    trace_graph = tracing._trace_graph

    def noting(root: nn.Module, *rest: Any) -> Any:
        found.append(root.training)
        return trace_graph(root, *rest)

    monkeypatch.setattr(tracing, "_trace_graph", noting)
    return found


def test_code_that_never_asks_is_traced_once(modes: list[bool]) -> None:
    found = traced(Net(lambda _, y: y + 1))
    assert modes == [False]
    assert found.train is found.eval


def own_mode(net: Net, y: Tensor) -> Tensor:
    return 2 * y if net.training else y


def mode_of_a_child(net: Net, y: Tensor) -> Tensor:
    return y + 1 if net.body[1].training else y


def by_getattr(net: Net, y: Tensor) -> Tensor:
    return nn.functional.dropout(y, 0.5, getattr(net, "training"))  # noqa: B009


def gradients(_: Net, y: Tensor) -> Tensor:
    return 2 * y if torch.is_grad_enabled() else y


def items_of_opaque(net: Net, y: Tensor) -> Any:
    made = net.scaled(y)
    return made["value"] * len(made)


@pytest.mark.parametrize("end", [own_mode, mode_of_a_child, by_getattr, gradients, items_of_opaque])
def test_code_that_asks_is_traced_in_both_modes(
    end: Callable[[Net, Tensor], Any], modes: list[bool]
) -> None:
    found = traced(Net(end), opaque=frozenset(("scaled",)))
    assert modes[:2] == [False, True]
    assert found.train is not found.eval


def test_a_train_of_ones_own_is_followed(modes: list[bool]) -> None:
    class Switching(Net):
        def train(self, mode: bool = True) -> Any:
            self.factor = 3.0 if mode else 1.0
            return super().train(mode)

    found = traced(Switching(lambda net, y: y * net.factor))
    assert modes == [False, True]
    assert found.train is not found.eval


def test_the_attribute_is_as_before_afterwards() -> None:
    net = Net(own_mode).train()
    dspfx.prepare(net, torch.randn(2, 3, 8, 8))
    assert net.training
    assert "training" not in vars(nn.Module)
    assert not scripted(nn.Dropout()).eval().training


def test_a_scripted_module_is_traced_around_in_both_modes(modes: list[bool]) -> None:
    net = Net(lambda _, y: y)
    net.body[2] = scripted(nn.Dropout())
    traced(net)
    assert modes == [False, True]
