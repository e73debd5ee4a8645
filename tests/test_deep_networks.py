"""However many layers follow each other, no verb runs out of stack."""

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dspfx
from helpers import assert_equal, random_masks, randomise

X = torch.randn(2, 3, 4, 4, dtype=torch.float64)


class Residual(nn.Module):
    """Sums that depend on each other, and a parameter that is scaled again and again."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(layers)])
        self.scale, self.last = nn.Parameter(torch.rand(4, 1, 1)), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, scale = self.first(x), self.scale
        for layer in self.layers:
            y = (y + layer(y)) * 0.7
            scale = scale * 1.001
        return self.last(y * scale)


def chain(layers: int) -> nn.Module:
    body: list[nn.Module] = [nn.Conv2d(3, 4, 1)]
    for _ in range(layers):
        body += [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*body, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 5))


def plain(layers: int) -> nn.Module:
    """What reads the positions that have become channels comes last."""
    body = [nn.Conv2d(4, 4, 1) if i else nn.Conv2d(3, 4, 1) for i in range(layers)]
    tail: list[nn.Module] = [m for _ in range(105) for m in (nn.ReLU(), nn.Identity())]
    return nn.Sequential(*body, nn.Flatten(), *tail, nn.Linear(64, 4), nn.Linear(4, 2))


@contextmanager
def a_third_of_the_stack() -> Iterator[None]:
    """A third as many layers are as hard; they take a third of the time."""
    usual = sys.getrecursionlimit()  # more than Python's 1,000 if another test needed that
    sys.setrecursionlimit(350)
    try:
        yield
    finally:
        sys.setrecursionlimit(usual)


@pytest.mark.parametrize(
    ("make", "layers"), [(chain, 52), (Residual, 122), (plain, 210)], ids=["chain", "sum", "plain"]
)
def test_long_chains_of_layers(
    make: Callable[[int], nn.Module], layers: int, tmp_path: Path
) -> None:
    all_verbs(make, 2, tmp_path)  # what they import may need the whole stack
    with a_third_of_the_stack():
        all_verbs(make, layers, tmp_path)


def test_a_third_of_the_stack_is_not_enough_to_recurse_over_so_many_layers() -> None:
    def at(node: torch.fx.Node) -> int:
        return 1 + max((at(before) for before in node.all_input_nodes), default=0)

    for make, layers in ((chain, 52), (Residual, 122), (plain, 210)):
        *_, output = torch.fx.symbolic_trace(make(layers)).graph.nodes
        with a_third_of_the_stack(), pytest.raises(RecursionError):
            at(output)


def all_verbs(make: Callable[[int], nn.Module], layers: int, folder: Path) -> None:
    model = randomise(make(layers)).double().eval()
    prepared = dspfx.prepare(model, X)
    assert_equal(model(X), prepared(X), tolerance=0)
    dspfx.set_masks(prepared, random_masks(prepared, keep=0.6))
    compact = dspfx.convert(prepared)
    for module in (prepared, compact):
        dspfx.save(module, folder / "model.safetensors")
        loaded = dspfx.load(folder / "model.safetensors", make(layers).double())
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
            assert_equal(module(X), twin(X), tolerance=0)
    assert "macs" in str(dspfx.report(compact)).lower()
