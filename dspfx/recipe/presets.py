"""Recipes by name.

1. `digits`, `fashion-mnist`, `cifar10`: a good result within minutes on a few processor cores.
2. `cifar10-resnet20`, `cifar10-resnet56`: the schedules of the method's authors (Park et al., AAAI
   2023, arXiv 2303.09736, and their program): 164 dense epochs, 120 of group learning, 400 of
   fine-tuning in 5 cycles. Stem and shortcuts have no groups there. `keep_macs` is what their
   networks keep of the whole model's MACs (63.57 and 65.11 % of the gated layers' are pruned).
   They choose the best weights by the test images; here it is by a part of the training images,
   and the dense rate falls along a cosine instead of by steps.
3. `imagenet-resnet18`, `imagenet-resnet50`: two groups and the share of the gated layers' MACs
   that the authors prune with the least loss, 60 and 70 %, starting from torchvision's weights.
   The schedule is not theirs: it has the proportions of the one for CIFAR-10.
"""

from collections.abc import Mapping
from dataclasses import replace

from dspfx.errors import RecipeError
from dspfx.recipe.settings import Recipe, Schedule

_SHORTCUTS = ("*.downsample.*",)

_CIFAR = Recipe(
    data="cifar10",
    dense=Schedule(164, 0.1, 1e-4),
    learn=Schedule(120, 0.05, 1e-3),
    tune=Schedule(400, 0.015, 1e-3),
    cycles=5,
    batch=128,
    ignore=_SHORTCUTS,
    model="cifar-resnet20",
    method="learned",
    strength=2e-3,
    groups=4,
    keep_macs=0.375,
)

_IMAGENET = Recipe(
    data="imagenet",
    model="torchvision/resnet18",
    pretrained=True,
    dense=Schedule(0, 0.1, 1e-4),
    learn=Schedule(30, 0.01, 1e-4),
    tune=Schedule(100, 0.01, 1e-4),
    cycles=5,
    batch=256,
    ignore=_SHORTCUTS,
    method="learned",
    strength=2e-4,
    groups=2,
    keep_macs=0.45,
    validation=0.01,
    precision="bfloat16",
)


def _minutes(
    data: str, images: int | None, epochs: tuple[int, int, int], strength: float
) -> Recipe:
    """The strengths are larger than the authors': they act over hundreds of steps only."""
    dense, learn, tune = epochs
    return Recipe(
        data=data,
        images=images,
        dense=Schedule(dense, 0.1, warm_up=0.3),
        learn=Schedule(learn, 0.05, warm_up=0.3),
        tune=Schedule(tune, 0.05),
        strength=strength,
    )


PRESETS: Mapping[str, Recipe] = {
    "digits": _minutes("digits", None, (20, 15, 20), 0.2),
    "fashion-mnist": _minutes("fashion-mnist", 6_000, (8, 6, 8), 0.01),
    "cifar10": _minutes("cifar10", 6_000, (8, 6, 8), 0.01),
    "cifar10-resnet20": _CIFAR,
    "cifar10-resnet56": replace(_CIFAR, model="cifar-resnet56", strength=5e-4, keep_macs=0.355),
    "imagenet-resnet18": _IMAGENET,
    "imagenet-resnet50": replace(_IMAGENET, model="torchvision/resnet50", keep_macs=0.38),
}


def preset(name: str) -> Recipe:
    """The preset called `name`.

    Raises:
        RecipeError: there is none.
    """
    if name not in PRESETS:
        raise RecipeError(f"there is no preset '{name}'; choose from {', '.join(PRESETS)}")
    return PRESETS[name]
