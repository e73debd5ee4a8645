"""How the kernel takes weights and layers: packed block by block, and described by numbers."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
Settings = tuple[list[int], list[int], list[int], list[int]]


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
            the weight, `[f, c, kh, kw]`. In bfloat16 all channels of the words that it reads.
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
    block, indices, per = int(indices[0]), indices[1:], channels_in_a_word(weight.dtype)
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
            words, indices = indices[:reads], indices[reads:]
            pieces = []
            shape = (len(POINTS), reads, kernel[1]) if kind == WINOGRAD else (reads, *kernel)
            for rows in rows_of_blocks(size, block, per):
                end = rows * math.prod(shape) * per
                piece, weight = weight[:end], weight[end:]
                pieces.append(piece.reshape(-1, rows, per).transpose(0, 1))
            own = torch.cat(pieces) if pieces else weight.new_zeros(0, math.prod(shape), per)
            # the channels of a word side by side; for Winograd's algorithm it has one
            own = own.reshape(size, *shape, per).movedim(-1, 2).flatten(1, 2)
            own = untransformed(own) if kind == WINOGRAD else own
            inputs, own = _channels_of(words, own, channels, per) if per > 1 else (words, own)
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


def _channels_of(words: Tensor, weight: Tensor, channels: int, per: int) -> tuple[Tensor, Tensor]:
    """The channels in `words` that there are, and their weights."""
    inputs = (words[:, None] * per + torch.arange(per, device=words.device)).flatten()
    there = inputs < channels
    return inputs[there], weight[:, there]


def packed(weights: Sequence[Tensor], block: int) -> Tensor:
    """The weights of groups, each `[f, c, kh, kw]`, as the kernel takes them, flat.

    Block by block of filters, `[c/p * kh * kw, filters of the block, p]` each, where p channels
    share a word.
    """
    per = channels_in_a_word(weights[0].dtype)
    pieces = [
        _channels_last(piece.detach(), per).flatten(1, -2).transpose(0, 1).flatten()
        for weight in weights
        for piece in torch.split(weight, rows_of_blocks(len(weight), block, per))
    ]
    return torch.cat(pieces)


def _channels_last(weight: Tensor, per: int) -> Tensor:
    """`[f, c, ...]` to `[f, c/p, ..., p]`."""
    filters, channels, *others = weight.shape
    return weight.reshape(filters, channels // per, per, *others).movedim(2, -1)


def channels_in_a_word(dtype: torch.dtype) -> int:
    """How many channels share 32 bits where the weights are of this type."""
    return 2 if dtype == torch.bfloat16 else 1


def rows_of_blocks(filters: int, block: int, per: int = 1) -> list[int]:
    """How many filters the blocks of a group have: as few blocks as can be, of even sizes.

    Where `per` channels share a word, all but the last have a multiple of it.
    """
    count, words = -(-filters // block), -(-filters // per)
    rows = [(words // count + (i < words % count)) * per for i in range(count)]
    return [*rows[:-1], rows[-1] - (words * per - filters)] if rows else []
