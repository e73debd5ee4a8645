"""The threads of the own kernel: any number, from any thread and process, compute the same."""

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from kernel_cases import layer
from torch import Tensor, nn

from dspfx.layers import native
from dspfx.layers.group_conv_run import GroupConvRun

pytestmark = pytest.mark.skipif(not native.built(), reason="the kernel cannot be built")

TESTS = Path(__file__).parents[1]


def a_run() -> GroupConvRun:
    """Six layers of several tasks each."""
    torch.manual_seed(0)
    layers = [layer(nn.Conv2d(16, 16, 3, padding=1), 2, seed)[0] for seed in range(6)]
    return GroupConvRun(layers, [(i, -1) for i in range(6)], 1, [6])


def images(number: int) -> Tensor:
    return torch.randn(number, 16, 15, 11, generator=torch.Generator().manual_seed(number))


def outputs(run: GroupConvRun) -> list[Tensor]:
    """Of 1 to 5 images, by as many threads as torch is set to."""
    return [run(images(number))[0].clone() for number in range(1, 6)]


def in_a_process(program: str) -> None:
    """Ends well, and within the limit of a hang."""
    start = "import os, torch\nfrom test_native_threads import a_run, outputs\nrun = a_run()\n"
    start += "torch.set_num_threads(1)\nwanted = outputs(run)\ntorch.set_num_threads(4)\n"
    start += "def right():\n    return all(map(torch.equal, wanted, outputs(run)))\n"
    path = os.pathsep.join([str(TESTS), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_callers_at_once_with_changing_numbers_of_threads() -> None:
    run, wrong = a_run(), []
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    wanted = outputs(run)

    def call(seed: int) -> None:
        for i in range(30):
            torch.set_num_threads(1 + (i + seed) % 4)
            wrong.extend(i for a, b in zip(wanted, outputs(run), strict=True) if not a.equal(b))

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    torch.set_num_threads(before)
    assert not wrong


def test_a_process_ends_with_helpers_alive() -> None:
    in_a_process("assert right()")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_computes() -> None:
    in_a_process(
        """
        assert right()
        child = os.fork()
        if child == 0:
            os._exit(0 if right() and right() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert right()
        """
    )


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity")
def test_helpers_without_a_core_are_not_needed() -> None:
    in_a_process("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nassert right()")
