"""Tracing: both modes, all keys, and in-place writes."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dspfx
from dspfx.passes.tracing.trace import Traced, trace
from helpers import assert_equal, random_masks, randomise


def traced_model(model: nn.Module, x: Tensor) -> Traced:
    return trace(model, {next(iter(inspect.signature(model.forward).parameters)): x})


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused = nn.Conv2d(3, 3, 1), nn.Linear(2, 2)
        self.aux = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.dropout(self.conv(x), 0.5, self.training).mean((2, 3))
        return (x, self.aux(x)) if self.training else (x,)


def test_modes_that_differ_have_graphs_that_differ() -> None:
    root = Modes()
    traced = traced_model(root, torch.randn(2, 3, 4, 4))
    assert traced.eval is not traced.train
    assert "aux" in {n.target for n in traced.train.nodes}
    assert "aux" not in {n.target for n in traced.eval.nodes}
    assert list(root.state_dict()) == list(Modes().state_dict())


def test_modes_that_agree_share_a_graph() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout())
    traced = traced_model(model, torch.randn(2, 3, 4, 4))
    assert torch.equal(model[1].running_mean, torch.zeros(3))
    assert traced.eval is traced.train


def test_readers_follow_in_place_writes() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            z = self.relu(y)
            z.add_(y)  # y is what the relu wrote
            return F.hardtanh(z, 0, 1, True) - y * 2 + z.sigmoid_()

    x = torch.randn(4, 5)
    root = Overwrites()
    traced = traced_model(root, x)
    module = torch.fx.GraphModule(root, traced.eval)
    assert torch.equal(module(x), Overwrites()(x))
    by_name = {n.name: n for n in traced.eval.nodes}
    assert by_name["add_"].args == (by_name["relu"], by_name["relu"])
    assert len(by_name["mul"].users) == 1


def _accumulate(x: Tensor, y: Tensor) -> None:
    x[:, 1:] += y[:, 1:]


def _accumulate_and_return(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:] += y[:, 1:]
    return x


torch.fx.wrap("_accumulate")
torch.fx.wrap("_accumulate_and_return")


@pytest.mark.parametrize("returns", [False, True])
def test_what_an_unknown_function_overwrites_is_read_after_it(returns: bool) -> None:
    """A call whose result nobody reads is no dead code if it writes to its argument."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = (nn.Conv2d(c, 4, 1) for c in (3, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.a(x)
            if returns:
                _accumulate_and_return(y, x)
            else:
                _accumulate(y, x)
            return self.b(y)

    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    prepared = dspfx.prepare(randomise(Hidden()).double().eval(), x)
    dspfx.set_masks(prepared, random_masks(prepared, keep=0.4, drop=0.3))
    compact = dspfx.convert(prepared)
    assert "_accumulate" in compact.code
    assert_equal(prepared(x), compact(x))
