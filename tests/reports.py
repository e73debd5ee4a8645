"""Models to report on, and reports of models that nobody has to build."""

from dataclasses import replace

import torch
from models import MODELS, C2f
from torch import Tensor, nn

import dspfx
from dspfx.passes.transforms.grouped_masks import GroupedMask, MaskGroup
from helpers import random_masks, randomise


def pruned(kind: type[nn.Module] = C2f) -> dspfx.PreparedModule:
    torch.manual_seed(0)
    model = randomise(kind()).double().eval()
    prepared = dspfx.prepare(model, MODELS[kind], config=dspfx.PrepareConfig(groups=2))
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.2))
    return prepared


def many_layers(count: int, channels: int, name: str = "layer") -> dspfx.Report:
    """The report of a network of `count` gated layers, each of two groups."""
    report = dspfx.report(dspfx.convert(pruned()))
    layer = next(layer for layer in report.layers if layer.gated)
    half = tuple(range(channels // 2)), tuple(range(channels // 2, channels))
    groups = tuple(MaskGroup(own, half[0]) for own in half)
    names = [f"{name}{number}" for number in range(count)]
    return replace(
        report,
        layers=tuple(replace(layer, name=n, filters=(channels, channels // 2)) for n in names),
        masks=tuple(GroupedMask(n, channels, channels, half[0], groups) for n in names),
    )


class InParts(nn.Module):
    """Its code depends on the values of tensors; its backbone has a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3, padding=1), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.backbone(x)
        return y if y.max() > 0 else -y


def in_parts() -> nn.Module:
    """A prepared model in parts."""
    return dspfx.prepare(InParts(), torch.randn(2, 3, 8, 8))
