"""`dspfx export`: the network of a run, or of a file, for other programs to run."""

from pathlib import Path
from typing import Annotated

import typer

from dspfx.commands import targets as subjects
from dspfx.commands.files import check_writable, write, written
from dspfx.commands.session import AsJson, Debug, session
from dspfx.errors import RecipeError
from dspfx.export import SUFFIXES
from dspfx.reporting.report import report


def export(
    named: Annotated[
        str,
        typer.Argument(
            metavar="RUN|FILE",
            help="The folder of a run of dspfx train, or a .safetensors file that dspfx wrote.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help=f"File to write: {', '.join(SUFFIXES)}.",
            show_default=False,
        ),
    ],
    model: subjects.ModelName = None,
    classes: subjects.Classes = None,
    channels: subjects.Channels = None,
    image_size: subjects.ImageSize = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a pruned network to a file that runs without dspfx.

    ONNX (.onnx) for ONNX Runtime, OpenVINO and others, a program of torch.export (.pt2), or machine
    code for this processor (.aoti.pt2). The size of the batch may change.
    """
    with session(debug=debug, as_json=as_json) as own:
        check_writable(output, tuple(SUFFIXES))
        subject = subjects.open_subject(
            named, model=model, classes=classes, channels=channels, image_size=image_size
        )
        compact = subject.compact()
        if compact is None:
            raise RecipeError(
                f"{named} is a dense network, and nothing of it is pruned; to prune it into such a "
                f"file: dspfx prune {named} --keep-macs 0.5 -o {output}"
            )
        write(compact, output, subject)
        found = report(compact)
        plain = {"file": str(output), "bytes": output.stat().st_size, "report": found.to_dict()}
        own.give(written(output, found), plain)
