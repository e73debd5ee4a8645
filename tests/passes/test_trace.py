"""Tracing: both modes, all keys, and in-place writes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspfx.passes.trace import trace


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused = nn.Conv2d(3, 3, 1), nn.Linear(2, 2)
        self.aux = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.dropout(self.conv(x), 0.5, self.training).mean((2, 3))
        return (x, self.aux(x)) if self.training else (x,)


def test_modes_that_differ_have_graphs_that_differ() -> None:
    traced = trace(Modes())
    assert traced.eval is not traced.train
    assert "aux" in {n.target for n in traced.train.nodes}
    assert "aux" not in {n.target for n in traced.eval.nodes}
    assert list(traced.root.state_dict()) == list(Modes().state_dict())


def test_modes_that_agree_share_a_graph() -> None:
    traced = trace(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout()))
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

    traced = trace(Overwrites())
    module = torch.fx.GraphModule(traced.root, traced.eval)
    x = torch.randn(4, 5)
    assert torch.equal(module(x), Overwrites()(x))
    by_name = {n.name: n for n in traced.eval.nodes}
    assert by_name["add_"].args == (by_name["relu"], by_name["relu"])
    assert len(by_name["mul"].users) == 1
