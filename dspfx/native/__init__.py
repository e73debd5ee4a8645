"""The project's own CPU kernel, `dspfx::group_conv2d`: built on first use, then kept.

Where it cannot be built, a warning says why, once, and the same operator computes by torch's own
convolutions.
"""

import functools
import hashlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dspfx.caches import as_file_name, cache_folder, processor

SOURCE = Path(__file__).with_name("group_conv.cpp")
SCHEMA = (
    "group_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor sizes, Tensor filters, "
    "Tensor inputs, Tensor? residual, int[2] kernel, int[2] stride, int[2] padding, "
    "int[2] dilation, int block, int activation) -> Tensor"
)
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu")
_FUNCTIONS: tuple[Any, ...] = (torch.clone, F.relu, F.relu6, F.hardswish, F.silu)
PORTABLE_BLOCK = 8


@functools.cache
def define() -> Any:
    """Make the operator known to torch, with an implementation for every device."""
    library: Any = torch.library.Library("dspfx", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(SCHEMA)
    library.impl("group_conv2d", _reference, "CompositeExplicitAutograd")
    torch.library.register_fake("dspfx::group_conv2d", _fake, lib=library)
    torch.library.register_autograd("dspfx::group_conv2d", _no_gradient, lib=library)
    return library


@functools.cache
def filters_in_a_block() -> int:
    """In blocks of how many filters the kernel takes its weight; it is built where need be."""
    define()
    if not built():
        return PORTABLE_BLOCK
    return int(torch.ops.dspfx.filters_in_a_block())


@functools.cache
def built() -> bool:
    """Whether the kernel is there; the first call on a machine builds it, in some seconds."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa  # noqa: PLC0415 (slow to import)
    from torch.utils import cpp_extension  # noqa: PLC0415

    define()
    if hasattr(torch.ops.dspfx, "filters_in_a_block"):
        return True
    try:
        isa = pick_vec_isa()
        macros = [f"-D{macro}" for macro in isa.build_macro()]
        folder = cache_folder() / _build_name(str(isa))
        folder.mkdir(parents=True, exist_ok=True)
        with _own_programs_on_path():
            cpp_extension.load(
                "dspfx_group_conv",
                str(SOURCE),
                extra_cflags=["-O3", "-fopenmp", *isa.build_arch_flags().split(), *macros],
                extra_ldflags=["-fopenmp"],
                build_directory=str(folder),
                is_python_module=False,
            )
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"dspfx's own CPU kernel cannot be built, so torch's convolutions are used: {reason}. "
            "A C++ compiler and ninja are needed",
            stacklevel=2,
        )
        return False
    return True


def _build_name(isa: str) -> str:
    """A folder of its own for everything that the build depends on."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    return as_file_name(f"native {torch.__version__} {processor()} {isa} {digest}")


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Tensor,
    filters: Tensor,
    inputs: Tensor,
    residual: Tensor | None,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    block: int,
    activation: int,
) -> Tensor:
    """The same by torch's convolutions, one for each group, on any device."""
    size = _out_size(x, kernel, stride, padding, dilation)
    y = x.new_zeros(len(x), filters.numel(), *size)
    taps = kernel[0] * kernel[1]
    first_filter = first_input = first_weight = 0
    for count, reads in sizes.tolist():
        blocks = -(-count // block)
        end = first_weight + blocks * block * reads * taps
        own = weight[first_weight:end].reshape(blocks, reads * taps, block).transpose(1, 2)
        own = own.reshape(blocks * block, reads, *kernel)[:count]
        read = inputs[first_input : first_input + reads]
        if reads and count:
            written = filters[first_filter : first_filter + count]
            y[:, written] = F.conv2d(x[:, read], own, None, stride, padding, dilation)
        first_filter, first_input, first_weight = first_filter + count, first_input + reads, end
    if bias is not None:
        y = y + bias.reshape(1, -1, 1, 1)
    if residual is not None:
        y = y + residual
    result: Tensor = _FUNCTIONS[activation](y)
    return result


def _fake(x: Tensor, *args: Any) -> Tensor:
    filters, kernel, stride, padding, dilation = args[3], *args[6:10]
    size = _out_size(x, kernel, stride, padding, dilation)
    return x.new_empty(x.shape[0], filters.numel(), *size)


def _out_size(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]


def _no_gradient(*args: Any) -> Any:
    raise RuntimeError("dspfx::group_conv2d is for inference; train the prepared model instead")


@contextmanager
def _own_programs_on_path() -> Iterator[None]:
    """A `ninja` that lies beside this Python is found although the environment is not active."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before
