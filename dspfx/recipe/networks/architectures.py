"""Networks by name (see `dspfx.recipe.networks.libraries`), and the weights they start from.

A `package.module:factory` is called with those of `num_classes` and `in_channels` (or `in_chans`)
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

from dspfx.errors import DspfxWarning, RecipeError
from dspfx.recipe.networks.cifar_resnet import CifarResNet
from dspfx.recipe.networks.libraries import (
    HUBS,
    library_of,
    offered_by_torchvision,
    timm,
    torchvision_models,
)
from dspfx.utils.atomic_write import replacing
from dspfx.utils.typed_json import from_json, to_json


@dataclass(frozen=True)
class Architecture:
    """How a network is constructed.

    Attributes:
        name: see above.
        classes: how many labels there are.
        channels: of its images; networks that take no such argument get three.
        image_size: of the images that it was trained with, or is analysed for.
        pretrained: it is made for the weights that its library offers, whether it has them or not:
            with these, torchvision's Inception and GoogLeNet normalise their input again.
    """

    name: str
    classes: int
    channels: int
    image_size: int
    pretrained: bool = False

    @property
    def runs_code(self) -> bool:
        """Whether a module that anybody may have written is imported to build it."""
        return ":" in self.name and not self.name.startswith(HUBS)

    def build(self, *, load: bool = False) -> nn.Module:
        """The network, initialised at random by torch's generator.

        Args:
            load: the weights that are offered for it, if it is `pretrained`.

        Raises:
            RecipeError: there is no such network, it has no weights, or they cannot be had.
        """
        library, name = library_of(self.name)
        if library == "torchvision":
            return self._torchvision(name, load)
        if library == "timm":
            return self._timm(name, load)
        self._check_offered(not self.pretrained)
        if library == "cifar":
            return CifarResNet(int(name), in_channels=self.channels, classes=self.classes)
        return self._imported()

    def _timm(self, name: str, load: bool) -> nn.Module:
        try:
            model: nn.Module = timm().create_model(
                name,
                pretrained=load and self.pretrained,
                num_classes=self.classes,
                in_chans=self.channels,
            )
        except Exception as error:  # of the many that a download or a constructor can raise
            raise RecipeError(f"timm cannot make {name}: {error}") from error
        offered: Any = model.pretrained_cfg
        if load and self.pretrained and offered["num_classes"] != self.classes:
            warnings.warn(
                f"the weights of {name} are for {offered['num_classes']} classes: the classifier "
                "stays random",
                DspfxWarning,
                stacklevel=3,
            )
        return model

    def _torchvision(self, name: str, load: bool) -> nn.Module:
        models = torchvision_models()
        options: dict[str, Any] = {"num_classes": self.classes}
        if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
            options["weights_backbone"] = None  # or they would be downloaded
        try:
            model: nn.Module = models.get_model(name, **options)
        except TypeError as error:
            raise RecipeError(f"torchvision cannot make {name}: {error}") from error
        if not self.pretrained:
            return model
        offered = offered_by_torchvision(name)
        self._check_offered(offered is not None)
        if hasattr(model, "transform_input"):
            model.transform_input = True  # type: ignore[assignment]
        if load:
            try:
                state = offered.get_state_dict(progress=False, check_hash=True)
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

    def _check_offered(self, offered: bool) -> None:
        if not offered:
            raise RecipeError(f"there are no weights for {self.name}; leave out --pretrained")

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
            plain = json.loads(text)
            if isinstance(plain, dict):
                plain.setdefault("pretrained", False)  # not in older files
            found: Architecture = from_json(Architecture, plain)
        except ValueError as error:
            raise RecipeError(f"{beside} is damaged: {error}") from error
        return found


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


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
