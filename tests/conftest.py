"""What all tests share.

Inductor compiles in the process of the test: a pool of others would import torch first.
"""

import os
from pathlib import Path

import pytest

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for the test; the CPU kernel, slow to build, is built in the usual one."""
    from dspfx.layers import native  # noqa: PLC0415 (few tests need it)

    native.built()
    monkeypatch.setenv("DSPFX_CACHE_DIR", str(tmp_path))
    return tmp_path
