"""Masks that leave out nothing that is emitted anyway.

Where groups do not pay, a layer is emitted as fewer of them, or dense: all that any of its groups
reads is read by all, and the budget counts it. What only the masks made zero there is opened again,
unless it was pruned before: it costs nothing, and is worth something.
"""

import numpy as np

from dspfx.layers.gated import gated_layers
from dspfx.model.module import PreparedModule
from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Mix
from dspfx.passes.analysis.liveness import Liveness, ReadLists, liveness
from dspfx.passes.transforms.plan import CompactionPlan, LayerPlan
from dspfx.utils.arrays import BoolArray


def reopened(
    module: PreparedModule, analysis: ChannelAnalysis, live: Liveness, plan: CompactionPlan
) -> Liveness:
    """What is alive where filters read all that `plan` emits for them, of what they read now.

    Args:
        module: with the masks that it has so far; they are not changed.
        analysis: of its evaluation graph.
        live: under the masks that it is to have.
        plan: made for these.
    """
    gates = {name: layer.gate for name, layer in gated_layers(module).items()}
    masks: dict[str, BoolArray] = {}
    for node, op in analysis.ops.items():
        if isinstance(op, Mix) and op.gated:
            row = live.reads[op.layer].row
            own = ReadLists(row, live.reads_live(node, op)).mask(op)
            if node in plan.layers:
                own |= _emitted(op, plan.layers[node]) & own.any(1, keepdims=True)
            masks[op.layer] = own | masks.get(op.layer, np.zeros_like(own))
    mixes = {op.layer: op for op in analysis.ops.values() if isinstance(op, Mix)}
    reads = {
        name: ReadLists.masked(mixes[name], mask & gates[name].mask.cpu().numpy())
        for name, mask in masks.items()
    }
    return liveness(analysis, reads, round_to=module.asked.round_to)


def _emitted(op: Mix, layer: LayerPlan) -> BoolArray:
    """Bool `[O, C/S]`: what the filters of a layer are emitted to read."""
    groups = op.structural_groups
    inputs_each, filters_each = op.channels // groups, op.filters // groups
    found = np.zeros((op.filters, inputs_each), bool)
    for part in layer.lowering:
        for filters, inputs in zip(part.filters, part.inputs, strict=True):
            readers, read = layer.filters[filters[filters >= 0]], layer.inputs[inputs[inputs >= 0]]
            for own in np.unique(readers // filters_each):
                of_own = readers[readers // filters_each == own]
                found[np.ix_(of_own, read[read // inputs_each == own] % inputs_each)] = True
    return found
