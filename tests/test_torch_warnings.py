"""What torch warns of where it says nothing is not shown."""

import subprocess
import sys

import pytest

CODE = """
import logging, torch
{first}
import torch.utils.cpp_extension
from dspfx.utils.torch_warnings import without_cuda_home
without_cuda_home()
logging.getLogger("torch.utils.cpp_extension").warning("the compiler is too old")
"""


@pytest.mark.parametrize("hidden", [True, False])
def test_only_the_word_on_cuda_home_is_hidden(hidden: bool) -> None:
    call = "from dspfx.utils.torch_warnings import without_cuda_home as w; w()"
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(first=call if hidden else "")],
        env={"CUDA_HOME": "/usr/local", "CUDA_VISIBLE_DEVICES": "", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("No CUDA runtime is found" in done.stderr) is not hidden
    assert "the compiler is too old" in done.stderr
