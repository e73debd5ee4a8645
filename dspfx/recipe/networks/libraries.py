"""Which library a network is of, and what that library says about it.

1. `cifar-resnetN`: `cifar_resnet.CifarResNet` of depth N.
2. `torchvision/NAME`, `timm/NAME`: a model of these libraries.
3. `NAME`: one of torchvision if it has that, else one of timm.
4. `hf-hub:OWNER/NAME`, `local-dir:FOLDER`: what timm finds on the Hugging Face Hub, or in a folder.
5. `package.module:factory`: a function or class of anybody's.
"""

import contextlib
import difflib
import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from dspfx.errors import RecipeError

Library = Literal["cifar", "import", "torchvision", "timm"]
NEAREST = 3  # names to suggest
ALIKE = (0.6, 0.4)  # how much they are, as difflib counts it; or else at least
CIFAR = "cifar-resnet"
HUBS = ("hf-hub:", "hf_hub:", "local-dir:")  # names that timm itself finds elsewhere


@dataclass(frozen=True)
class Preprocessing:
    """How image files become what a network reads. By default as is usual for ImageNet.

    Attributes:
        size: pixels a side that the network sees.
        resized: of the shorter side, before the middle is cut out of a test image.
        interpolation: `bilinear`, `bicubic`, or another that torchvision knows.
        mean, deviation: of red, green and blue in [0, 1], by which they are normalised.
    """

    size: int = 224
    resized: int = 256
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    deviation: tuple[float, ...] = (0.229, 0.224, 0.225)

    def at(self, size: int) -> "Preprocessing":
        """The same for images of `size` pixels a side."""
        resized = round(size * self.resized / self.size)
        return Preprocessing(size, resized, self.interpolation, self.mean, self.deviation)


def library_of(name: str) -> tuple[Library, str]:
    """Which library the network called `name` is of, and its name there: of `cifar` the depth.

    Raises:
        RecipeError: there is no such network.
    """
    if name.startswith(CIFAR) and name.removeprefix(CIFAR).isdigit():
        return "cifar", name.removeprefix(CIFAR)
    if name.startswith(HUBS):
        return "timm", name
    if ":" in name:
        return "import", name
    library, _, own = name.rpartition("/")
    if library in ("", "torchvision") and own in torchvision_models().list_models():
        return "torchvision", own
    if library in ("", "timm") and own and _timm_has(own, asked=library == "timm"):
        return "timm", own
    raise RecipeError(
        f"there is no model '{name}'{_nearest(name)}; it can be cifar-resnetN, a name of "
        "torchvision or timm, or package.module:factory"
    )


def _nearest(name: str) -> str:
    """The names that are most like one that does not exist, for a message."""
    library, _, own = name.rpartition("/")
    known = set() if library == "timm" else set(torchvision_models().list_models())
    if library != "torchvision":
        with contextlib.suppress(RecipeError):
            known |= set(timm().list_models())
    wanted = own.replace("-", "_").lower()
    found = sorted((other for other in known if other.startswith(wanted)), key=len)[:NEAREST]
    for alike in ALIKE:
        found = found or difflib.get_close_matches(wanted, sorted(known), NEAREST, alike)
    return f" (the nearest names are {', '.join(found)})" if found else ""


def preprocessing_of(name: str) -> Preprocessing:
    """The preprocessing for the network called `name`, as its library's weights need it.

    Raises:
        RecipeError: there is no such network.
    """
    library, own = library_of(name)
    if library == "cifar":
        return Preprocessing().at(32)
    if library == "timm":
        return _of_timm(_timm_config(own))
    if library == "torchvision":
        return _of_torchvision(offered_by_torchvision(own))
    return Preprocessing()


def offered_by_torchvision(name: str) -> Any:
    """The weights that torchvision offers for its model `name`; None if there are none."""
    return getattr(torchvision_models().get_model_weights(name), "DEFAULT", None)


def _of_torchvision(weights: Any) -> Preprocessing:
    usual = Preprocessing()
    keywords: dict[str, Any] = getattr(getattr(weights, "transforms", None), "keywords", {})
    if "crop_size" not in keywords:  # the network is no classifier
        return usual
    return Preprocessing(
        keywords["crop_size"],
        keywords.get("resize_size", usual.resized),
        getattr(keywords.get("interpolation"), "value", usual.interpolation),
        keywords.get("mean", usual.mean),
        keywords.get("std", usual.deviation),
    )


def _timm_config(name: str) -> Any:
    """The settings that timm has for its model `name`; None if there are none."""
    if not name.startswith(HUBS):
        return timm().get_pretrained_cfg(name)
    try:
        return SimpleNamespace(**timm().create_model(name).pretrained_cfg)
    except Exception as error:  # of the many that a download can raise
        raise RecipeError(f"timm cannot find {name}: {error}") from error


def _of_timm(config: Any) -> Preprocessing:
    if config is None or config.input_size[0] != len(Preprocessing().mean):
        return Preprocessing()
    size = int(config.input_size[-1])
    return Preprocessing(
        size,
        int(size / config.crop_pct),
        "bilinear" if config.interpolation == "random" else config.interpolation,
        tuple(config.mean),
        tuple(config.std),
    )


def torchvision_models() -> Any:
    """Imported where it is needed: it takes longer than all else together."""
    return importlib.import_module("torchvision.models")


def timm() -> Any:
    """The library, which is an extra.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise RecipeError("timm is not installed: pip install 'dspfx[models]'") from error


def _timm_has(name: str, *, asked: bool) -> bool:
    try:
        return bool(timm().is_model(name))
    except RecipeError:
        if asked:
            raise
        return False
