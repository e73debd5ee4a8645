"""Operators that make one channel of several, pixel shuffles and GLUs, and of one several."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from dspfx.model.analysed import analyse_prepared
from dspfx.passes.analysis.channel_ops import FullWidth, Merge
from helpers import assert_equal, macs, random_masks, randomise


class Shuffled(nn.Module):
    """Super resolution with skips, by 2 and by 3; `[N, 3, H, W]` -> `[N, 3, 6H, 6W]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.wide, self.norm = nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.up, self.again = nn.PixelShuffle(2), nn.Conv2d(8, 36, 3, padding=1)
        self.skip, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        x = x + self.body(x)
        x = self.up(self.norm(self.wide(x)))
        y = F.pixel_shuffle(F.silu(self.again(x)), 3)
        return self.last(y * torch.sigmoid(F.interpolate(self.skip(x), scale_factor=3)))


class Gated(nn.Module):
    """GLUs of every spelling, over images and over vectors; `[N, 3, H, W]` -> `[N, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.second, self.glu = nn.Conv2d(6, 16, 3), nn.GLU(dim=1)
        self.third, self.fourth = nn.Conv2d(8, 12, 1), nn.Conv2d(6, 8, 1)
        self.vector, self.head = nn.Linear(8, 12), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.norm(self.first(x)), dim=1)
        x = self.glu(self.second(x))
        a, b = self.third(x).chunk(2, 1)
        x = F.silu(self.fourth(a * b.sigmoid()))
        return self.head(F.glu(self.vector(x.mean((2, 3)))))


class Unshuffled(nn.Module):
    """Space to channels at the start, back at the end, a skip around both; the size is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.PixelUnshuffle(2)
        self.body, self.more = nn.Conv2d(24, 16, 3, padding=1), nn.Conv2d(16, 24, 1)
        self.up, self.last = nn.PixelShuffle(2), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        y = self.more(F.silu(self.body(self.down(x))))
        return self.last(F.silu(self.up(y) + x))


class Stacked(nn.Module):
    """A shuffle of a shuffle, of a concatenation, and a GLU of a shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.last = (nn.Conv2d(c, o, 1) for c, o in ((3, 8), (4, 6), (3, 2)))
        self.a, self.b = nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(8, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        x = torch.cat([F.silu(self.a(x)), self.b(x)], 1)
        x = F.glu(F.pixel_shuffle(F.pixel_shuffle(x, 2), 2), 1)
        return self.last(F.glu(self.mid(x), 1))


NETWORKS = (Shuffled, Gated, Unshuffled, Stacked)


def images(size: int = 8, samples: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(samples, 3, size, size, generator=generator, dtype=torch.float64)


@pytest.fixture(params=NETWORKS, ids=lambda kind: kind.__name__)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return randomise(request.param(), 1).double().eval()


def assert_same(prepared: nn.Module, **how) -> nn.Module:
    compact = dspfx.convert(prepared, **how)
    prepared.eval()
    with torch.no_grad():
        for size in (8, 10, 14):
            assert_equal(prepared(images(size, 3)), compact(images(size, 3)))
    return compact


def test_nothing_is_kept_at_full_width(model: nn.Module) -> None:
    prepared = dspfx.prepare(model, images())
    with torch.no_grad():
        assert_equal(model(images()), prepared(images()), tolerance=0)
        assert_equal(model.train()(images()), prepared.train()(images()), tolerance=0)
    ops = analyse_prepared(prepared).ops
    assert any(isinstance(op, Merge) for op in ops.values())
    declined = [node for node, op in ops.items() if isinstance(op, FullWidth) and op.reason]
    assert all("chunk" in node.name for node in declined)


@pytest.mark.parametrize("seed", range(4))
def test_masked_and_compact_models_agree(model: nn.Module, seed: int) -> None:
    prepared = dspfx.prepare(model, images(), config=dspfx.PrepareConfig(groups=3))
    dspfx.set_masks(prepared, random_masks(prepared, drop=(0.0, 0.3, 0.6, 0.9)[seed], seed=seed))
    for cost_model in (dspfx.FEWEST_WEIGHTS, dspfx.CostModel(100, 1, 0, 0, 1)):
        assert_same(prepared, cost_model=cost_model)


def test_channels_that_are_merged_go_together() -> None:
    prepared = dspfx.prepare(randomise(Shuffled(), 1).double(), images())
    mask = torch.ones_like(dspfx.get_masks(prepared)["wide"])
    mask[4:8] = mask[20:24] = False  # two channels whole
    mask[0] = mask[13] = False  # parts of others
    dspfx.set_masks(prepared, {"wide": mask})
    compact = assert_same(prepared)
    assert compact.again.in_channels == 6
    assert compact.wide.out_channels <= 24
    analysis = analyse_prepared(prepared)
    node = next(n for n in analysis.ops if n.target == "wide")
    classes = analysis.class_of(node).reshape(8, 4)
    assert (classes == classes[:, :1]).all()
    assert len(set(classes[:, 0])) == 8


def test_the_half_that_is_multiplied_decides() -> None:
    prepared = dspfx.prepare(randomise(Gated(), 1).double(), images())
    mask = torch.ones_like(dspfx.get_masks(prepared)["second"])
    mask[2] = mask[3] = False  # nothing is left of these two
    mask[8 + 5] = False  # half of this one is
    dspfx.set_masks(prepared, {"second": mask})
    assert dspfx.get_masks(prepared)["third"].any(0).tolist() == [c not in (2, 3) for c in range(8)]
    compact = assert_same(prepared)
    assert compact.third.in_channels == 6
    assert compact.second.out_channels == 11


@pytest.mark.parametrize("verb", [dspfx.prune, dspfx.prune_channels])
def test_verbs_prune_what_is_merged(model: nn.Module, verb) -> None:
    prepared = dspfx.prepare(model, images())
    budget = dspfx.Budget(macs=0.6)
    assert verb(prepared, budget).achieved <= 0.6
    compact = assert_same(prepared)
    if verb is dspfx.prune_channels:
        assert macs(compact, images()) <= 0.61 * macs(model, images())


def test_merged_channels_go_all_the_way(model: nn.Module, tmp_path: Path) -> None:
    prepared = dspfx.prepare(model, images()).train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    pruning = dspfx.GradualPruning(prepared, dspfx.Budget(macs=0.6), total_steps=4, end=1)
    for step in range(4):
        optimizer.zero_grad()
        prepared(images(8 + 2 * step)).square().mean().backward()
        pruning.step()
        optimizer.step()
    narrow = dspfx.narrow(prepared)
    narrow(images()).square().mean().backward()
    torch.optim.SGD(narrow.parameters(), lr=0.01).step()
    dspfx.widen(narrow, prepared)
    compact = assert_same(prepared)
    dspfx.save(compact, tmp_path / "compact.dspfx")
    loaded = dspfx.load(tmp_path / "compact.dspfx", type(model)().double())
    with torch.no_grad():
        assert_equal(narrow.eval()(images()), compact(images()))
        assert_equal(compact(images()), loaded(images()), tolerance=0)


class Sideways(nn.Module):
    """A GLU over positions, and a shuffle whose channels lie elsewhere: left at full width."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.next, self.last = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(2, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.next(F.silu(self.first(x))), 3)
        return self.last(F.pixel_shuffle(x.transpose(1, 3), 2).transpose(1, 3)[:, :2])


def test_what_is_merged_along_other_dimensions_is_left_alone() -> None:
    prepared = dspfx.prepare(randomise(Sideways()).double(), images())
    assert list(gated_layers(prepared)) == ["next", "last"]
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.4))
    compact = dspfx.convert(prepared)
    with torch.no_grad():
        assert_equal(prepared(images()), compact(images()))
