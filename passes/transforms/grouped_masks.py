"""The masks of gated layers, sorted as the compact network stores them, as plain data to draw.

1. A group is what the lowering knows as one: the kept filters that read the same channels.
2. Groups come in the order in which their first filters are stored; so do the filters in each.
3. Input channels come in the order in which the layer is given them. Those that are not kept are
   left out; those that are there but that no group reads are others' to read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Mix
from dspfx.passes.analysis.liveness import ReadLists
from dspfx.passes.lowering.forms import groups_of
from dspfx.passes.transforms.plan import CompactionPlan
from dspfx.utils.arrays import BoolArray

Channels = tuple[int, ...]


@dataclass(frozen=True)
class MaskGroup:
    """Filters that read the same input channels; both by their original numbers."""

    filters: Channels
    inputs: Channels


@dataclass(frozen=True)
class GroupedMask:
    """What is left of one call of a gated layer.

    Attributes:
        name: of the layer.
        filters, channels: how many filters and input channels it had.
        held: the input channels that it is given, in their order, by their original numbers.
        groups: its filters, in their order; none where nothing is left of the layer.
    """

    name: str
    filters: int
    channels: int
    held: Channels
    groups: tuple[MaskGroup, ...]


def grouped_masks(
    analysis: ChannelAnalysis, plan: CompactionPlan, masks: Mapping[str, BoolArray]
) -> tuple[GroupedMask, ...]:
    """One for every call of a gated layer, in the order of the graph.

    Args:
        analysis: of the evaluation graph.
        plan: computed, or read from a file.
        masks: of the gated layers by name, bool `[O, C/S]`, with their consequences drawn.
    """
    found = []
    for node, op in analysis.ops.items():
        if not isinstance(op, Mix) or not op.gated:
            continue
        held: Channels = ()
        groups: list[MaskGroup] = []
        if node in plan.layers:
            stored = plan.layers[node]
            reads = ReadLists.masked(op, masks[op.layer])
            place = np.arange(len(stored.filters))
            own = groups_of(place, reads.row[stored.filters], reads.lists[:, stored.inputs])
            held = tuple(stored.inputs.tolist())
            groups = [
                MaskGroup(
                    tuple(stored.filters[group.filters].tolist()),
                    tuple(stored.inputs[group.inputs].tolist()),
                )
                for group in own
            ]
        found.append(GroupedMask(op.layer, op.filters, op.channels, held, tuple(groups)))
    return tuple(found)
