"""Parts of a tensor are values of their own, whatever containers they pass through."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, random_masks, randomise


class Block(nn.Module):
    """`a` and `b` write what is cut into parts of four or more channels; `c` reads them."""

    def __init__(self, code: Callable[..., Any], width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.m = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.c = nn.Conv2d(width, 6, 1)
        self.code = code

    def forward(self, x: Tensor) -> Any:
        return self.c(self.code(self, self.b(self.a(x).relu())))


def extended(s: Any, x: Tensor) -> Tensor:
    y = list(x.chunk(2, 1))
    y.extend(m(y[-1]) for m in s.m)
    return torch.cat(y, 1)


def by_keys(s: Any, x: Tensor) -> Tensor:
    y = dict(zip("abcd", torch.split(x, 4, dim=1), strict=True))
    y["a"], y["b"] = y["b"], y["a"]
    return torch.cat(list(y.values()), 1)


def sliced(s: Any, x: Tensor) -> Tensor:
    y = x.tensor_split(4, 1)
    return torch.cat(y[2:] + y[:2], 1)


def added(s: Any, x: Tensor) -> Tensor:
    y = x.split((4, 4, 8), dim=1)
    y = (x.relu(),) + y + y[::-1]  # noqa: RUF005 (sums are what is tested)
    y += (x.chunk(4, 1)[0],)
    return torch.cat(y[:4], 1)


def starred(s: Any, x: Tensor) -> Tensor:
    first, *others, last = x.chunk(4, 1)
    return torch.cat([first + last, *(o * 2 for o in others)], 1)


def unbound(s: Any, x: Tensor) -> Tensor:
    y = x.unflatten(1, (2, 8)).unbind(1)
    return torch.cat([m(part) for m, part in zip(s.m, reversed(y), strict=True)], 1)


def whole(s: Any, x: Tensor) -> Tensor:
    return torch.cat(tuple(torch.unbind(x.unflatten(1, (2, 8)), 1)), 1)


CODE = {extended: 32, by_keys: 16, sliced: 16, added: 32, starred: 12, unbound: 16, whole: 16}


@pytest.mark.parametrize("code", CODE)
def test_parts_leave_one_by_one(code: Callable[..., Any]) -> None:
    """A split that nobody reads, but by its parts, kept everything in its place."""
    model = randomise(Block(code, CODE[code])).double()
    inputs = [torch.randn(size).double() for size in ((2, 3, 8, 8), (3, 3, 6, 10))]
    prepared = dspfx.prepare(model, inputs[0])
    for mode in (True, False):
        for x in inputs:
            assert_equal(model.train(mode)(x), prepared.train(mode)(x), tolerance=0)
    free = {layer.name: layer.free for layer in dspfx.report(prepared).layers}
    assert free["b"] == 16
    assert not dspfx.report(prepared).declined
    masks = random_masks(prepared, drop=0.4)
    dspfx.set_masks(prepared, masks)
    compact = dspfx.convert(prepared)
    for x in inputs:
        assert_equal(prepared(x), compact(x))
    kept = {layer.name: layer.filters[1] for layer in dspfx.report(compact).layers}
    assert kept["b"] <= int(masks["b"].any(1).sum()) < 16
    assert {"b", "c"} <= gated_layers(prepared).keys()


def test_channels_of_parts_are_pruned() -> None:
    model, x = randomise(Block(extended, 32)).double(), torch.randn(2, 3, 8, 8).double()
    prepared = dspfx.prepare(model, x).eval()
    dspfx.prune_channels(prepared, dspfx.Budget(macs=0.4))
    compact = dspfx.convert(prepared)
    assert_equal(prepared(x), compact(x))
    assert {layer.name: layer.filters[1] for layer in dspfx.report(compact).layers}["b"] < 16


def test_parts_that_are_used_whole_stay_whole() -> None:
    model = randomise(Block(lambda s, x: torch.cat(x.chunk(2, 2), 1), 32)).double().eval()
    prepared = dspfx.prepare(model, torch.randn(2, 3, 8, 8).double())
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.4))
    compact = dspfx.convert(prepared)
    for x in (torch.randn(2, 3, 8, 8).double(), torch.randn(3, 3, 12, 6).double()):
        assert_equal(prepared(x), compact(x))
