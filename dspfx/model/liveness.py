"""The liveness of a prepared model under its present masks, and how masks are set."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dspfx.layers.gated import gated_layers
from dspfx.layers.gates import ChannelGate
from dspfx.model.analysed import analyse_prepared
from dspfx.model.module import PreparedModule
from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Gate, Mix
from dspfx.passes.analysis.liveness import Liveness, ReadLists, liveness
from dspfx.passes.transforms.grouped_masks import GroupedMask, grouped_masks
from dspfx.passes.transforms.plan import CompactionPlan


def current_reads(
    prepared: PreparedModule, analysis: ChannelAnalysis, masks: Mapping[str, Tensor] | None = None
) -> dict[str, ReadLists]:
    """What the gated layers read under `masks`, else under the masks they have."""
    given = masks or {}
    layers = gated_layers(prepared)
    return {
        op.layer: ReadLists.masked(
            op, given.get(op.layer, layers[op.layer].gate.mask).cpu().numpy()
        )
        for op in analysis.ops.values()
        if isinstance(op, Mix) and op.gated
    }


def present_liveness(prepared: PreparedModule) -> tuple[ChannelAnalysis, Liveness]:
    """The analysis of `prepared`, and its liveness under the masks and gates that it has."""
    analysis = analyse_prepared(prepared)
    alive = {
        name: module.alive.cpu().numpy()
        for name, module in prepared.named_modules()
        if isinstance(module, ChannelGate)
    }
    reads = current_reads(prepared, analysis)
    return analysis, liveness(analysis, reads, alive, prepared.asked.round_to)


def arranged_masks(
    prepared: PreparedModule, analysis: ChannelAnalysis, planned: CompactionPlan
) -> tuple[GroupedMask, ...]:
    """The masks of `prepared`, sorted as `planned` stores filters and channels."""
    layers = gated_layers(prepared)
    masks = {name: layer.gate.mask.cpu().numpy() for name, layer in layers.items()}
    return grouped_masks(analysis, planned, masks)


def apply_reads(prepared: PreparedModule, analysis: ChannelAnalysis, live: Liveness) -> None:
    """Write masks and channel gates, consequences drawn, into `prepared`."""
    layers = gated_layers(prepared)
    masks: dict[str, Tensor] = {}
    for node, op in analysis.ops.items():
        if isinstance(op, Mix) and op.gated:
            own = live.reads[op.layer]
            closed = ReadLists(own.row, live.reads_live(node, op)).mask(op)
            mask = torch.from_numpy(closed)
            # a layer that is called twice reads what either call finds alive
            masks[op.layer] = mask | masks.get(op.layer, torch.zeros_like(mask))
        elif isinstance(op, Gate):
            gate = prepared.get_submodule(op.gate)
            assert isinstance(gate, ChannelGate)
            gate.set_alive(torch.from_numpy(~live.zero[node]))
    for name, mask in masks.items():
        layers[name].gate.set_mask(mask)
