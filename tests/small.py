"""A small residual network, pruned."""

from typing import Any

import torch
from torch import Tensor, nn

import dspfx
from helpers import random_masks, randomise

X = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """A residual block after a stem."""

    def __init__(self, width: int = 8, mode: str = "zeros", act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), act())
        self.a = nn.Conv2d(width, width, 3, padding=1, padding_mode=mode)
        self.b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.norm(self.b(torch.relu(self.a(x))))
        return self.head(x.mean((2, 3)))


def pruned(model: nn.Module, x: Any = X, **config: Any) -> nn.Module:
    prepared = dspfx.prepare(randomise(model), x, config=dspfx.PrepareConfig(**config)).eval()
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.2))
    return prepared
