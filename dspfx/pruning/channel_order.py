"""The channels of a model in an order in which they go, whole, in widths that are multiples."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from torch import Tensor
from torch.fx.node import Node

from dspfx.layers.parametrised import weight_of
from dspfx.model.module import PreparedModule
from dspfx.model.parts import Part
from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Mix
from dspfx.passes.analysis.liveness import Liveness, ReadLists, liveness
from dspfx.passes.analysis.removable import pinned_classes
from dspfx.pruning.multiples import multiple_of
from dspfx.utils.arrays import BoolArray, FloatArray, IntArray, any_along


@dataclass(frozen=True)
class ChannelOrder(ABC):
    """A prepared module whose channels go in an order, whole.

    Attributes:
        module, analysis, name, resolution: see `PrunablePart`.
        lost: `[classes]`, the threshold at which a class goes, at most 1; infinite for those that
            stay.
        widths: see `width_of`, of what each layer writes and reads.
        liked: what widths should be multiples of, if they are wide enough and the model is not
            asked for others.
    """

    module: PreparedModule
    analysis: ChannelAnalysis
    name: str
    lost: FloatArray
    widths: tuple[IntArray, ...]
    resolution: float = field(default=0.0, kw_only=True)
    liked: int = field(default=1, kw_only=True)

    @abstractmethod
    def reads_at(self, threshold: float) -> dict[str, ReadLists]:
        """What the gated layers read at `threshold`, apart from whole channels that are gone."""

    def liveness(self, threshold: float) -> Liveness:
        """The liveness where all that goes up to `threshold` is gone."""
        round_to = self.module.asked.round_to
        steps = [_step(width, round_to, self.liked) for width in self.widths]
        gone = classes_gone(self.lost, threshold, self.widths, steps)
        reads = self.reads_at(threshold)
        for node, op in self.analysis.ops.items():
            if isinstance(op, Mix) and op.gated:
                reads[op.layer] = without(reads[op.layer], self.analysis, node, op, gone)
        return liveness(self.analysis, reads, round_to=round_to)

    def last_to_go(self, threshold: float) -> Sequence[int]:
        """The coupling classes that go at `threshold` and were there before; the last first."""
        gone = np.flatnonzero((self.lost > 0) & (self.lost <= threshold))
        last: list[int] = gone[np.argsort(-self.lost[gone], kind="stable")].tolist()
        return last

    def sparing(self, stays: Sequence[int]) -> Self:
        """The same order, in which the classes `stays` go at no threshold."""
        lost = self.lost.copy()
        lost[list(stays)] = np.inf
        return replace(self, lost=lost)


def classes_gone(
    lost: FloatArray, threshold: float, widths: Sequence[IntArray], steps: Sequence[int]
) -> BoolArray:
    """`[classes]`: those with `lost` up to `threshold`, fewer where `widths` shall be multiples.

    A layer's own groups are emitted as wide as the widest, and shall all be so.
    """
    gone: BoolArray = lost <= threshold
    for width, step in zip(widths, steps, strict=True):
        if step == 1:
            continue
        wanted = -(-int((~gone[width]).sum(1).max()) // step) * step
        for own in width[any_along(~gone[width], 1)]:
            # the most important of those that go come back
            back = own[gone[own]]
            missing = wanted - (len(own) - len(back))
            gone[back[np.argsort(-lost[back], kind="stable")][:missing]] = False
    return gone


def _step(width: IntArray, asked: int, liked: int) -> int:
    """What the number of channels of a side, see `width_of`, should be a multiple of."""
    return asked if asked > 1 else multiple_of(liked, width.shape[1])


@dataclass(frozen=True)
class Side:
    """The filters of a layer that has a weight, or its inputs: the classes of the channels."""

    mix: Mix
    classes: IntArray
    writes: bool


def width_of(side: Side) -> IntArray:
    """Int `[S, n]`: the classes of a side, of each group that the layer has of its own."""
    classes = np.unique(side.classes)
    if len(classes) < len(side.classes):
        return classes[None]
    return side.classes.reshape(side.mix.structural_groups, -1)


def sides(part: Part, analysis: ChannelAnalysis) -> Iterator[Side]:
    """Both sides of every call of a layer that has a weight."""
    for node, op in analysis.ops.items():
        if not isinstance(op, Mix):
            continue
        if not isinstance(weight_of(part.module.get_submodule(op.layer)), Tensor):
            continue
        yield Side(op, analysis.class_of(node), writes=True)
        if not op.full_width:
            yield Side(op, analysis.class_of(op.operands[0]), writes=False)


def tied(sides: Sequence[Side], asked: int, liked: int) -> Iterator[IntArray]:
    """The classes that go together: of each structural group that is as narrow as a step.

    A layer with groups of its own would be left whole otherwise, or its groups just as slow. What
    a group reads and writes goes with it.
    """
    by_layer: dict[str, list[Side]] = {}
    for side in sides:
        by_layer.setdefault(side.mix.layer, []).append(side)
    for own in by_layer.values():
        groups = own[0].mix.structural_groups
        narrow = [len(side.classes) // groups <= _step_of(side, asked, liked) for side in own]
        wide = [len(side.classes) > groups for side in own]
        if groups > 1 and all(narrow) and all(wide):
            for group in range(groups):
                parts = [side.classes.reshape(groups, -1)[group] for side in own]
                yield np.unique(np.concatenate(parts))


def _step_of(side: Side, asked: int, liked: int) -> int:
    return asked if asked > 1 else multiple_of(liked, len(side.classes))


def removable(analysis: ChannelAnalysis, sides: list[Side], importance: FloatArray) -> BoolArray:
    """`[classes]`: those that can go, for all their writers or all their readers are gated.

    The most important channel of each side stays, and what is pinned.
    """
    written, read = np.zeros(len(importance), bool), np.zeros(len(importance), bool)
    free_writers, free_readers = written.copy(), read.copy()
    stays = np.zeros(len(importance), bool)
    for side in sides:
        classes = side.classes
        (written if side.writes else read)[classes] = True
        if not side.mix.gated:
            (free_writers if side.writes else free_readers)[classes] = True
        if len(classes):
            stays[classes[importance[classes].argmax()]] = True
    stays[list(pinned_classes(analysis, {}))] = True
    removable: BoolArray = ((written & ~free_writers) | (read & ~free_readers)) & ~stays
    return removable


def without(
    reads: ReadLists, analysis: ChannelAnalysis, node: Node, op: Mix, gone: BoolArray
) -> ReadLists:
    """`reads` of a layer without the channels that are `gone`, written or read."""
    row = np.where(gone[analysis.class_of(node)], -1, reads.row)
    if op.full_width:
        return ReadLists(row, reads.lists)
    return ReadLists(row, reads.lists & ~gone[analysis.class_of(op.operands[0])])
