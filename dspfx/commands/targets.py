"""What a command is about: a network by its name, a file of `dspfx.save`, or a run's folder."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from dspfx.commands.unused_options import refuse
from dspfx.convert import convert
from dspfx.errors import RecipeError
from dspfx.export import SUFFIXES
from dspfx.model.parts import compact_parts_of
from dspfx.recipe.folder import RunFolder
from dspfx.recipe.networks.architectures import (
    Architecture,
    input_channels,
    read_weights,
    start_from,
)
from dspfx.recipe.networks.libraries import library_of, preprocessing_of
from dspfx.storage.load import load

CLASSES, CHANNELS, GROUPS = 1000, 3, 4
FILES = (".safetensors", ".pt", ".onnx", ".pt2")

Named = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|FILE",
        help="A model (cifar-resnetN, a name of torchvision or timm, package.module:factory), a "
        ".safetensors file that dspfx wrote, or the folder of a run.",
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
Groups = Annotated[
    int | None, typer.Option(min=1, help=f"Per layer, of a MODEL; {GROUPS} if left out.")
]
Pretrained = Annotated[
    bool,
    typer.Option(
        "--pretrained", help="With the pretrained weights that torchvision or timm offers."
    ),
]
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

    def refuse_if_pruned(self, **given: object) -> None:
        """Raise RecipeError if any option is `given` that decides how a network is pruned."""
        if self.pruned is not None:
            refuse(given, list(given), "on a network that is pruned already")

    def check_channels(self, asked: int | None) -> None:
        """Raise RecipeError if the network reads other images than the user `asked` for."""
        reads = self.architecture.channels
        if asked not in (None, reads):
            raise RecipeError(
                f"{self.architecture.name} reads images of {reads} channels; leave out --channels"
            )

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
) -> Subject:
    """The network that the user means.

    Raises:
        RecipeError: there is no such model, file or run, or it is not known how it is constructed.
        LoadError: the file is damaged, or of another model.
    """
    path = _file(named)
    if path is not None and path.name.endswith(tuple(SUFFIXES)):
        raise RecipeError(
            f"{named} was exported, for other programs to run; dspfx reads the files of dspfx.save "
            "and dspfx train, *.safetensors"
        )
    if path is None:
        subject = open_model(named, classes=classes, channels=channels, image_size=image_size)
        subject.check_channels(channels)
        return subject
    found = Architecture.beside(path)
    if model is not None and (found is None or found.name != model):
        found = _architecture(model, classes, channels, image_size)
    elif found is not None:
        given = {"classes": classes, "channels": channels, "image_size": image_size}
        other = {name: size for name, size in given.items() if size != getattr(found, name)}
        refuse(other, list(other), f"on {path}: the .json beside it says otherwise")
    if found is None:
        raise RecipeError(
            f"there is no .json beside {path} that says which model it is; name it: "
            "--model NAME --classes N"
        )
    if found.runs_code and model is None:
        raise RecipeError(
            f"the .json beside {path} names code that would be run, {found.name}; if you trust it, "
            f"name it yourself: --model {found.name}"
        )
    dense = found.build()
    dense.eval()
    return Subject(found, dense, load(path, dense))


def check_dense(named: str, output: Path | None) -> None:
    """Refuse a file or a run where a dense network is to be pruned, into the file `output`.

    Raises:
        RecipeError: `named` is one; the message says which command is meant.
    """
    if _file(named) is not None:
        path = output or Path("model.onnx")
        raise RecipeError(
            f"{named} is no dense network but one that dspfx has pruned. To write it for other "
            f"programs: dspfx export {named} -o {path}. To prune further, name the dense network, "
            "with weights such as those of a run: --weights RUN/dense.pt"
        )


def open_model(
    named: str,
    *,
    classes: int | None = None,
    channels: int | None = None,
    image_size: int | None = None,
    pretrained: bool = False,
    weights: Path | None = None,
) -> Subject:
    """The dense network called `named`, with its weights.

    Raises:
        RecipeError: there is none.
    """
    if pretrained and weights is not None:
        raise RecipeError("take the pretrained weights, or those in a file, not both")
    architecture = _architecture(named, classes, channels, image_size, pretrained)
    dense = architecture.build(load=True)
    if weights is not None:
        start_from(dense, read_weights(weights), f"the weights in {weights}")
    reads = input_channels(dense) or architecture.channels
    dense.eval()
    return Subject(replace(architecture, channels=reads), dense, None)


def _file(named: str) -> Path | None:
    """The model file that is meant, of a run if `named` is one's folder; None for a name."""
    path = Path(named)
    if path.is_dir():
        run = RunFolder(path)
        if run.model.is_file():
            return run.model
        if run.config.is_file():
            raise RecipeError(
                f"the run in {named} has no model yet; to go on with it: dspfx train --resume "
                f"--run-dir {named}"
            )
        try:
            library_of(named)  # which may be called as a folder is
        except RecipeError as error:
            raise RecipeError(
                f"there is no run of dspfx train in the folder {named}, and no model is called "
                "like that"
            ) from error
        return None
    if path.is_file():
        return path
    if path.suffix in FILES:
        raise RecipeError(f"there is no file {named}")
    if "/" in named and ":" not in named and not named.startswith(("torchvision/", "timm/")):
        raise RecipeError(
            f"there is no file or folder {named}, and no model is called like that; the runs of "
            "dspfx train are folders such as runs/first"
        )
    return None


def _architecture(
    name: str,
    classes: int | None,
    channels: int | None,
    image_size: int | None,
    pretrained: bool = False,
) -> Architecture:
    size = image_size or preprocessing_of(name).size
    return Architecture(name, classes or CLASSES, channels or CHANNELS, size, pretrained)
