"""Runs whose values hold several channels in each word of 32 bits: two in bfloat16.

A word has channels that follow each other. A group of filters reads whole words, with zeros for
the weights of channels that it does not read, so channels are ordered such that those which the
same groups read share words, wherever the order is free.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dspfx.layers.native import packing
from dspfx.layers.native.channel_order import in_new_order
from dspfx.layers.native.packing import POOLS, Layer, channels_in_a_word

Group = tuple[Tensor, Tensor, Tensor]  # see `Layer.groups`


def in_words(
    layers: Sequence[Layer],
    bias: Tensor,
    block: int,
    inputs: int,
    outputs: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, str]:
    """Weight, bias, indices and description of a run in `dtype`.

    Args:
        layers: of a run, in float32.
        bias: of all of them, flat.
        block: the most filters of a block.
        inputs: how many values the run is given.
        outputs: the values that it returns.
        dtype: bfloat16.
    """
    biases = list(torch.split(bias, [layer.filters.numel() for layer in layers]))
    layers, biases = in_new_order(layers, biases, inputs, outputs, channels_in_a_word(dtype))
    weights: list[Tensor] = []
    numbers, text = [torch.tensor([block])], []
    for layer in layers:
        groups = _whole_words(layer, channels_in_a_word(dtype))
        settings = [number for setting in layer.settings for number in setting]
        kind = layer.kind if layer.kind in POOLS else packing.CONVOLUTION
        count = layer.filters.numel()
        read = [kind, layer.source, layer.residual, len(groups), count]
        text.append([*read, *settings, layer.activation])
        if kind in POOLS:
            continue
        sizes = [(len(filters), len(words)) for filters, words, _ in groups]
        numbers += [torch.tensor([layer.channels]), torch.tensor(sizes).flatten()]
        numbers += [filters for filters, *_ in groups] + [words for _, words, _ in groups]
        if layer.added is not None:
            numbers += [torch.tensor([layer.addends]), layer.added]
        weights += [weight.to(dtype) for *_, weight in groups]
    indices = torch.cat([own.to(torch.int64) for own in numbers])
    return packing.packed(weights, block), torch.cat(biases), indices, packing.as_text(text)


def _whole_words(layer: Layer, per: int) -> list[Group]:
    """The groups with the words that they read, those of equal ones together."""
    together: dict[tuple[int, ...], list[Group]] = {}
    for filters, inputs, weight in layer.groups:
        words = torch.unique(inputs // per)
        place = torch.searchsorted(words, inputs // per) * per + inputs % per
        whole = weight.new_zeros(len(filters), len(words) * per, *layer.settings[0])
        whole.index_add_(1, place, weight)  # a channel that is read twice is read once
        together.setdefault(tuple(words.tolist()), []).append((filters, words, whole))
    return [_joined(groups, per) for groups in together.values()]


def _joined(groups: Sequence[Group], per: int) -> Group:
    """One group, whose filters that share a word of the output follow each other."""
    filters, weight = (torch.cat([group[i] for group in groups]) for i in (0, 2))
    order = torch.from_numpy(_whole_first(filters.numpy(), per))
    return filters[order], groups[0][1], weight[order]


def _whole_first(filters: np.ndarray, per: int) -> np.ndarray:
    """The order of `filters` in which those come first that fill words."""
    _, word, size = np.unique(filters // per, return_inverse=True, return_counts=True)
    return np.lexsort((filters, size[word] < per))
