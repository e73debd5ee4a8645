"""The models that coverage is measured on, with weights that cost no time to draw.

All models that torchvision registers, and the smallest model of every module of timm, as listed in
`timm_smallest.json`.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
import torchvision
from torch import Tensor, nn

SMALLEST = Path(__file__).with_name("timm_smallest.json")
DETECTORS = ("rcnn", "retinanet", "fcos", "ssd")
SIZE = 64
SIZES = {"inception_v3": 299, "googlenet": 64, "maxvit_t": 224, "alexnet": 96, "s3d": 224}


@dataclass(frozen=True)
class Case:
    """One model: the library that builds it, its family there, and its name."""

    library: str
    family: str
    name: str


def torchvision_cases() -> list[Case]:
    """Every model that torchvision registers."""
    models = torchvision.models
    return [
        Case("torchvision", models.get_model_builder(name).__module__.rpartition(".")[2], name)
        for name in models.list_models()
    ]


def timm_cases() -> list[Case]:
    """The smallest model of every module of timm."""
    return [Case("timm", family, name) for family, name in json.loads(SMALLEST.read_text()).items()]


def build(case: Case) -> nn.Module:
    """The model in evaluation mode, with random weights whose activations neither fade nor grow."""
    with _without_initialisation():
        model = _torchvision(case.name) if case.library == "torchvision" else _timm(case.name)
    return fill(model).eval()


def example_inputs(case: Case, model: nn.Module) -> tuple[Any, ...]:
    """Small inputs of the form that the model takes, two samples where it takes a batch."""
    generator = torch.Generator().manual_seed(0)

    def image(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    if case.library == "timm":
        return (image(2, *_timm_input(model)),)
    size = next((s for part, s in SIZES.items() if part in case.name), SIZE)
    if case.name.startswith("raft"):
        return image(2, 3, 128, 128), image(2, 3, 128, 128)
    if any(part in case.name for part in DETECTORS):
        return ([image(3, 96, 128), image(3, 128, 96)],)
    if case.name.startswith("mvit"):
        return (image(2, 3, 16, 224, 224),)
    if case.family in ("resnet", "s3d", "swin_transformer") and "video" in _module(case.name):
        return (image(2, 3, 16, size, size),)
    if case.name.startswith("vit"):
        size = int(model.image_size)  # type: ignore[arg-type]
    return (image(2, 3, size, size),)


def fill(model: nn.Module) -> nn.Module:
    """Random parameters and running statistics that no test could mistake for zeros or ones."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            low, high = _range(name, parameter)
            parameter.uniform_(low, high, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.uniform_(-0.3, 0.3, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0, generator=generator)
    return model


def _range(name: str, parameter: Tensor) -> tuple[float, float]:
    if parameter.dim() > 1:
        bound = (3 / max(parameter[0].numel(), 1)) ** 0.5
        return -bound, bound
    shifts = ("bias", "beta", "token", "pos")
    return (-0.3, 0.3) if any(part in name for part in shifts) else (0.5, 1.5)


@contextmanager
def _without_initialisation() -> Iterator[None]:
    """Build modules without drawing their weights, which takes longest in large models."""
    names = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(nn.init, name, lambda tensor, *_, **__: tensor))
        yield


def _module(name: str) -> str:
    return str(torchvision.models.get_model_builder(name).__module__)


def _torchvision(name: str) -> nn.Module:
    settings: dict[str, Any] = {"weights": None}
    if any(part in name for part in (*DETECTORS, "deeplabv3", "fcn", "lraspp")):
        settings["weights_backbone"] = None
    if any(part in name for part in ("rcnn", "retinanet", "fcos")):
        settings |= {"min_size": 128, "max_size": 192}  # images are scaled to this
    if "googlenet" in name or "inception" in name:
        settings["init_weights"] = False
    model: nn.Module = torchvision.models.get_model(name, **settings)
    return model


def _timm(name: str) -> nn.Module:
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def _timm_input(model: Any) -> tuple[int, int, int]:
    """The smallest of a few sizes that the model accepts."""
    config = model.pretrained_cfg
    channels, height, width = config["input_size"]
    smallest = config.get("min_input_size", (channels, 0, 0))
    for size in () if config.get("fixed_input_size") else (128, 112):
        shape = channels, max(smallest[1], size), max(smallest[2], size)
        try:
            with torch.no_grad():
                model(torch.zeros(2, *shape))
        except (RuntimeError, AssertionError, ValueError):
            continue
        return shape
    return channels, height, width
