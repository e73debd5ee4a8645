"""Which network, how many images, and how long: everything that a row of results has in common."""

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torchvision
from torch import nn

from benchmarks.accuracy.protocol import Schedule
from dspfx.recipe.networks.cifar_resnet import CifarResNet


@dataclass(frozen=True)
class Scenario:
    """One table of results.

    Attributes:
        name: of the scenario, as results are filed.
        title: of its table.
        build: the untrained network; seeds are set before.
        images: training images.
        stretch: all schedules are so many times as long.
        rate: the learning rate of the dense network.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    images: int = 20_000
    stretch: int = 1
    rate: float = 0.1

    @property
    def dense(self) -> Schedule:
        """Of the dense network that all pruning starts from."""
        return Schedule((10 * self.stretch,), lr=self.rate, weight_decay=5e-4)

    @property
    def longer(self) -> Schedule:
        """Of a dense network trained for as long as the pruned ones are in all."""
        return Schedule((28 * self.stretch,), lr=self.rate, weight_decay=5e-4)

    @property
    def learn(self) -> Schedule:
        """Of the group learning."""
        return Schedule((8 * self.stretch,), lr=0.05, weight_decay=1e-3)

    @property
    def tune(self) -> Schedule:
        """Of the fine-tuning after group learning."""
        return Schedule((5 * self.stretch,) * 2, lr=0.015, weight_decay=1e-3)

    @property
    def tune_longer(self) -> Schedule:
        """Of the fine-tuning where nothing was learned before: as many epochs in all."""
        cycles = 8 * self.stretch, *self.tune.cycles
        return Schedule(cycles, lr=self.tune.lr, weight_decay=self.tune.weight_decay)


def _mobile() -> nn.Module:
    """A small MobileNetV2 for 32x32 images: the first two strides are 1, half the width."""
    settings = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 3, 2], [6, 96, 2, 1]]
    network = torchvision.models.MobileNetV2(10, 0.5, settings)
    network.features[0][0].stride = (1, 1)
    return network


def _vit() -> nn.Module:
    """A small vision transformer for 32x32 images: 64 tokens, 6 blocks, 1.2 million parameters."""
    return timm.models.VisionTransformer(
        img_size=32, patch_size=4, num_classes=10, embed_dim=128, depth=6, num_heads=4
    )


SCENARIOS = {
    s.name: s
    for s in (
        Scenario("resnet20", "ResNet-20, 20,000 images", lambda: CifarResNet(20)),
        Scenario(
            "half",
            "ResNet-20 of half the width, 20,000 images",
            lambda: CifarResNet(20, widths=(8, 16, 32)),
        ),
        Scenario("few", "ResNet-20, 2,000 images", lambda: CifarResNet(20), 2_000, 4),
        Scenario("mobile", "MobileNetV2 (small), 20,000 images", _mobile),
        Scenario("vit", "ViT (small), 20,000 images", _vit, rate=0.03),
    )
}
IMAGE = torch.zeros(1, 3, 32, 32)
