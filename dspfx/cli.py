"""The command line: `dspfx demo`."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dspfx.demo import USUAL, Demo, run
from dspfx.errors import DspfxError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Dynamic structure pruning: smaller, faster convolutional networks of the same function."""


@app.command()
def demo(
    data: Annotated[str, typer.Option(help="digits, fashion-mnist or cifar10")] = "digits",
    folder: Annotated[Path | None, typer.Option(help="where the data is")] = None,
    depth: Annotated[int, typer.Option(help="layers of the ResNet: 8, 14 or 20")] = 8,
    groups: Annotated[int, typer.Option(help="groups per layer")] = 4,
    keep_macs: Annotated[float, typer.Option(help="fraction of the MACs to keep")] = 0.35,
    epochs_dense: Annotated[int | None, typer.Option(min=1, help="before pruning")] = None,
    epochs_learn: Annotated[int | None, typer.Option(min=1, help="of group learning")] = None,
    epochs_tune: Annotated[int | None, typer.Option(min=1, help="after pruning")] = None,
    strength: Annotated[float | None, typer.Option(help="of the group learning")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="training images to use")] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="threads torch uses")] = None,
) -> None:
    """Train a small ResNet on real images, prune it to a third, and compare the two."""
    started = time.monotonic()
    if threads is not None:
        torch.set_num_threads(threads)
    asked: dict[str, Any] = {
        "dense": epochs_dense,
        "learn": epochs_learn,
        "tune": epochs_tune,
        "strength": strength,
        "images": images,
    }
    training = dataclasses.replace(
        USUAL.get(data, USUAL["digits"]), **{k: v for k, v in asked.items() if v is not None}
    )
    with _one_line_errors():
        outcome = run(Demo(data, folder, depth, groups, keep_macs, training, seed))
    typer.echo(f"\n{outcome}\n\nfinished in {time.monotonic() - started:.0f} s")


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn what dspfx raises on purpose into one line on stderr and exit code 1."""
    try:
        yield
    except DspfxError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from error
