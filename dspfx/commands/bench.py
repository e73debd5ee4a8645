"""`dspfx bench`: how long a network takes, dense and pruned."""

from typing import Annotated, Any

import typer

from dspfx.commands import targets as subjects
from dspfx.commands.session import AsJson, Debug, Threads, say, session
from dspfx.commands.unused_options import refuse
from dspfx.convert import convert
from dspfx.engines.engines import NAMES
from dspfx.errors import RecipeError
from dspfx.model.config import PrepareConfig
from dspfx.prepare import prepare
from dspfx.pruning.budget import Budget
from dspfx.pruning.prune import prune
from dspfx.recipe.images.calibration import calibration
from dspfx.recipe.images.sources import Source, in_batches, open_source
from dspfx.recipe.networks.outputs import check
from dspfx.recipe.settings import Recipe
from dspfx.recipe.speed import speed
from dspfx.recipe.team import device_of
from dspfx.training.groups.cluster import cluster_groups
from dspfx.utils.typed_json import to_json


def bench(
    named: subjects.Named,
    batch: Annotated[int, typer.Option(min=1, help="Images in a call.")] = 1,
    keep_macs: Annotated[
        float | None,
        typer.Option(help="Prune a MODEL to this fraction of its MACs first, by its weights."),
    ] = None,
    groups: subjects.Groups = None,
    engines: Annotated[
        str | None, typer.Option(help=f"Some of {','.join(NAMES)}; default: all that are there.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, int8 or auto; the last two need --data.")
    ] = "fp32",
    data: Annotated[
        str | None,
        typer.Option(
            help="Images for an accuracy and to calibrate int8 with: digits, fashion-mnist, "
            "cifar10 or a folder with train and val."
        ),
    ] = None,
    model: subjects.ModelName = None,
    classes: subjects.Classes = None,
    channels: subjects.Channels = None,
    image_size: subjects.ImageSize = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Time a network, dense and compact, in every engine."""
    with session(debug=debug, as_json=as_json, threads=threads) as own:
        own_device = device_of(device)
        subject = subjects.open_subject(
            named, model=model, classes=classes, channels=channels, image_size=image_size
        )
        if data is None and precision in ("int8", "auto"):
            raise RecipeError(f"--precision {precision} needs images to calibrate with: --data")
        source = None
        if data is not None:
            image = subject.architecture.image_size
            source = open_source(Recipe(named, data, image_size=image, validation=0.0))
            if source.channels != subject.architecture.channels:
                source = source.coloured()
            check(subject.dense, subject.images(2), source.classes)
        subject.refuse_if_pruned(groups=groups, keep_macs=keep_macs)
        if keep_macs is None:
            refuse({"groups": groups}, ["groups"], "without --keep-macs")
        compact = subject.compact()
        if compact is None and keep_macs is not None:
            config = PrepareConfig(groups=groups or subjects.GROUPS)
            prepared = prepare(subject.dense, subject.images(2), config=config)
            cluster_groups(prepared)
            say(str(prune(prepared, Budget(macs=keep_macs))))
            compact = convert(prepared)
        x = subject.images(batch).to(own_device)
        dense = subject.dense.to(own_device)
        if compact is not None:
            compact.to(own_device)
        chosen = None if engines is None else [name.strip() for name in engines.split(",")]
        given = {} if source is None else _images_of(source)
        found = speed(dense, compact, x, engines=chosen, precision=precision, say=say, **given)
        own.give(str(found), to_json(found))


def _images_of(source: Source) -> dict[str, Any]:
    """Training images to calibrate with, and test images in batches of a size."""
    numbers = source.numbers["test"]
    return {
        "batches": [x for x, _ in calibration(source)],
        "test": lambda size: source.batches("test", in_batches(numbers, size)),
    }
