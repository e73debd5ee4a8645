"""What all tests share.

Inductor compiles in the process of the test: a pool of others would import torch first.
"""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def pytest_collection_finish() -> None:
    """What was imported so far stays: searching it for garbage again and again takes time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def _short_races() -> Iterator[None]:
    """Whatever is timed is called a few times before, but not for a while: any may win."""
    from dspfx.utils import timing  # noqa: PLC0415 (imports torch)

    warmed_up: Callable[[Callable[[], object], float], float] = timing._warmed_up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_warmed_up", lambda call, seconds: warmed_up(call, 0.0))
        yield


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for the test; the CPU kernel, slow to build, is built in the usual one."""
    from dspfx.layers import native  # noqa: PLC0415 (few tests need it)

    native.built()
    monkeypatch.setenv("DSPFX_CACHE_DIR", str(tmp_path))
    return tmp_path
