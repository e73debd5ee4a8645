"""A model in parts, such as detectors are, and images for it."""

from typing import Any

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """More than a `forward`: the code around it uses a method, a property and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = 0.0
        self.conv, self.out = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, levels: list[Tensor], *, scale: float = 1.0) -> list[Tensor]:
        return [self.out(torch.relu(self.conv(x))) * scale for x in levels]

    @property
    def limit(self) -> float:
        return self.threshold - 1

    def loss(self, outputs: list[Tensor]) -> Tensor:
        return sum(out.square().mean() for out in outputs) * self.weight()

    @staticmethod
    def weight() -> float:
        return 2.0


class Detector(nn.Module):
    """Goes on only where the first level is bright enough."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(5, 6, 3, padding=1),
            nn.BatchNorm2d(6),
        )
        self.head = Head()
        self.refine = nn.ModuleList([nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)])

    def forward(self, images: list[Tensor]) -> Any:
        x = self.backbone(torch.stack(images))
        levels = self.head([x, nn.functional.max_pool2d(x, 2)], scale=0.5)
        if self.training:
            return self.head.loss(levels)
        # what is found depends on the data
        found = [level for level in levels if level.abs().max() > self.head.limit]
        y = torch.cat([level.mean((2, 3)) for level in found * 2], 1)
        for layer in self.refine:
            y = layer(y)
        return {"found": found, "refined": y}


IMAGES = list(torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.manual_seed(0)))
