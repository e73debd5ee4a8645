"""Python in processes of their own, one or a team."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT = 240  # seconds; what takes longer hangs


def torchrun(*arguments: str, **more: Any) -> str:
    """What two processes print; torchrun finds a free port by itself."""
    return run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments, **more
    )


def run(*arguments: str, cwd: Path | None = None, **variables: str) -> str:
    """What Python prints."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its workers
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, printed[-2000:] + errors[-6000:]
    return printed
