"""The twelve networks, with random weights but for the authors' two."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

import dspfx
from benchmarks.reference import DEFAULT_FOLDER, load

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
DETECTOR_WIDTH = 32


@dataclass(frozen=True)
class Network:
    """A network of the zoo.

    Attributes:
        name: of it.
        size: of its images.
        dense: makes it, in evaluation mode.
        masked: makes it prepared, with the masks of the authors; None where there are none.
    """

    name: str
    size: int
    dense: Callable[[], nn.Module]
    masked: Callable[[], nn.Module] | None = None


def networks() -> list[Network]:
    """All of them."""
    of_torchvision = ("resnet18", "resnet50", "mobilenet_v2")
    of_timm = (
        *("mobilenetv3_large_100", "efficientnet_b0", "regnety_004", "convnext_atto"),
        "deit_tiny_patch16_224",
    )
    return [
        *(Network(name, 224, lambda n=name: _torchvision(n)) for name in of_torchvision),
        *(Network(name, 224, lambda n=name: _timm(n)) for name in of_timm),
        *(_reference(name) for name in ("resnet20_g4", "resnet56_g2")),
        Network("unet_resnet18", 256, _unet),
        Network("detector", 640, _detector),
    ]


def _torchvision(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(torchvision.models, name)(weights=None)
    return model.eval()


def _timm(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name)
    return model.eval()


def _reference(name: str) -> Network:
    path = DEFAULT_FOLDER / f"{name}.safetensors"
    return Network(name, 32, lambda: load(path).dense(), lambda: load(path).prepared())


def _unet() -> nn.Module:
    torch.manual_seed(0)
    library = importlib.import_module("segmentation_models_pytorch")
    model: nn.Module = library.Unet("resnet18", encoder_weights=None)
    return model.eval()


def _detector() -> nn.Module:
    """The example's, of the size of a small YOLO."""
    torch.manual_seed(0)
    sys.path.insert(0, str(EXAMPLES))
    try:
        model: nn.Module = importlib.import_module("detector").Detector(DETECTOR_WIDTH)
    finally:
        sys.path.remove(str(EXAMPLES))
    return model.eval()


def prepared(network: Network, **config: int) -> nn.Module:
    """The network with gates."""
    example = torch.randn(2, 3, network.size, network.size)
    return dspfx.prepare(network.dense(), example, config=dspfx.PrepareConfig(**config))
