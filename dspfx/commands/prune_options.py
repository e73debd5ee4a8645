"""The options of `dspfx prune` that no other command has."""

from pathlib import Path
from typing import Annotated

import typer

from dspfx.commands.targets import GROUPS
from dspfx.engines.engines import NAMES
from dspfx.export import SUFFIXES
from dspfx.recipe.images.calibration import CALIBRATION

SAMPLE = 32  # images to ask for gradients at a time
IMAGES, PASSES = 1024, 40

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="cifar-resnetN, a name of torchvision or timm, or package.module:factory.",
        show_default=False,
    ),
]
KeepMacs = Annotated[float | None, typer.Option(help="Fraction of the MACs to keep.")]
KeepParams = Annotated[
    float | None, typer.Option(help="Fraction of the parameters to keep instead.")
]
KeepLatency = Annotated[
    float | None,
    typer.Option(help="Fraction of the time to keep instead; layers are measured."),
]
Engine = Annotated[
    str | None,
    typer.Option(help=f"What will run it, where --keep-latency is measured: {', '.join(NAMES)}."),
]
Precision = Annotated[
    str | None,
    typer.Option(help="In which it is measured: fp32, bf16, int8; int8 with --quantize."),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help=f"File to write: .safetensors, or {', '.join(SUFFIXES)}, which run without "
        "dspfx. MODEL-pruned.safetensors if left out.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Images whose loss decides what goes, layers are fitted on, and the accuracy is "
        "measured with: digits, fashion-mnist, cifar10 or a folder with train and val."
    ),
]
Images = Annotated[
    int | None,
    typer.Option(min=2, help=f"Training images to use of them; {IMAGES} if left out."),
]
Passes = Annotated[
    int | None,
    typer.Option(
        min=0,
        help=f"Batches of {SAMPLE} whose gradients decide what goes; 0 for the weights alone, "
        f"{PASSES} if left out.",
    ),
]
Groups = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Per layer; {GROUPS} if left out, or none but whole channels for a file "
        "that other programs run.",
    ),
]
Ignore = Annotated[list[str] | None, typer.Option(help="Layers to leave alone; more than once.")]
RoundTo = Annotated[int, typer.Option(min=1, help="Keep widths to multiples of it.")]
Quantize = Annotated[
    bool,
    typer.Option(
        "--quantize",
        help="Round weights and activations to 8 bits, calibrated on "
        f"{CALIBRATION} training images.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Of the clustering.")]
