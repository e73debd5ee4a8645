"""`prune_channels`: whole channels of all layers at once, the least important first."""

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from test_properties import inputs, prepare
from torch import Tensor, nn
from torchvision_networks import network, resnet10

import dspfx
from dspfx import Budget
from dspfx.layers.gated import gated_layers
from dspfx.model.liveness import present_liveness
from dspfx.passes.analysis.channel_ops import Mix
from helpers import assert_equal, macs, randomise, unchanged
from random_networks import networks

X = torch.randn(2, 3, 32, 32)


def resnet() -> dspfx.PreparedModule:
    return copy.deepcopy(_resnet())


@functools.cache
def _resnet() -> dspfx.PreparedModule:
    torch.manual_seed(0)
    model = randomise(torchvision.models.resnet18(weights=None, num_classes=10).eval())
    return dspfx.prepare(model, X)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet", "shufflenet_v2_x0_5"])
def test_budgets_are_met_without_groups(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(network(name, num_classes=10).eval())
    prepared = dspfx.prepare(model, X)
    report = dspfx.prune_channels(prepared, Budget(macs=0.4))
    assert 0.36 <= report.achieved <= 0.4
    assert dspfx.report(prepared).after == report.after
    for mask in dspfx.get_masks(prepared).values():
        assert torch.equal(mask, mask.any(1)[:, None] & mask.any(0)[None])
    compact = dspfx.convert(prepared)
    assert dspfx.report(compact).emitted.macs == report.after.macs == macs(compact, X)
    assert_equal(prepared.eval()(X), compact(X), 1e-4)


def test_channels_leave_the_whole_residual_stream() -> None:
    prepared = resnet()
    dspfx.prune_channels(prepared, Budget(macs=0.5))
    analysis, live = present_liveness(prepared)
    streams: dict[int, set[bool]] = {}
    for node, op in analysis.ops.items():
        if isinstance(op, Mix):
            kept = live.kept[node]
            for channel, alive in zip(analysis.class_of(node).tolist(), kept.tolist(), strict=True):
                streams.setdefault(channel, set()).add(alive)
    assert all(len(alive) == 1 for alive in streams.values())
    assert dspfx.convert(prepared).get_submodule("conv1").out_channels < 64


class Stream(nn.Module):
    """A stream that two layers write to and two read, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1, bias=False)
        self.inner = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.outer = nn.Conv2d(5, 6, 3, padding=1, bias=False)
        self.last = nn.Conv2d(6, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.last(x + self.outer(self.inner(x)))


def share(energy: Tensor) -> Tensor:
    return energy / energy.mean()


def test_the_least_important_channels_go_first() -> None:
    torch.manual_seed(1)
    model = Stream()
    w = {name: layer.weight.detach().double().square() for name, layer in model.named_children()}
    stream = torch.stack(
        [
            share(w["stem"].sum((1, 2, 3))),
            share(w["outer"].sum((1, 2, 3))),
            share(w["inner"].sum((0, 2, 3))),
            share(w["last"].sum((0, 2, 3))),
        ]
    ).mean(0)
    hidden = (share(w["inner"].sum((1, 2, 3))) + share(w["outer"].sum((0, 2, 3)))) / 2
    channels = [("stream", c, stream[c]) for c in range(6) if c != stream.argmax()]
    channels += [("hidden", c, hidden[c]) for c in range(5) if c != hidden.argmax()]
    order = [(where, c) for where, c, _ in sorted(channels, key=lambda channel: channel[2])]
    for count in range(len(order) + 1):
        prepared = dspfx.prepare(model, torch.randn(1, 3, 5, 5))
        gone = order[:count]
        read = torch.tensor([("stream", c) not in gone for c in range(6)])
        inner = torch.tensor([("hidden", c) not in gone for c in range(5)])
        kept = 3 * int(read.sum()) + 18 * int(read.sum()) * int(inner.sum()) + 4 * int(read.sum())
        dspfx.prune_channels(prepared, Budget(macs=min(1.0, (kept + 0.5) / 582)))
        masks = dspfx.get_masks(prepared)
        assert torch.equal(masks["inner"], inner[:, None] & read[None])
        assert torch.equal(masks["outer"], read[:, None] & inner[None])
        assert torch.equal(masks["last"], read.expand(4, 6))


def test_what_is_written_and_read_without_gates_stays() -> None:
    class Bypass(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 1)
            self.inner = nn.Conv2d(6, 8, 1)
            self.outer = nn.Conv2d(8, 6, 1)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head((x + self.outer(self.inner(x))).mean((2, 3)))

    prepared = dspfx.prepare(Bypass(), torch.randn(1, 3, 4, 4))
    dspfx.prune_channels(prepared, Budget(macs=0.4))
    masks = dspfx.get_masks(prepared)
    assert masks["inner"].any(0).all()
    assert masks["outer"].any(1).all()
    assert not masks["outer"].all()


def test_an_ignored_layer_keeps_its_channels() -> None:
    torch.manual_seed(0)
    config = dspfx.PrepareConfig(ignore=["layer1.0.conv1"])
    prepared = dspfx.prepare(resnet10(num_classes=10), X, config=config)
    dspfx.prune_channels(prepared, Budget(macs=0.6))
    assert dspfx.convert(prepared).get_submodule("layer1.0.conv1").weight.shape[:2] == (64, 64)


def test_widths_are_rounded() -> None:
    torch.manual_seed(0)
    config = dspfx.PrepareConfig(round_to=8)
    prepared = dspfx.prepare(resnet10(num_classes=10), X, config=config)
    assert dspfx.prune_channels(prepared, Budget(macs=0.5)).achieved <= 0.5
    convolutions = [m for m in dspfx.convert(prepared).modules() if isinstance(m, nn.Conv2d)]
    assert all(m.out_channels % 8 == 0 for m in convolutions)


def test_groups_are_pruned_further() -> None:
    prepared = resnet()
    dspfx.prune_channels(prepared, Budget(macs=0.5))
    first = dspfx.get_masks(prepared)
    dspfx.cluster_groups(prepared)
    assert dspfx.prune(prepared, Budget(macs=0.3)).achieved <= 0.3
    second = dspfx.get_masks(prepared)
    assert not any((second[name] & ~first[name]).any() for name in first)
    assert any(len(torch.unique(m[m.any(1)], dim=0)) > 1 for m in second.values())
    dspfx.prune_channels(prepared, Budget(macs=0.2))
    third = dspfx.get_masks(prepared)
    assert not any((third[name] & ~second[name]).any() for name in first)
    assert_equal(prepared.eval()(X), dspfx.convert(prepared)(X), 1e-4)


def test_the_whole_budget_prunes_nothing() -> None:
    prepared = resnet()
    with unchanged(prepared):
        assert dspfx.prune_channels(prepared, Budget(macs=1.0)).achieved == 1.0


def test_a_budget_too_small_says_what_is_possible() -> None:
    prepared = resnet()
    with (
        unchanged(prepared),
        pytest.raises(dspfx.BudgetError, match="one channel left to every layer"),
    ):
        dspfx.prune_channels(prepared, Budget(macs=1e-5))


@pytest.mark.parametrize("name", ["conv1", "layer2.0.conv2"])
def test_weights_that_are_not_finite(name: str) -> None:
    prepared = resnet()
    prepared.get_submodule(name).weight.data[0] = np.nan
    before = dspfx.get_masks(prepared)
    with pytest.raises(dspfx.PrepareError, match=f"{name} holds NaN"):
        dspfx.prune_channels(prepared, Budget(macs=0.5))
    assert all(torch.equal(mask, before[n]) for n, mask in dspfx.get_masks(prepared).items())


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(dspfx.ConvertError):
        dspfx.prune_channels(nn.Conv2d(3, 3, 1), Budget(macs=0.5))


@settings(max_examples=60, deadline=None)
@given(model=networks(), fraction=st.floats(0.05, 1.0))
def test_pruned_random_networks_are_converted(model: nn.Module, fraction: float) -> None:
    prepared = prepare(model, 2)
    if prepared is None:
        return
    x = inputs(model, 1)
    try:
        report = dspfx.prune_channels(prepared, Budget(macs=fraction))
    except dspfx.BudgetError:
        return
    assert report.achieved <= fraction
    for name, layer in gated_layers(prepared).items():
        lists = layer.gate.mask[layer.gate.alive].unique(dim=0)
        assert len(lists) <= getattr(layer, "groups", 1), name
    with torch.no_grad():
        assert_equal(prepared(x), dspfx.convert(prepared)(x))


class NarrowStream(nn.Module):
    """Eight blocks that write to and read from a narrow stream: a channel of it is 3 % of all."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3), nn.Conv2d(width, 3, 3)
        self.inner = nn.ModuleList(nn.Conv2d(width, inner, 3, padding=1) for _ in range(8))
        self.outer = nn.ModuleList(nn.Conv2d(inner, width, 3, padding=1) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + outer(inner(x).relu())
        return self.last(x)


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("fraction", [0.5, 0.3])
@pytest.mark.parametrize("width", [16, 12])
def test_room_that_a_large_step_leaves_is_filled(kind: str, fraction: float, width: int) -> None:
    x = torch.zeros(2, 3, 12, 12)
    stream = dspfx.prepare(NarrowStream(width, 16), x)
    for seed in range(3):
        prepared: Any = randomise(copy.deepcopy(stream), seed)
        report = dspfx.prune_channels(prepared, dspfx.Budget(**{kind: fraction}))
        assert fraction - 0.01 <= report.achieved <= fraction
        compact = dspfx.convert(prepared)
        assert dspfx.report(compact).emitted == report.emitted
