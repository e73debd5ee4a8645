"""Networks by name, and the weights they start from.

1. `cifar-resnetN`: `dspfx.models.CifarResNet` of depth N.
2. `torchvision/NAME`, `timm/NAME`: a model of these libraries.
3. `NAME`: one of torchvision if it has that, else one of timm.
4. `package.module:factory`: called with those of `num_classes` and `in_channels` (or `in_chans`)
   that it takes.
"""

import importlib
import inspect
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from dspfx.archive import replacing
from dspfx.errors import DspfxWarning, RecipeError
from dspfx.models import CifarResNet
from dspfx.records import from_json, to_json

CIFAR = "cifar-resnet"
_SIZES = {"inception_v3": 299}


@dataclass(frozen=True)
class Architecture:
    """How a network is constructed.

    Attributes:
        name: see above.
        classes: how many it tells apart.
        channels: of its images; networks that cannot be told get three.
        image_size: of the images that it was trained with, or is analysed for.
    """

    name: str
    classes: int
    channels: int
    image_size: int

    @property
    def runs_code(self) -> bool:
        """Whether a module that anybody may have written is imported to build it."""
        return ":" in self.name

    def build(self, *, pretrained: bool = False) -> nn.Module:
        """The network, initialised at random by torch's generator, or with offered weights.

        Raises:
            RecipeError: there is no such network, it has no weights, or they cannot be had.
        """
        library, name = _library(self.name)
        if library == CIFAR:
            _no_weights(self.name, pretrained)
            depth = int(name)
            return CifarResNet(depth, in_channels=self.channels, classes=self.classes)
        if library == "import":
            _no_weights(self.name, pretrained)
            return self._imported()
        if library == "torchvision":
            return self._torchvision(name, pretrained)
        try:
            model: nn.Module = _timm().create_model(
                name, pretrained=pretrained, num_classes=self.classes, in_chans=self.channels
            )
        except Exception as error:  # of the many that a download or a constructor can raise
            raise RecipeError(f"timm cannot make {name}: {error}") from error
        return model

    def _torchvision(self, name: str, pretrained: bool) -> nn.Module:
        models = _torchvision_models()
        options: dict[str, Any] = {"num_classes": self.classes}
        if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
            options["weights_backbone"] = None  # or they would be downloaded
        try:
            model: nn.Module = models.get_model(name, **options)
        except TypeError as error:
            raise RecipeError(f"torchvision cannot make {name}: {error}") from error
        if pretrained:
            offered = list(models.get_model_weights(name))
            _no_weights(self.name, not offered)
            try:
                state = offered[-1].get_state_dict(progress=False, check_hash=True)
            except OSError as error:
                raise RecipeError(f"the weights of {name} cannot be had: {error}") from error
            start_from(model, state, f"the weights of {name}")
        return model

    def _imported(self) -> nn.Module:
        module, _, factory = self.name.partition(":")
        try:
            make = getattr(importlib.import_module(module), factory)
        except (ImportError, AttributeError) as error:
            raise RecipeError(f"{self.name} cannot be imported: {error}") from error
        if isinstance(make, nn.Module) or not callable(make):
            raise RecipeError(
                f"{self.name} is a {type(make).__name__}; name a function or class that makes a "
                "network"
            )
        takes = inspect.signature(make).parameters
        offered = {
            "num_classes": self.classes,
            "in_channels": self.channels,
            "in_chans": self.channels,
        }
        model = make(**{name: value for name, value in offered.items() if name in takes})
        if not isinstance(model, nn.Module):
            raise RecipeError(f"{self.name} gives a {type(model).__name__}, no torch.nn.Module")
        return model

    def write(self, path: Path) -> None:
        """Write this as JSON beside the model file at `path`."""
        with replacing(_beside(path), RecipeError) as temporary:
            temporary.write_text(f"{json.dumps(to_json(self), indent=2)}\n")

    @staticmethod
    def beside(path: str | os.PathLike[str]) -> "Architecture | None":
        """What was written beside the model file at `path`, if anything was.

        Raises:
            RecipeError: it is damaged.
        """
        beside = _beside(Path(path))
        try:
            text = beside.read_text()
        except OSError:
            return None
        try:
            found: Architecture = from_json(Architecture, json.loads(text))
        except ValueError as error:
            raise RecipeError(f"{beside} is damaged: {error}") from error
        return found


def usual_size(name: str) -> int:
    """The image size that the network called `name` is made for."""
    library, own = _library(name)
    if library == CIFAR:
        return 32
    if library == "timm":
        config = _timm().get_pretrained_cfg(own)
        return int(config.input_size[-1]) if config is not None else 224
    return _SIZES.get(own, 224)


def start_from(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state`; a classifier of another number of classes stays random, with a warning.

    Raises:
        RecipeError: `state` is of another network.
    """
    own: Any = model.state_dict()
    other = [n for n, t in state.items() if n in own and own[n].shape != t.shape]
    classes = {(own[n].shape[:1], state[n].shape[:1]) for n in other}
    widths = [n for n in other if own[n].shape[1:] != state[n].shape[1:]]
    missing = {n for n in own.keys() - state.keys() if not n.endswith(".num_batches_tracked")}
    odd = [*missing, *(state.keys() - own.keys()), *widths, *(other if len(classes) > 1 else [])]
    if odd:
        names = ", ".join(sorted(odd)[:3])
        raise RecipeError(f"{source} are not of this {type(model).__name__}: see {names}")
    chosen: Any = OrderedDict((n, t) for n, t in state.items() if n not in other)
    chosen._metadata = getattr(state, "_metadata", own._metadata)  # versions of modules
    model.load_state_dict(chosen, strict=False)
    if other:
        warnings.warn(
            f"{source} are for another number of classes: {', '.join(other)} stay random",
            DspfxWarning,
            stacklevel=2,
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of safetensors, or of `torch.save`, perhaps under a usual key.

    Raises:
        RecipeError: there is no such file, or it holds no weights.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        raise RecipeError(f"no weights can be read from {path}: {error}") from error
    for key in ("states", "state_dict", "model", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]  # of `save_checkpoint`: states, then model
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise RecipeError(f"{path} holds no weights: a dict of tensors by name is needed")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def input_channels(model: nn.Module) -> int | None:
    """The channels that the first convolution of `model` reads; None if there is none."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return next((m.in_channels for m in model.modules() if isinstance(m, kinds)), None)


def _library(name: str) -> tuple[str, str]:
    """Which library the network called `name` is of, and its name there."""
    if name.startswith(CIFAR) and name.removeprefix(CIFAR).isdigit():
        return CIFAR, name.removeprefix(CIFAR)
    if ":" in name:
        return "import", name
    library, _, own = name.rpartition("/")
    if library in ("", "torchvision") and own in _torchvision_models().list_models():
        return "torchvision", own
    if library in ("", "timm") and own and _timm_has(own, asked=library == "timm"):
        return "timm", own
    raise RecipeError(
        f"there is no model '{name}'; it can be cifar-resnetN, a name of torchvision or timm, or "
        "package.module:factory"
    )


def _torchvision_models() -> Any:
    """Imported where it is needed: it takes longer than all else together."""
    return importlib.import_module("torchvision.models")


def _timm_has(name: str, *, asked: bool) -> bool:
    try:
        return bool(_timm().is_model(name))
    except RecipeError:
        if asked:
            raise
        return False


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise RecipeError("timm is not installed: pip install 'dspfx[models]'") from error


def _no_weights(name: str, asked: bool) -> None:
    if asked:
        raise RecipeError(f"nobody offers weights for {name}; leave out --pretrained")


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
