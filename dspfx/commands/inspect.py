"""`dspfx inspect`: the report of a network."""

from typing import Annotated

import torch
import typer

from dspfx.commands import targets as subjects
from dspfx.commands.session import AsJson, Debug, session
from dspfx.model.config import PrepareConfig
from dspfx.prepare import prepare
from dspfx.pruning.least import prunable
from dspfx.reporting.report import report


def inspect(
    named: subjects.Named,
    model: subjects.ModelName = None,
    classes: subjects.Classes = None,
    channels: subjects.Channels = None,
    image_size: subjects.ImageSize = None,
    groups: subjects.Groups = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layers of a MODEL to leave alone; more than once.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what could be pruned of a model, or what a file holds, layer by layer."""
    with session(debug=debug, as_json=as_json) as own:
        subject = subjects.open_subject(
            named, model=model, classes=classes, channels=channels, image_size=image_size
        )
        shown = subject.pruned
        subject.refuse_if_pruned(groups=groups, ignore=ignore)
        if shown is None:
            config = PrepareConfig(groups=groups or subjects.GROUPS, ignore=tuple(ignore or ()))
            example = torch.zeros_like(subject.images(2))
            shown = prepare(subject.dense, example, config=config)
        found = report(shown)
        text, plain = str(found), found.to_dict()
        if found.prepared:
            possible = prunable(shown)
            text, plain = f"{possible}\n\n{text}", {"prunable": possible.to_dict(), **plain}
        own.give(text, plain)
