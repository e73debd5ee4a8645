"""The project's own CPU kernel: built on first use, then kept.

`dspfx::group_conv2d` is a convolution whose groups of filters read their own lists of channels,
`dspfx::group_conv_run` a run of them without tensors in between. Where the kernel cannot be built,
a warning says why, once, and the same operators compute by torch's own convolutions.
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

from dspfx.layers.native import reference
from dspfx.utils.cache import as_file_name, cache_folder, processor
from dspfx.utils.torch_warnings import without_cuda_home

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "group_conv.cpp"
# indices and the numbers that describe a layer are explained in build_program.h; the latter are
# passed as text, which torch hands on faster than numbers
ONE = (
    "group_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor indices, Tensor? residual, "
    "int groups, int filters, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
    "int activation) -> Tensor"
)
RUN = (
    "group_conv_run(Tensor[] inputs, Tensor weight, Tensor? bias, Tensor indices, str layers, "
    "int[] outputs) -> Tensor[]"
)
PORTABLE_BLOCK = 8


@functools.cache
def _library() -> Any:
    """Register the operators with torch, with an implementation for every device."""
    library: Any = torch.library.Library("dspfx", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema, name, portable, fake in (
        (ONE, "group_conv2d", reference.one, reference.one_fake),
        (RUN, "group_conv_run", reference.run, reference.run_fake),
    ):
        library.define(schema)
        library.impl(name, portable, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dspfx::{name}", fake, lib=library)
    return library


@functools.cache
def filters_in_a_block() -> int:
    """How many filters the kernel packs into one block; it is built if necessary."""
    if not built():
        return PORTABLE_BLOCK
    return int(torch.ops.dspfx.filters_in_a_block())


@functools.cache
def built() -> bool:
    """Whether the kernel is there; the first call on a machine builds it, in some seconds.

    The operators are known to torch afterwards in any case.
    """
    from torch._inductor.cpu_vec_isa import pick_vec_isa  # noqa: PLC0415 (slow to import)

    cpp_extension = without_cuda_home()

    library = _library()
    if hasattr(torch.ops.dspfx, "filters_in_a_block"):
        return True
    try:
        isa = pick_vec_isa()
        flags = [*_processor_flags(isa), *(f"-D{macro}" for macro in isa.build_macro())]
        more = os.environ.get("DSPFX_NATIVE_FLAGS", "").split()  # such as a sanitizer's
        folder = cache_folder() / _build_name(f"{isa} {' '.join(more)}".strip())
        folder.mkdir(parents=True, exist_ok=True)
        with _own_programs_on_path():
            cpp_extension.load(
                "dspfx_group_conv",
                str(SOURCE),
                extra_cflags=["-O3", "-fopenmp", *flags, *more],
                extra_ldflags=["-fopenmp", *more],
                build_directory=str(folder),
                is_python_module=False,
            )
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        for name in ("group_conv2d", "group_conv_run"):
            torch.library.register_autograd(f"dspfx::{name}", _no_gradient, lib=library)
        warnings.warn(
            f"dspfx's own CPU kernel cannot be built, so torch's convolutions are used: {reason}. "
            "A C++ compiler and ninja are needed",
            stacklevel=2,
        )
        return False
    return True


def multiplies_bf16() -> bool:
    """Whether the kernel is there and the processor has instructions for products of bfloat16."""
    return built() and bool(torch.ops.dspfx.multiplies_bf16())


def _processor_flags(isa: Any) -> list[str]:
    """The compiler's flags for the instructions that processor and compiler both know."""
    flags: list[str] = isa.build_arch_flags().split()
    has_bf16 = getattr(isa, "is_avx512_bf16_supported", None)
    if has_bf16 is not None and has_bf16() and "-mavx512bf16" not in flags:
        flags.append("-mavx512bf16")
    return flags


def _build_name(isa: str) -> str:
    """The build folder: one for all that the build depends on, and for where its sources are."""
    sources = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]*")))
    digest = hashlib.sha256(sources + str(FOLDER).encode()).hexdigest()[:12]
    return as_file_name(f"native {torch.__version__} {processor()} {isa} {digest}")


def _no_gradient(*args: Any) -> Any:
    raise RuntimeError(
        "dspfx's own convolutions are for inference; train the prepared model instead"
    )


@contextmanager
def _own_programs_on_path() -> Iterator[None]:
    """Find a `ninja` beside this Python although the environment is not active."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before
