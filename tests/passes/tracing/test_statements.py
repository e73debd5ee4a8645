"""Code that assigns items, counts the batch, and shares lists with opaque modules is traced."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, random_masks, randomise

SIZES = ((2, 3, 8, 8), (4, 3, 12, 8))


class Net(nn.Module):
    def __init__(self, code: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.code = code

    def forward(self, x: Tensor) -> Any:
        return self.c(self.code(self, self.b(self.a(x))))


def shifts_frames(s: Any, y: Tensor) -> Tensor:
    n, c, h, w = y.size()
    frames = y.view(n // 2, 2, c, h, w)
    out = torch.zeros_like(frames)
    out[:, :-1, :2] = frames[:, 1:, :2]
    out[:, 1:, 2:4] = frames[:, :-1, 2:4]
    out[:, :, 4:] = frames[:, :, 4:]
    return out.view(n, c, h, w)


def swaps_channels(s: Any, y: Tensor) -> Tensor:
    out = y.new_zeros(y.shape)
    out[:, :4], out[:, 4:6] = y[:, 4:], y[:, :2]
    return out


def clears(s: Any, y: Tensor) -> Tensor:
    out = y.clone()
    out[:, :, 0] = 0.0
    out[y < 0] = 0.5
    out[..., 1:] += 1
    return out * y


def fills(s: Any, y: Tensor) -> Tensor:
    out = y.new_empty(len(y), 8, y.shape[2], y.shape[3] * 2)
    out[..., ::2] = y
    out[..., 1::2] = y.relu()
    return out


def makes(s: Any, y: Tensor) -> Tensor:
    out = torch.zeros(y.shape[0], 8, y.shape[2], y.shape[3], dtype=y.dtype)
    out[:, :, :, 1:] = y[:, :, :, :-1] * torch.arange(1, y.shape[3], dtype=y.dtype)
    return out + torch.full((len(y), 1, 1, 1), 0.5, dtype=y.dtype)


def windows(s: Any, y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    cut = y.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 4, c)
    count = len(cut) // (h * w // 16)
    cut = cut.view(count, h // 4, w // 4, 4, 4, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(count, c, h, w)


def counted_windows(s: Any, y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    cut = y.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 4, c)
    count = int(cut.shape[0] / (h * w / 4 / 4))
    cut = cut.view(count, h // 4, w // 4, 4, 4, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(count, c, h, w)


def scales(s: Any, y: Tensor) -> Tensor:
    height, width = int(y.shape[2] * 0.75), int(y.shape[3])
    return F.interpolate(y, size=(height, width * 2))[:, :, : int(height / 2.5)]


def floors(s: Any, y: Tensor) -> Tensor:
    half = math.floor(y.shape[2] / 2)
    size = math.ceil(y.shape[3] * 0.75), round(y.shape[3] * 1.5)
    return F.interpolate(y, size=(half * 2, size[0])).repeat(1, 1, 1, 2)[..., : size[1]]


CODE: dict[str, Callable[..., Any]] = {
    "frames": shifts_frames,
    "channels": swaps_channels,
    "positions": clears,
    "columns": fills,
    "made of sizes": makes,
    "windows": windows,
    "counted windows": counted_windows,
    "scaled sizes": scales,
    "rounded sizes": floors,
    "batch": lambda s, y: y.reshape(len(y), 8, y.shape[2], -1),
    "length of a row": lambda s, y: y + torch.arange(len(y[0, 0]), dtype=y.dtype)[:, None],
}


@pytest.mark.parametrize("kind", CODE)
def test_is_traced(kind: str) -> None:
    model = randomise(Net(CODE[kind])).double()
    inputs = [torch.randn(size).double() for size in SIZES]
    prepared = dspfx.prepare(model, inputs[0])
    assert isinstance(prepared, dspfx.PreparedModule)
    assert list(gated_layers(prepared)) == ["b", "c"]
    for x in inputs:
        for mode in (True, False):
            assert_equal(model.train(mode)(x), prepared.train(mode)(x), tolerance=0)
    for module in (model, prepared):
        module.train()(inputs[1]).square().sum().backward()
    for name, parameter in prepared.named_parameters():
        assert_equal(model.get_parameter(name).grad, parameter.grad, 1e-12)
    prepared.eval()
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    compact = dspfx.convert(prepared)
    twins = [pickle.loads(pickle.dumps(module)) for module in (prepared, compact)]
    for x in inputs:
        expected = prepared(x)
        for module in (compact, *twins):
            assert_equal(expected, module(x))


def each(s: Any, y: Tensor) -> Tensor:
    return torch.stack([y[i] * weight for i, weight in enumerate([2.0] * len(y))])


def each_row(s: Any, y: Tensor) -> Tensor:
    return torch.stack([y[:, :, i] for i in range(int(y.shape[2] / 2))], 2)


def asks_for_int(s: Any, y: Tensor) -> Tensor:
    half = y.shape[2] / 2
    return y[:, :, : int(half)] if isinstance(half, int | float) else y


@pytest.mark.parametrize("code", [each, each_row, asks_for_int])
def test_counts_that_are_told_are_checked(code: Callable[..., Any]) -> None:
    model = randomise(Net(code)).double()
    prepared = dspfx.prepare(model, torch.randn(SIZES[0]).double())
    x = torch.randn(3 if code is not each else 2, 3, 8, 6).double()
    assert_equal(model(x), prepared(x), 1e-12)
    with pytest.raises(AssertionError, match="other inputs"):
        prepared(torch.randn(SIZES[1]).double())


def writes_view(s: Any, y: Tensor) -> Tensor:
    view = y[:, :4]
    view[:, 0] = 0.0
    return y


def test_a_view_that_is_overwritten_is_refused() -> None:
    with pytest.raises(dspfx.TraceError, match="shares its memory"):
        dspfx.prepare(randomise(Net(writes_view)).double(), torch.randn(SIZES[0]).double())


class Opaque(nn.Module):
    def __init__(self, code: Callable[..., Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.code = code

    def forward(self, *given: Any) -> Any:
        if self.layers[0].weight.sum() > 1e9:
            return None
        return self.code(self.layers, *given)


def overwrites_items(layers: Any, y: list[Tensor]) -> list[Tensor]:
    for i, layer in enumerate(layers):
        y[i] = layer(y[i])
    return y


def appends(layers: Any, y: list[Tensor], more: Tensor) -> None:
    y.append(layers[0](more))
    y[0] = layers[1](y[0] + y[1])


def takes(layers: Any, y: list[Tensor]) -> Tensor:
    return layers[0](y.pop())


def overwrites_keys(layers: Any, y: dict[str, Tensor]) -> None:
    y["a"] = layers[0](y["a"]) + y.pop("b")
    y["c"] = layers[1](y["a"])


def shares(s: Any, y: Tensor) -> Tensor:
    own = [y, y * 2, y.relu()]
    found = s.leaf(own)
    return own[0] + own[1] * own[2] + found[0]


def shares_and_adds(s: Any, y: Tensor) -> Tensor:
    own = [y, y * 2]
    s.leaf(own, y.relu())
    assert len(own) == 3
    return own[0] + own[1] * own[2]


def shares_and_loses(s: Any, y: Tensor) -> Tensor:
    own = [y, y * 2]
    return s.leaf(own) + sum(own)


def shares_keys(s: Any, y: Tensor) -> Tensor:
    own = {"a": y, "b": y * 2}
    s.leaf(own)
    return own["a"] + sum(own.values())


SHARED = {
    "items": (shares, overwrites_items),
    "appended": (shares_and_adds, appends),
    "taken": (shares_and_loses, takes),
    "keys": (shares_keys, overwrites_keys),
}


@pytest.mark.parametrize("kind", SHARED)
def test_what_an_opaque_module_leaves_in_a_list_is_read(kind: str) -> None:
    code, does = SHARED[kind]
    model = Net(code)
    model.leaf = Opaque(does)
    randomise(model).double()
    inputs = [torch.randn(size).double() for size in SIZES]
    prepared = dspfx.prepare(model, inputs[0])
    assert isinstance(prepared, dspfx.PreparedModule)
    assert list(gated_layers(prepared)) == ["b", "c"]
    for x in inputs:
        for mode in (True, False):
            assert_equal(model.train(mode)(x), prepared.train(mode)(x), tolerance=0)
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    compact = dspfx.convert(prepared)
    for x in inputs:
        for module in (compact, copy.deepcopy(prepared), copy.deepcopy(compact)):
            assert_equal(prepared(x), module(x))
    twin = pickle.loads(pickle.dumps(prepared))
    for x in inputs:
        for module in (twin, dspfx.convert(twin), pickle.loads(pickle.dumps(compact))):
            assert_equal(prepared(x), module(x))


def test_a_list_within_a_list_that_is_overwritten_is_refused() -> None:
    model = Net(lambda s, y: s.leaf([[y, y]]))
    model.leaf = Opaque(lambda layers, y: overwrites_items(layers, y[0])[1])
    with pytest.raises(dspfx.TraceError, match="lies in another"):
        dspfx.prepare(nn.Sequential(model), torch.randn(SIZES[0]))


def draws(s: Any, y: Tensor) -> Tensor:
    return y * torch.rand(1, dtype=torch.float64) if s.training else y


def test_random_numbers_are_drawn_in_every_call_of_what_was_pickled() -> None:
    """They were drawn once, when it was read."""
    model = randomise(Net(draws)).double()
    x = torch.randn(SIZES[0]).double()
    prepared = dspfx.prepare(model, x)
    twin = pickle.loads(pickle.dumps(prepared))
    for seed in range(2):
        results = []
        for module in (model, prepared, twin):
            torch.manual_seed(seed)
            results.append(module(x))
        assert_equal(results[0], results[1], tolerance=0)
        assert_equal(results[0], results[2], tolerance=0)
