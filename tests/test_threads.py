"""One compiled model, called from many threads at once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from small import Small, pruned
from torch import Tensor, nn

import dspfx
from helpers import assert_equal

THREADS, REQUESTS = 8, 200
BATCHES = (4, 1, 2, 3, 8)  # two are compiled for on their own, the others together


class Segments(Small):
    """Convolutions alone: a linear layer of MKL's adds up in another order when threads compete."""

    def __init__(self) -> None:
        super().__init__(width=16)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.norm(self.b(torch.relu(self.a(x)))))


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.usefixtures("own_cache")
def test_threads_get_what_serial_calls_get(warm: bool) -> None:
    x = torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    compact = dspfx.convert(pruned(Segments(), x))
    fast = dspfx.compile(compact, x[:4], engines=["own", "inductor"])
    for size in BATCHES if warm else ():
        assert_equal(compact(x[:size]), fast(x[:size]), 1e-5)
    start = threading.Barrier(THREADS)

    def request(thread: int, number: int) -> tuple[int, int]:
        """How many images, and the first of them: 120 different requests."""
        return BATCHES[(7 * thread + number) % 5], (5 * thread + 3 * number) % 24

    def serve(thread: int) -> list[Tensor]:
        start.wait()
        given = [request(thread, number) for number in range(REQUESTS)]
        return [fast(x[first : first + size]) for size, first in given]

    @cache
    def serial(size: int, first: int) -> Tensor:
        answer: Tensor = fast(x[first : first + size])
        assert_equal(compact(x[first : first + size]), answer, 1e-5)
        return answer

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(serve, range(THREADS)))
    for thread, answers in enumerate(found):
        for number, answer in enumerate(answers):
            assert torch.equal(answer, serial(*request(thread, number)))
