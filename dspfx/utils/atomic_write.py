"""Files that are written whole or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dspfx.errors import DspfxError


@contextmanager
def replacing(path: Path, failure: type[DspfxError]) -> Iterator[Path]:
    """A name in the folder of `path` to write to, which becomes `path` if all goes well.

    It has the suffixes of `path`. What was at `path` is there until then.

    Raises:
        DspfxError: the `failure`, where the system does not let it be written.
    """
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name[-40:]}")  # names have a limit
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives to a new file
        yield temporary
        temporary.chmod(mode)
        _force(temporary)
        temporary.replace(path)
        _force(path.parent)
    except OSError as error:
        raise failure(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _force(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
