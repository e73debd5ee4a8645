"""Whole numbers among inputs that go with the sizes of tensors: both change together."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dspfx
from helpers import assert_equal, random_masks, randomise


class Body(nn.Module):
    """Convolutions over images, the order of whose positions is reversed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1)
        self.c = nn.Linear(12, 4)

    def forward(self, tokens: Tensor, height: Any, width: Any) -> Tensor:
        image = tokens.flip(1).transpose(1, 2).reshape(len(tokens), -1, height, width)
        y: Tensor = self.b(self.a(image).relu()).relu()
        return self.c(y.flatten(2).transpose(1, 2))


class Image(Body):
    """Tokens, and the height and width of the image that they are of."""

    @staticmethod
    def draw(samples: int, *sizes: int) -> tuple[Any, ...]:
        h, w, _ = sizes
        return torch.randn(samples, h * w, 8, dtype=torch.float64), h, w


class Levels(Body):
    """Tokens of two levels, and the sizes of both."""

    def forward(self, tokens: Tensor, sizes: Any) -> Tensor:
        parts = tokens.split([h * w for h, w in sizes], dim=1)
        own = super().forward
        images = [own(parts[i], h, w).mean(1) for i, (h, w) in enumerate(sizes)]
        return torch.stack(images).sum(0)

    @staticmethod
    def draw(samples: int, *sizes: int) -> tuple[Any, ...]:
        h, w, half = sizes
        count = h * w + half * half
        return torch.randn(samples, count, 8, dtype=torch.float64), [[h, w], [half, half]]


class ClassToken(Body):
    """One token more than the image has: nobody guesses that."""

    def forward(self, tokens: Tensor, height: Any, width: Any) -> Tensor:
        return super().forward(tokens[:, 1:], height, width) + tokens[:, :1, :4]

    @staticmethod
    def draw(samples: int, *sizes: int) -> tuple[Any, ...]:
        h, w, _ = sizes
        return torch.randn(samples, h * w + 1, 8, dtype=torch.float64), h, w


def pruned(kind: Any, *sizes: int) -> tuple[nn.Module, nn.Module]:
    prepared = dspfx.prepare(randomise(kind()).double(), kind.draw(2, *sizes)).eval()
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    return prepared, dspfx.convert(prepared)


@pytest.mark.parametrize("kind", [Image, Levels])
@pytest.mark.parametrize("sizes", [(8, 6, 4), (4, 4, 2), (16, 16, 8)])
def test_numbers_that_go_with_sizes_change_with_them(
    kind: type[nn.Module], sizes: tuple[int, ...]
) -> None:
    prepared, compact = pruned(kind, *sizes)
    assert any(shapes[-1][:2] != sizes[:2] for shapes in prepared.other_sizes)
    for samples, *own in ((2, *sizes), (3, 7, 5, 3), (1, 10, 12, 5)):
        inputs = kind.draw(samples, *own)
        assert_equal(prepared(*inputs), compact(*inputs))
    assert compact.get_submodule("b").in_channels < 16


def test_numbers_that_go_with_sizes_in_a_way_nobody_knows_are_fixed() -> None:
    prepared, compact = pruned(ClassToken, 8, 6, 4)
    inputs = ClassToken.draw(3, 8, 6, 4)
    assert_equal(prepared(*inputs), compact(*inputs))
    for module in (prepared, compact):
        with pytest.raises(AssertionError, match=r"prepared with (height=8|width=6), and no other"):
            module(*ClassToken.draw(2, 7, 5, 3))
    said = " ".join(str(dspfx.report(prepared)).split())
    assert "takes the numbers (8, 6) among its inputs only" in said


def test_numbers_that_move_nothing_are_free() -> None:
    class Step(nn.Module):
        """A step of diffusion, say, of which only what is negative is refused."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
            self.table = nn.Parameter(torch.randn(1000))

        def forward(self, x: Tensor, step: int) -> Tensor:
            y = self.a(x) * (1 + step / 7) + self.table[step]
            return self.b(y.relu()) / step

    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    prepared = dspfx.prepare(randomise(Step()).double(), (x, 10)).eval()
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    compact = dspfx.convert(prepared)
    for step in (10, 11, 999):
        assert_equal(prepared(x, step), compact(x, step))
