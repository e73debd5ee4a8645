"""One compiled model, called from many threads at once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_save import Small, pruned

import dspfx
from helpers import assert_equal

THREADS, REQUESTS = 8, 200
BATCHES = (1, 2, 3, 4, 8)


def test_threads_get_what_serial_calls_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of all sizes from the first request on, most of which nobody compiled for yet."""
    monkeypatch.setenv("DSPFX_CACHE_DIR", str(tmp_path))
    x = torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    compact = dspfx.convert(pruned(Small(width=16), x))
    fast = dspfx.compile(compact, x[:4])
    start = threading.Barrier(THREADS)

    def request(thread: int, number: int) -> torch.Tensor:
        size = BATCHES[(7 * thread + number) % len(BATCHES)]
        first = (5 * thread + 3 * number) % 24
        return x[first : first + size]

    def serve(thread: int) -> list[torch.Tensor]:
        start.wait()
        return [fast(request(thread, number)) for number in range(REQUESTS)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(serve, range(THREADS)))
    for thread, answers in enumerate(found):
        for number, answer in enumerate(answers):
            asked = request(thread, number)
            assert torch.equal(answer, fast(asked))
            if number < len(BATCHES):
                assert_equal(compact(asked), answer, 1e-4)
