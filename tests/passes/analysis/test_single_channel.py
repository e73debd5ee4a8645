"""Layers that read a single channel are gated: each of their filters reads it or leaves."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, macs, randomise


class Narrow(nn.Module):
    """A network that was pruned to one channel in two places; `[N, 3, H, W]` -> `[N, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 1, 3, padding=1), nn.BatchNorm2d(1)
        self.widen, self.wide_norm = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.body = nn.Conv2d(32, 16, 3, padding=1)
        self.down, self.up = nn.Conv2d(16, 1, 1), nn.Conv2d(1, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.body(self.wide_norm(self.widen(x)).relu()).relu()
        x = x + self.up(self.down(x))
        return self.head(x.mean((2, 3)))


class Decoder(nn.Module):
    """A linear layer, a transposed and a plain convolution of one channel, in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(3, 1), nn.Linear(1, 6)
        self.up = nn.ConvTranspose1d(1, 8, 4, 2, 1)
        self.down, self.again = nn.Conv1d(8, 1, 3, padding=1), nn.Conv1d(1, 6, 3, padding=1)
        self.out = nn.Conv1d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.excite(self.squeeze(x.mean(2)).relu()).sigmoid()
        x = self.again(self.down(self.up(x.mean(1, keepdim=True)).relu()).relu())
        return self.out((x * scale[:, :, None]).relu())


def images(size: int = 16, samples: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(samples, 3, size, size, generator=generator, dtype=torch.float64)


def signals(size: int = 16, samples: int = 2) -> Tensor:
    return images(size, samples)[:, :, 0]


class ChannelsLast(nn.Module):
    """A single channel in the last dimension, and back in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc, self.last = nn.Conv2d(3, 1, 3), nn.Linear(1, 1), nn.Conv2d(1, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(F.max_pool2d(self.first(x), 4).permute(0, 2, 3, 1))
        return self.last(x.relu().movedim(-1, 1))


class Folded(nn.Module):
    """A single channel after its positions, and split off by a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc, self.last = nn.Conv2d(3, 1, 3), nn.Linear(1, 1), nn.Conv1d(1, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(F.max_pool2d(self.first(x), 4).flatten(2).transpose(1, 2))
        return self.last(x.relu().swapaxes(1, 2))


NETWORKS = [(Narrow, images, "widen"), (Decoder, signals, "up")]


@pytest.fixture(params=NETWORKS, ids=lambda param: param[0].__name__)
def network(request: pytest.FixtureRequest):
    kind, inputs, layer = request.param
    model = randomise(kind().double(), 1).eval()
    return model, inputs, layer


def assert_same(prepared: nn.Module, inputs) -> nn.Module:
    compact = dspfx.convert(prepared)
    prepared.eval()
    with torch.no_grad():
        for size in (16, 19):
            assert_equal(prepared(inputs(size, 3)), compact(inputs(size, 3)))
    return compact


def test_filters_that_read_one_channel_leave_one_by_one(network) -> None:
    model, inputs, layer = network
    prepared = dspfx.prepare(model, inputs())
    mask = torch.zeros_like(dspfx.get_masks(prepared)[layer])
    assert mask.shape[1] == 1
    mask[1::3] = True
    dspfx.set_masks(prepared, {layer: mask})
    assert torch.equal(dspfx.get_masks(prepared)[layer], mask)
    compact = assert_same(prepared, inputs)
    assert compact.get_submodule(layer).out_channels == int(mask.sum())
    assert macs(compact, inputs()) < macs(model, inputs())


def test_an_only_channel_that_dies_takes_its_readers_along(network) -> None:
    model, inputs, _ = network
    prepared = dspfx.prepare(model, inputs())
    writer = "down"
    dspfx.set_masks(prepared, {writer: torch.zeros_like(dspfx.get_masks(prepared)[writer])})
    reader = "up" if isinstance(model, Narrow) else "again"
    assert not dspfx.get_masks(prepared)[reader].any()
    assert_same(prepared, inputs)


@pytest.mark.parametrize("verb", [dspfx.prune, dspfx.prune_channels])
def test_verbs_prune_what_reads_one_channel(network, verb) -> None:
    model, inputs, layer = network
    for share in (0.9, 0.6, 0.45):
        prepared = dspfx.prepare(model, inputs())
        dspfx.cluster_groups(prepared)
        assert verb(prepared, dspfx.Budget(macs=share)).achieved <= share
        assert_same(prepared, inputs)
        if verb is dspfx.prune_channels and share == 0.45:
            assert not dspfx.get_masks(prepared)[layer].all()


def test_learners_train_what_reads_one_channel(network) -> None:
    model, inputs, _ = network
    prepared = dspfx.prepare(model, inputs()).train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    learner = dspfx.GroupLearner(prepared, optimizer, strength=1e-2, total_steps=8)
    for step in range(8):
        learner.step(lambda step=step: prepared(inputs(16 + step, 4)).square().mean())
    for gated in gated_layers(prepared).values():
        assert gated.gate.logits.isfinite().all()
        assert gated.weight.isfinite().all()
    pruning = dspfx.GradualPruning(prepared, dspfx.Budget(macs=0.5), total_steps=8, end=1)
    for step in range(8):
        optimizer.zero_grad()
        prepared(inputs(16 + step, 4)).square().mean().backward()
        pruning.step()
        optimizer.step()
    assert pruning.report is not None
    assert pruning.report.achieved <= 0.5
    assert_same(prepared, inputs)


def test_what_reads_one_channel_is_saved_and_trained_narrow(network, tmp_path: Path) -> None:
    model, inputs, _ = network
    prepared = dspfx.prepare(model, inputs())
    dspfx.prune_channels(prepared, dspfx.Budget(macs=0.6))
    narrow = dspfx.narrow(prepared).train()
    optimizer = torch.optim.SGD(narrow.parameters(), lr=0.01)
    narrow(inputs(16, 4)).square().mean().backward()
    optimizer.step()
    dspfx.widen(narrow, prepared)
    with torch.no_grad():
        assert_equal(narrow.eval()(inputs()), prepared.eval()(inputs()))
    for saved in (prepared, assert_same(prepared, inputs)):
        dspfx.save(saved, tmp_path / "model.dspfx")
        loaded = dspfx.load(tmp_path / "model.dspfx", type(model)().double())
        with torch.no_grad():
            assert_equal(saved(inputs()), loaded.eval()(inputs()), tolerance=0)


def test_depthwise_layers_stay_what_they_are() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 3, groups=4)
    )
    model = nn.Sequential(model, nn.Conv2d(8, 4, 1)).double()
    prepared = dspfx.prepare(model, images())
    assert list(gated_layers(prepared)) == ["1"]
    assert prepared.left_alone["0.2"] == "its filters read one channel each"


class Moved(nn.Module):
    """One channel, moved to the end and back; `[N, 3, H, W]` -> `[N, 2, H, W]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 1, 1)
        self.linear, self.up, self.last = nn.Linear(1, 5), nn.Conv2d(5, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.first(x).relu()).permute(0, 2, 3, 1)
        return self.last(self.up(self.linear(x).movedim(-1, 1).relu()).relu())


def test_an_only_channel_is_known_wherever_it_is_moved() -> None:
    prepared = dspfx.prepare(randomise(Moved().double()), images())
    down = dspfx.get_masks(prepared)["down"]
    dspfx.set_masks(prepared, {"down": torch.zeros_like(down)})
    assert not dspfx.get_masks(prepared)["linear"].any()
    assert_same(prepared, images)


@pytest.mark.parametrize("kind", [ChannelsLast, Folded])
@pytest.mark.parametrize("size", [6, 10, 18])
def test_a_single_channel_is_found_among_other_dimensions_of_size_1(
    kind: type[nn.Module], size: int
) -> None:
    """Images of 6 pixels leave one position, so that every dimension has size 1."""
    prepared = dspfx.prepare(randomise(kind().double(), 1).eval(), images(size))
    dspfx.set_masks(prepared, {"fc": torch.zeros(1, 1, dtype=torch.bool)})
    assert not prepared(images(size)).any()  # the last layer reads a dead channel
    assert_equal(prepared.eval()(images(size)), dspfx.convert(prepared)(images(size)))
