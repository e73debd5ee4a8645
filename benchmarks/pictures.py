"""The pictures in docs/pictures, of networks that the method's authors pruned.

    python -m benchmarks.pictures [--folder FOLDER]

`dspfx.plot` draws ResNet-20 with two groups at full width, under the masks that they learned.
"""

from pathlib import Path
from typing import Annotated

import typer

import dspfx
from benchmarks.reference import DEFAULT_FOLDER, load

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
NETWORKS = {"resnet20": "resnet20_g2"}


def main(
    folder: Annotated[Path, typer.Option(help="of the reference networks")] = DEFAULT_FOLDER,
) -> None:
    """Write docs/pictures/*.png."""
    PICTURES.mkdir(exist_ok=True)
    for picture, name in NETWORKS.items():
        network = load(folder / f"{name}.safetensors").at_full_width()
        dspfx.plot(network, PICTURES / f"{picture}.png")


if __name__ == "__main__":
    typer.run(main)
