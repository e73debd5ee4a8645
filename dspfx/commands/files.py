"""The files that commands write: a compact network, for dspfx or for other programs."""

from pathlib import Path

from torch import nn

from dspfx.commands.targets import Subject
from dspfx.errors import ExportError
from dspfx.export import SUFFIXES, export
from dspfx.reporting.report import Report
from dspfx.storage.save import save

OWN = ".safetensors"
BOTH = (OWN, *SUFFIXES)


def check_writable(path: Path, suffixes: tuple[str, ...] = BOTH) -> Path:
    """`path`, if a file can be written there; known before any work is done.

    Raises:
        ExportError: its suffix is none of `suffixes`, or its folder is missing.
    """
    if not path.name.endswith(suffixes):
        raise ExportError(
            f"the suffix of {path.name} does not say in which format to write; "
            f"{', '.join(suffixes)} do"
        )
    if not path.parent.is_dir():
        raise ExportError(f"there is no folder {path.parent} to write {path.name} into")
    if path.is_dir():
        raise ExportError(f"{path} is a folder; name a file")
    return path


def write(compact: nn.Module, path: Path, subject: Subject) -> None:
    """Write `compact`, made of `subject`, to `path`, whose suffix says in which format.

    Raises:
        DspfxError: it cannot be saved or exported.
    """
    if path.name.endswith(OWN):
        save(compact, path)
        subject.architecture.write(path)
    else:
        export(compact, subject.images(2), path)


def written(path: Path, report: Report) -> str:
    """What to tell the user of the file at `path`: what is in it, to the last weight."""
    before, emitted = report.before, report.emitted
    return (
        f"written: {path}, {path.stat().st_size:,} bytes, "
        f"{emitted.macs / before.macs:.2%} of the dense network's MACs, "
        f"{emitted.parameters / before.parameters:.2%} of its parameters"
    )
