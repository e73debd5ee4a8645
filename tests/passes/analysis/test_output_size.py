"""Transposed convolutions that are asked for a size, `up(x, output_size=...)`."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, random_masks, randomise


class Decoder(nn.Module):
    """A U-Net of two levels that goes back up to odd sizes; `[N, 3, *size]` -> `[N, 2, *size]`."""

    def __init__(self, how: str, groups: int = 1, dims: int = 2) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d)[dims - 1]
        up = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1]
        self.how, self.dims = how, dims
        self.first, self.down = conv(3, 8, 3, padding=1), conv(8, 12, 3, 2, 1)
        self.lower = conv(12, 12, 3, 2, 1)
        self.up_1 = up(12, 12, 3, 2, 1, groups=groups)
        self.up_2, self.last = up(12, 8, 3, 2, 1, groups=2 if groups > 1 else 1), conv(8, 2, 1)

    def size_of(self, x: Tensor) -> Any:
        match self.how:
            case "size":
                return x.size()
            case "shape":
                return x.shape[2:]
            case "list":
                return [x.size(d) for d in range(2, x.dim())]
            case "tuple":
                return tuple(x.shape[-self.dims :])
            case _:
                return x.shape

    def forward(self, x: Tensor) -> Tensor:
        first = F.silu(self.first(x))
        down = F.silu(self.down(first))
        x = F.silu(self.lower(down))
        x = F.silu(self.up_1(x, output_size=self.size_of(down)) + down)
        x = self.up_2(x, self.size_of(first)) + first
        return self.last(F.silu(x))


def images(size: int, dims: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    shape = 2, 3, *(size, size + 3)[:dims]
    return torch.randn(shape, generator=generator, dtype=torch.float64)


NETWORKS = [
    *(("size", 1, 2), ("shape", 1, 2), ("list", 1, 2), ("tuple", 1, 1), ("whole", 4, 2)),
    *(("size", 12, 2), ("list", 2, 1)),
]


@pytest.mark.parametrize(("how", "groups", "dims"), NETWORKS)
def test_sizes_that_are_asked_for_follow_other_sizes(how: str, groups: int, dims: int) -> None:
    model = randomise(Decoder(how, groups, dims)).double().eval()
    prepared = dspfx.prepare(model, images(9, dims), config=dspfx.PrepareConfig(groups=2))
    depthwise = groups == 12
    assert ("up_1" in gated_layers(prepared)) is not depthwise
    assert "up_2" in gated_layers(prepared)
    for cost_model in (dspfx.FEWEST_WEIGHTS, dspfx.CostModel(100, 1, 0, 0, 1)):
        dspfx.set_masks(prepared, random_masks(prepared, drop=0.2))
        compact = dspfx.convert(prepared, cost_model=cost_model)
        assert dspfx.report(compact).after.macs < dspfx.report(compact).before.macs
        with torch.no_grad():
            for size in (9, 10, 15, 20):
                x = images(size, dims)
                assert_equal(model(x).shape, torch.Size((2, 2, *x.shape[2:])))
                assert_equal(prepared(x), compact(x))


def test_the_width_of_the_tensor_whose_size_is_asked_for_is_free() -> None:
    prepared = dspfx.prepare(randomise(Decoder("size")).double(), images(9))
    dspfx.prune_channels(prepared, dspfx.Budget(macs=0.4))
    compact = dspfx.convert(prepared)
    assert compact.first.out_channels < 8
    assert compact.down.out_channels < 12
    assert not dspfx.report(prepared).declined


def test_sized_layers_go_all_the_way(tmp_path: Path) -> None:
    prepared = dspfx.prepare(randomise(Decoder("shape")).double(), images(9))
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.2))
    narrow = dspfx.narrow(prepared).train()
    narrow(images(10)).square().mean().backward()
    torch.optim.SGD(narrow.parameters(), lr=0.01).step()
    dspfx.widen(narrow, prepared)
    compact = dspfx.convert(prepared)
    dspfx.save(compact, tmp_path / "compact.dspfx")
    loaded = dspfx.load(tmp_path / "compact.dspfx", Decoder("shape").double())
    single = dspfx.convert(prepared.float())
    fast = dspfx.compile(single, images(9).float(), engines=["own", "inductor"])
    with torch.no_grad():
        for size in (9, 10):
            assert_equal(narrow.eval()(images(size)), compact(images(size)))
            assert_equal(compact(images(size)), loaded(images(size)), tolerance=0)
        assert_equal(single(images(9).float()), fast(images(9).float()), tolerance=1e-5)
