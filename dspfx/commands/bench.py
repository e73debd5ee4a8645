"""`dspfx bench`: how long a network takes, dense and pruned."""

from typing import Annotated

import typer

from dspfx.commands import targets as subjects
from dspfx.commands.session import AsJson, Debug, Threads, say, session
from dspfx.commands.unused_options import refuse
from dspfx.convert import convert
from dspfx.engines.engines import NAMES
from dspfx.model.config import PrepareConfig
from dspfx.prepare import prepare
from dspfx.pruning.budget import Budget
from dspfx.pruning.prune import prune
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
        found = speed(dense, compact, x, engines=chosen, say=say)
        own.give(str(found), to_json(found))
