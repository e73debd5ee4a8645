"""What is kept on disk between processes, and what machine it was made on."""

import contextlib
import os
import platform
from pathlib import Path

FOLDER = "DSPFX_CACHE_DIR"


def cache_folder() -> Path:
    """The folder that the environment variable `DSPFX_CACHE_DIR` names, else the user's cache."""
    given = os.environ.get(FOLDER)
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "dspfx"


def processor() -> str:
    """The name of the CPU, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def as_file_name(text: str) -> str:
    """`text` without what file systems mind."""
    return "".join(c if c.isalnum() else "_" for c in text)
