"""Models that pad what does not fill their windows: their graph takes whole windows alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dspfx
from helpers import assert_equal, random_masks, randomise


class Windows(nn.Module):
    """A mask for each window, made of the height and width, as Swin's is.

    `pads`: what does not fill the windows is padded, by a branch that a graph does not have.
    """

    def __init__(self, pads: bool) -> None:
        super().__init__()
        self.pads = pads
        self.a, self.b = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 8, 1)
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.pads and x.shape[2] % 8 != 0:
            x = F.pad(x, (0, 0, 0, 8 - x.shape[2] % 8))
        if self.pads and x.shape[3] % 8 != 0:
            x = F.pad(x, (0, 8 - x.shape[3] % 8))
        y = self.b(self.a(x).relu()).relu().permute(0, 2, 3, 1)
        height, width = y.shape[1:3]
        rows = (torch.arange(height) >= height - 1).long()[None, :, None, None]
        columns = (torch.arange(width) >= width - 1).long()[None, None, :, None]
        regions = (rows * 3 + columns).to(y.dtype)
        n, h, w, c = regions.shape
        windows = regions.view(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4)
        means = windows.mean(1).view(1, h // 2, w // 2, 1)
        return self.c((y[:, ::2, ::2] * means + y[:, 1::2, 1::2]).permute(0, 3, 1, 2))


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("size", [32, 64])
def test_sizes_read_off_what_is_made_of_sizes_follow_at_other_ones(pads: bool, size: int) -> None:
    """The compact model held the height of the example: no example of another size was found."""
    model = randomise(Windows(pads)).double().eval()
    prepared = dspfx.prepare(model, torch.randn(2, 3, size, size, dtype=torch.float64))
    dspfx.set_masks(prepared, random_masks(prepared))
    compact = dspfx.convert(prepared)
    for shape in ((2, 3, size, size), (3, 3, 48, 40), (1, 3, 16, 24)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_equal(prepared.eval()(x), compact(x))


class Rows(nn.Module):
    """Numbers of rows, as DETR's positions are, of features some times smaller than the image."""

    def __init__(self, strides: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(3 if n == 0 else 8, 8, 3, 2, 1) for n in range(strides)]
        self.body = nn.Sequential(*convs)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        numbers = torch.ones_like(y[:, 0]).cumsum(1)
        share = numbers / (numbers[:, -1:, :] + 1e-6)
        return self.head(y * share[:, None])


@pytest.mark.parametrize(("strides", "size"), [(5, 64), (4, 32), (3, 16)])
def test_sizes_differ_behind_strides_too(strides: int, size: int) -> None:
    """39 pixels were as many positions as 64: the last row of the example was read elsewhere."""
    model = randomise(Rows(strides)).double().eval()
    prepared = dspfx.prepare(model, torch.randn(2, 3, size, size, dtype=torch.float64))
    dspfx.set_masks(prepared, random_masks(prepared))
    compact = dspfx.convert(prepared)
    for shape in ((2, 3, size, size), (3, 3, 3 * size, 2 * size), (1, 3, size // 2, size)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_equal(prepared.eval()(x), compact(x))
