"""What a command is about: a network by its name, a file of `dspfx.save`, or a run's folder."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from dspfx.convert import convert
from dspfx.errors import RecipeError
from dspfx.load import load
from dspfx.parts import compact_parts_of
from dspfx.recipe.architectures import (
    Architecture,
    input_channels,
    read_weights,
    start_from,
    usual_size,
)
from dspfx.recipe.folder import RunFolder

CLASSES, CHANNELS = 1000, 3
FILES = (".safetensors", ".pt", ".onnx", ".pt2")

Named = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|FILE",
        help="A model (cifar-resnetN, a name of torchvision or timm, package.module:factory), a "
        "file that dspfx wrote, or the folder of a run.",
        show_default=False,
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", help="Of FILE, if no .json beside it says which model it is."),
]
Classes = Annotated[int | None, typer.Option(min=1, help="Classes of the model; 1000 if left out.")]
Channels = Annotated[int | None, typer.Option(min=1, help="Of its images; 3 if left out.")]
ImageSize = Annotated[
    int | None, typer.Option(min=1, help="Of its images; the model's usual one if left out.")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="With the weights on offer.")]
Weights = Annotated[
    Path | None, typer.Option(help="With the weights in this file (.safetensors, .pt).")
]


@dataclass(frozen=True)
class Subject:
    """A network, perhaps pruned.

    Attributes:
        architecture: of the dense network.
        dense: with its weights if it was named, with random ones beside a file.
        pruned: what the file holds, prepared or compact; None if a model was named.
    """

    architecture: Architecture
    dense: nn.Module
    pruned: nn.Module | None

    def images(self, batch: int) -> Tensor:
        """Random images that it takes, `[batch, C, H, W]`."""
        channels, size = self.architecture.channels, self.architecture.image_size
        return torch.randn(batch, channels, size, size)

    def compact(self) -> nn.Module | None:
        """What the file holds, converted if it was not."""
        if self.pruned is None or compact_parts_of(self.pruned):
            return self.pruned
        return convert(self.pruned)


def open_subject(
    named: str,
    *,
    model: str | None = None,
    classes: int | None = None,
    channels: int | None = None,
    image_size: int | None = None,
    pretrained: bool = False,
    weights: Path | None = None,
) -> Subject:
    """The network that the user means.

    Raises:
        RecipeError: there is no such model, file or run, or it is not known how it is constructed.
        LoadError: the file is damaged, or of another model.
    """
    path = Path(named)
    if path.is_dir():
        path = RunFolder(path).model
        if not path.is_file():
            raise RecipeError(f"the run in {named} has no model yet; go on with it (--resume)")
    if path.is_file():
        found = Architecture.beside(path) if model is None else None
        if found is None:
            if model is None:
                raise RecipeError(
                    f"there is no .json beside {path} that says which model it is; name it: "
                    "--model NAME --classes N"
                )
            found = _architecture(model, classes, channels, image_size)
        dense = found.build().eval()
        return Subject(found, dense, load(path, dense))
    if path.suffix in FILES:
        raise RecipeError(f"there is no file {named}")
    architecture = _architecture(named, classes, channels, image_size)
    dense = architecture.build(pretrained=pretrained)
    if weights is not None:
        start_from(dense, read_weights(weights), f"the weights in {weights}")
    reads = input_channels(dense) or architecture.channels
    return Subject(replace(architecture, channels=reads), dense.eval(), None)


def _architecture(
    name: str, classes: int | None, channels: int | None, image_size: int | None
) -> Architecture:
    size = image_size or usual_size(name)
    return Architecture(name, classes or CLASSES, channels or CHANNELS, size)
