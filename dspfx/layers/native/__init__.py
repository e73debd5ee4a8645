"""The project's own CPU kernel: built on first use, then kept.

`dspfx::group_conv2d` is a convolution whose groups of filters read their own lists of channels,
`dspfx::group_conv_run` a run of them without tensors in between. Where the kernel cannot be built,
a warning says why, once, and the same operators compute by torch's own convolutions.
"""

import functools
import hashlib
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
CONVOLUTION, MAX_POOL, WINOGRAD, AVERAGE_POOL = range(4)
POOLS = (MAX_POOL, AVERAGE_POOL)
LAYER_NUMBERS = 14
# G of Winograd's algorithm F(4, 3): see winograd.h
POINTS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu")
_FUNCTIONS: tuple[Any, ...] = (torch.clone, F.relu, F.relu6, F.hardswish, F.silu)
PORTABLE_BLOCK = 8
Settings = tuple[list[int], list[int], list[int], list[int]]


@functools.cache
def _library() -> Any:
    """Register the operators with torch, with an implementation for every device."""
    library: Any = torch.library.Library("dspfx", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema, name, portable, fake in (
        (ONE, "group_conv2d", _one, _one_fake),
        (RUN, "group_conv_run", _run, _run_fake),
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
        macros = [f"-D{macro}" for macro in isa.build_macro()]
        more = os.environ.get("DSPFX_NATIVE_FLAGS", "").split()  # such as a sanitizer's
        folder = cache_folder() / _build_name(f"{isa} {' '.join(more)}".strip())
        folder.mkdir(parents=True, exist_ok=True)
        with _own_programs_on_path():
            cpp_extension.load(
                "dspfx_group_conv",
                str(SOURCE),
                extra_cflags=["-O3", "-fopenmp", *isa.build_arch_flags().split(), *macros, *more],
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


def _build_name(isa: str) -> str:
    """The build folder: one for all that the build depends on, and for where its sources are."""
    sources = b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]*")))
    digest = hashlib.sha256(sources + str(FOLDER).encode()).hexdigest()[:12]
    return as_file_name(f"native {torch.__version__} {processor()} {isa} {digest}")


@dataclass(frozen=True)
class Layer:
    """One layer of a run, with its part of weights and indices.

    Attributes:
        kind: CONVOLUTION or WINOGRAD, or one of `POOLS`, which have no groups. An average of a
            kernel of size 0 is one of all pixels.
        source, residual: values; the given ones come first, then one for each layer. -1: none.
        settings: kernel size, stride, padding and dilation.
        activation: index into `ACTIVATIONS`.
        channels: C, of the input of a layer that is no pool.
        filters: the channels of the output in the order of the groups, int `[O]`.
        groups: of each group the filters, as they lie in `filters`, the inputs, int `[c]`, and
            the weight, `[f, c, kh, kw]`.
        added: the channel of the residual that is added to each of the output, -1 for none.
        addends: R, the channels of the residual.
    """

    kind: int
    source: int
    residual: int
    settings: Settings
    activation: int
    channels: int
    filters: Tensor
    groups: tuple[tuple[Tensor, Tensor, Tensor], ...]
    added: Tensor | None = None
    addends: int = 0


def unpacked(weight: Tensor, indices: Tensor, layers: str) -> Iterator[Layer]:
    """The layers of a run, from what `group_conv_run` is given."""
    block, indices = int(indices[0]), indices[1:]
    for (kind, source, residual, count, filters), settings, activation in described(layers):
        kernel = settings[0]
        if kind in POOLS:
            yield Layer(kind, source, -1, settings, 0, -1, indices[:0], ())
            continue
        channels, indices = int(indices[0]), indices[1:]
        sizes, written = indices[: 2 * count], indices[2 * count : 2 * count + filters]
        indices = indices[2 * count + filters :]
        groups, left = [], written
        for size, reads in sizes.reshape(-1, 2).tolist():
            inputs, indices = indices[:reads], indices[reads:]
            pieces = []
            shape = (len(POINTS), reads, kernel[1]) if kind == WINOGRAD else (reads, *kernel)
            for rows in rows_of_blocks(size, block):
                end = rows * math.prod(shape)
                piece, weight = weight[:end], weight[end:]
                pieces.append(piece.reshape(-1, rows).T.reshape(rows, *shape))
            own = torch.cat(pieces) if pieces else weight.new_zeros(0, *shape)
            own = untransformed(own) if kind == WINOGRAD else own
            groups.append((left[:size], inputs, own))
            left = left[size:]
        added, addends = None, 0
        if residual >= 0:
            addends, added = int(indices[0]), indices[1 : filters + 1]
            indices = indices[filters + 1 :]
        read = kind, source, residual, settings, activation, channels
        yield Layer(*read, written, tuple(groups), added, addends)


def as_text(layers: Iterable[Sequence[int]]) -> str:
    """The numbers of layers as the operator's text argument; inductor cannot quote line breaks."""
    return " ".join(str(number) for numbers in layers for number in numbers)


def as_numbers(layers: str) -> list[list[int]]:
    """The numbers of each layer."""
    numbers = [int(number) for number in layers.split()]
    return [numbers[i : i + LAYER_NUMBERS] for i in range(0, len(numbers), LAYER_NUMBERS)]


def described(layers: str) -> Iterator[tuple[Sequence[int], Settings, int]]:
    """For each layer: kind, source, residual, groups and filters; settings; activation."""
    for own in as_numbers(layers):
        yield own[:5], (own[5:7], own[7:9], own[9:11], own[11:13]), own[13]


def transformed(weight: Tensor) -> Tensor:
    """`[f, c, 3, kw]` to G times its columns, `[f, 6, c, kw]`, as Winograd's algorithm takes it."""
    points = torch.tensor(POINTS, dtype=torch.float64, device=weight.device)
    return torch.einsum("pk,fckw->fpcw", points, weight.double()).to(weight.dtype)


def untransformed(weight: Tensor) -> Tensor:
    """The inverse of `transformed`, up to rounding."""
    points = torch.tensor(POINTS, dtype=torch.float64, device=weight.device)
    return torch.einsum("kp,fpcw->fckw", torch.linalg.pinv(points), weight.double()).to(
        weight.dtype
    )


def packed(weights: Sequence[Tensor], block: int) -> Tensor:
    """The weights of groups, each `[f, c, kh, kw]`, as the kernel takes them, flat.

    Block by block of filters, `[c * kh * kw, filters of the block]` each.
    """
    pieces = [
        piece.detach().flatten(1).T.flatten()
        for weight in weights
        for piece in torch.split(weight, rows_of_blocks(len(weight), block))
    ]
    return torch.cat(pieces)


def rows_of_blocks(filters: int, block: int) -> list[int]:
    """How many filters the blocks of a group have: as few blocks as can be, of even sizes."""
    count = -(-filters // block)
    return [filters // count + (i < filters % count) for i in range(count)]


def _run(
    inputs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    layers: str,
    outputs: list[int],
) -> list[Tensor]:
    """The portable implementation: one of torch's convolutions for each group, on any device."""
    values = list(inputs)
    for layer in unpacked(weight, indices, layers):
        x, (_, stride, padding, dilation) = values[layer.source], layer.settings
        if layer.kind in POOLS:
            values.append(_pool(x, layer))
            continue
        if x.shape[1] != layer.channels:
            raise RuntimeError(
                f"group_conv2d: expected an input of {layer.channels} channels, got {x.shape[1]}"
            )
        filters = layer.filters.numel()
        y = x.new_zeros(len(x), filters, *_out_size(x.shape[2:], *layer.settings))
        for written, read, own in layer.groups:
            if written.numel() and read.numel():
                y[:, written] = F.conv2d(x[:, read], own, None, stride, padding, dilation)
        if bias is not None:
            own_bias, bias = bias[:filters], bias[filters:]
            y = y + own_bias.reshape(1, -1, 1, 1)
        if layer.added is not None:
            residual = values[layer.residual]
            if residual.shape[1] != layer.addends:
                raise RuntimeError(
                    f"group_conv2d: expected a residual of {layer.addends} channels, got "
                    f"{residual.shape[1]}"
                )
            added = residual[:, layer.added.clamp(min=0)]
            y = y + torch.where(layer.added.reshape(-1, 1, 1) >= 0, added, 0)
        values.append(_FUNCTIONS[layer.activation](y))
    return [values[number] for number in outputs]


def _pool(x: Tensor, layer: Layer) -> Tensor:
    kernel, stride, padding, dilation = layer.settings
    if layer.kind == MAX_POOL:
        return F.max_pool2d(x, kernel, stride, padding, dilation)
    return F.avg_pool2d(x, _whole(kernel, x.shape[2:]), stride, padding)


def _whole(kernel: list[int], size: Sequence[int]) -> list[int]:
    """The kernel of a pool, that of all pixels spelt out."""
    return [k or n for k, n in zip(kernel, size, strict=True)]


def _run_fake(
    inputs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    indices: Tensor,
    layers: str,
    outputs: list[int],
) -> list[Tensor]:
    shapes: list[Sequence[int]] = [x.shape for x in inputs]
    for (kind, source, _, _, filters), settings, _ in described(layers):
        (kernel, *other), before = settings, shapes[source]
        size = _out_size(before[2:], _whole(kernel, before[2:]), *other)
        channels = before[1] if kind in POOLS else filters
        shapes.append((shapes[source][0], channels, *size))
    return [inputs[0].new_empty(shapes[number]) for number in outputs]


def _one(
    x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, *args: Any, run: Any = _run
) -> Tensor:
    residual, groups, filters, kernel, stride, padding, dilation, activation = args
    inputs = [x] if residual is None else [x, residual]
    settings = (*kernel, *stride, *padding, *dilation)
    numbers = [CONVOLUTION, 0, len(inputs) * 2 - 3, groups, filters, *settings, activation]
    result: Tensor = run(inputs, weight, bias, indices, as_text([numbers]), [len(inputs)])[0]
    return result


_one_fake = functools.partial(_one, run=_run_fake)


def _out_size(
    size: Sequence[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> list[int]:
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


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
