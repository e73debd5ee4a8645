"""Networks with groups: the authors' masks, and ResNets with random ones of two groups."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import nn

import dspfx
from benchmarks.reference import find, load

RANDOM = (("resnet18", 0.5), ("resnet18", 0.3), ("resnet50", 0.5), ("resnet50", 0.3))


@dataclass(frozen=True, eq=False)
class Case:
    """A network before and after pruning.

    Attributes:
        name: with the share of MACs that is kept.
        dense: the network of full width.
        prepared: the pruned one, its masks set.
        size: of the images.
    """

    name: str
    dense: nn.Module
    prepared: nn.Module
    size: int


def cases(reference: Path) -> list[tuple[Callable[[], Case], str]]:
    """How to make every case, and its name."""
    small = [(partial(_reference, path), path.stem) for path in find(reference)]
    large = [(partial(_random, name, keep), f"{name} at {keep:.0%}") for name, keep in RANDOM]
    return [*small, *large]


def _reference(path: Path) -> Case:
    network = load(path)
    return Case(network.name, network.dense(), network.prepared(), 32)


def _random(name: str, keep: float) -> Case:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    prepared = dspfx.prepare(model, torch.randn(2, 3, 224, 224), config=_TWO_GROUPS)
    mask_at_random(prepared, keep)
    return Case(f"{name} at {keep:.0%}", model, prepared.eval(), 224)


_TWO_GROUPS = dspfx.PrepareConfig(groups=2)


def mask_at_random(prepared: nn.Module, keep: float) -> None:
    """Every layer: two groups of random filters that read random channels, to a share of MACs."""
    low, high = 0.0, 1.0
    shapes = {name: mask.shape for name, mask in dspfx.get_masks(prepared).items()}
    for _ in range(12):
        share = (low + high) / 2
        generator = torch.Generator().manual_seed(0)
        masks = {}
        for name, (filters, channels) in shapes.items():
            reads = torch.rand(2, channels, generator=generator).argsort(1) < channels * share
            masks[name] = reads[torch.randint(2, (filters,), generator=generator)]
        dspfx.set_masks(prepared, masks)
        report = dspfx.report(prepared)
        if report.after.macs > keep * report.before.macs:
            high = share
        else:
            low = share
