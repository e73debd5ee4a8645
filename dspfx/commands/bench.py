"""`dspfx bench`: how long a network takes, dense and pruned."""

from typing import Annotated

import typer

from dspfx.budget import Budget
from dspfx.cluster import cluster_groups
from dspfx.commands import subjects
from dspfx.commands.session import AsJson, Debug, Threads, say, session
from dspfx.config import PrepareConfig
from dspfx.convert import convert
from dspfx.prepare import prepare
from dspfx.prune import prune
from dspfx.recipe.speed import ROUNDS, speed
from dspfx.records import to_json


def bench(
    named: subjects.Named,
    batch: Annotated[int, typer.Option(min=1, help="Images in a call.")] = 1,
    keep_macs: Annotated[
        float | None,
        typer.Option(help="Prune a MODEL to this fraction of its MACs first, by its weights."),
    ] = None,
    groups: Annotated[int, typer.Option(min=1, help="Per layer, of a MODEL.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = ROUNDS,
    model: subjects.ModelName = None,
    classes: subjects.Classes = None,
    channels: subjects.Channels = None,
    image_size: subjects.ImageSize = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Time a network: dense, dense compiled, and compact by dspfx.compile, in turns."""
    with session(debug=debug, as_json=as_json, threads=threads) as own:
        subject = subjects.open_subject(
            named, model=model, classes=classes, channels=channels, image_size=image_size
        )
        compact = subject.compact()
        if compact is None and keep_macs is not None:
            config = PrepareConfig(groups=groups)
            prepared = prepare(subject.dense, subject.images(2), config=config)
            cluster_groups(prepared)
            say(str(prune(prepared, Budget(macs=keep_macs))))
            compact = convert(prepared)
        x = subject.images(batch).to(device)
        dense = subject.dense.to(device)
        found = speed(
            dense, None if compact is None else compact.to(device), x, rounds=rounds, say=say
        )
        own.give(str(found), to_json(found))
