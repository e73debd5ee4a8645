"""`dspfx demo`: the whole road on real images, within minutes."""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from dspfx.commands import targets as subjects
from dspfx.commands.session import AsJson, Debug, Threads, say, session
from dspfx.commands.train import changed
from dspfx.recipe.presets import preset
from dspfx.recipe.run import Machine
from dspfx.recipe.run import run as run_recipe
from dspfx.recipe.speed import speed

TIMED_BATCH = 32


def demo(
    data: Annotated[str, typer.Option(help="digits, fashion-mnist or cifar10")] = "digits",
    folder: Annotated[Path | None, typer.Option(help="where the data is")] = None,
    depth: Annotated[int, typer.Option(help="layers of the ResNet: 8, 14 or 20")] = 8,
    groups: Annotated[int, typer.Option(help="groups per layer")] = 4,
    keep_macs: Annotated[float, typer.Option(help="fraction of the MACs to keep")] = 0.35,
    epochs_dense: Annotated[int | None, typer.Option(min=1, help="before pruning")] = None,
    method: Annotated[str, typer.Option(help="gradual, channels or learned")] = "gradual",
    epochs_learn: Annotated[
        int | None, typer.Option(min=1, help="of gradual pruning, or group learning")
    ] = None,
    epochs_tune: Annotated[int | None, typer.Option(min=1, help="after pruning")] = None,
    strength: Annotated[float | None, typer.Option(help="of learned groups")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="training images to use")] = None,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a small ResNet on real images, prune it to a third, and compare the two.

    A run of `dspfx train` in a folder of its own, which is deleted, and of `dspfx bench`.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    started = time.monotonic()
    with session(debug=debug, as_json=as_json, threads=threads) as own:
        recipe = changed(preset(data), {**given, "model": f"cifar-resnet{depth}"})
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "run"
            outcome = run_recipe(recipe, path, machine=Machine("cpu"), say=say)
            subject = subjects.open_subject(str(path))
        found = speed(subject.dense, subject.pruned, subject.images(TIMED_BATCH), say=say)
        outcome = dataclasses.replace(outcome, speed=found)
        text = f"{outcome}\n\nfinished in {time.monotonic() - started:.0f} s"
        plain = outcome.to_dict()
        del plain["model"]  # the folder is gone
        own.give(text, plain)
