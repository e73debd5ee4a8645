"""The order of channels inside a run, such that those which the same groups read share words.

Channels of what a run is given and of what it returns stay where they are, as do those that pools
hand on to it. Others are paired greedily: each with that of the others whose readers differ by the
fewest products; pairs are paired again where more than two share a word.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dspfx.layers.native.packing import POOLS, Layer
from dspfx.utils.arrays import FloatArray, IntArray


def in_new_order(
    layers: Sequence[Layer],
    biases: Sequence[Tensor],
    inputs: int,
    outputs: Sequence[int],
    per: int,
) -> tuple[list[Layer], list[Tensor]]:
    """The layers, and their biases, with channels between them in a better order.

    Args:
        layers, biases: of a run.
        inputs: how many values the run is given.
        outputs: the values that it returns.
        per: channels in a word.
    """
    like = _of_one_order(layers, inputs)
    fixed = {like[number] for number in (*range(inputs), *outputs)}
    order: dict[int, Tensor] = {}  # by what `like` says: the old channel of each new one
    for number, layer in enumerate(layers, inputs):
        if like[number] == number and number not in fixed:
            readers = [own for own in layers if like[own.source] == number]
            order[number] = torch.from_numpy(_paired(layer, readers, per))
    place = {number: torch.argsort(old) for number, old in order.items()}
    changed = []
    for number, layer in enumerate(layers, inputs):
        new, source = place.get(number), place.get(like[layer.source])
        groups = tuple(
            (
                filters if new is None else new[filters],
                read if source is None else source[read],
                weight,
            )
            for filters, read, weight in layer.groups
        )
        added = layer.added
        if added is not None and (moved := place.get(like[layer.residual])) is not None:
            added = torch.where(added >= 0, moved[added.clamp(min=0)], -1)
        if added is not None and number in order:
            added = added[order[number]]
        changed.append(replace(layer, groups=groups, added=added))
    moved_biases = [
        bias[order[number]] if number in order else bias
        for number, bias in enumerate(biases, inputs)
    ]
    return changed, moved_biases


def _of_one_order(layers: Sequence[Layer], inputs: int) -> list[int]:
    """Of each value the first one whose channels are in the same order: pools keep it."""
    like = list(range(inputs))
    for number, layer in enumerate(layers, inputs):
        like.append(like[layer.source] if layer.kind in POOLS else number)
    return like


def _paired(layer: Layer, readers: Sequence[Layer], per: int) -> IntArray:
    """The channels that `layer` writes in an order in which `per` that follow share a word."""
    count = layer.filters.numel()
    reads: list[FloatArray] = [np.zeros((0, count))]
    for reader in readers:
        for filters, inputs, _ in reader.groups:
            row = np.zeros((1, count))
            row[0, inputs.numpy()] = np.sqrt(len(filters) * np.prod(reader.settings[0]))
            reads.append(row)
    for filters, _, _ in layer.groups:  # of equal ones, those that the same group writes
        row = np.zeros((1, count))
        row[0, filters.numpy()] = 1e-3
        reads.append(row)
    units = [np.array([channel]) for channel in range(count)]
    signature = np.concatenate(reads).T
    size = 1
    while size < per:
        pairs, rest = _pairs(signature)
        units = [np.concatenate([units[a], units[b]]) for a, b in pairs] + [units[i] for i in rest]
        joined = [np.maximum(signature[a], signature[b]) for a, b in pairs]
        signature = np.stack([*joined, *(signature[i] for i in rest)]) if units else signature
        size *= 2
    return np.concatenate([*units, np.zeros(0, int)]).astype(int)


def _pairs(signature: FloatArray) -> tuple[list[tuple[int, int]], list[int]]:
    """Rows with that of the rows left which is closest, and the one that is left over."""
    square = (signature**2).sum(1)
    distance = square[:, None] + square[None] - 2 * signature @ signature.T
    np.fill_diagonal(distance, np.inf)
    free = np.ones(len(signature), bool)
    pairs = []
    for row in range(len(signature)):
        if not free[row] or free.sum() < 2:
            continue
        other = int(np.where(free, distance[row], np.inf).argmin())
        free[[row, other]] = False
        pairs.append((row, other))
    return pairs, [int(i) for i in np.flatnonzero(free)]
