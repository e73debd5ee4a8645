"""What became of every layer, as plain data that a compact model can carry along."""

from dataclasses import dataclass

from dspfx.passes.cost import Cost, layer_costs, total
from dspfx.passes.liveness import Liveness
from dspfx.passes.plan import CompactionPlan
from dspfx.passes.values import ChannelAnalysis, Channelwise, Declined, Mix


@dataclass(frozen=True)
class LayerSummary:
    """One convolution or linear layer.

    Attributes:
        name: of the module.
        gated: whether its inputs could be pruned by groups.
        filters: before and after.
        inputs: its input channels before, and those of each group after.
        before, after: its cost for one sample.
    """

    name: str
    gated: bool
    filters: tuple[int, int]
    inputs: tuple[int, tuple[int, ...]]
    before: Cost
    after: Cost


@dataclass(frozen=True)
class Summary:
    """A whole model: its layers, its total cost before and after, and what was declined."""

    layers: tuple[LayerSummary, ...]
    before: Cost
    after: Cost
    declined: tuple[Declined, ...]


def summarise(analysis: ChannelAnalysis, live: Liveness, plan: CompactionPlan) -> Summary:
    """Collect the summary of a compaction, layer by layer in the order of the graph."""
    before, after = layer_costs(analysis), layer_costs(analysis, live)
    layers = []
    for node, op in analysis.ops.items():
        if not isinstance(op, Mix | Channelwise) or op.layer is None:
            continue
        kept = int(live.kept[node].sum()) if node in live.kept else 0
        channels = analysis.values[node].channels
        if isinstance(op, Mix):
            groups = plan.layers[node].groups if node in plan.layers else []
            inputs = op.channels, tuple(read for _, read in groups)
        else:
            inputs = channels, (kept,)
        gated = isinstance(op, Mix) and op.gated
        layers.append(
            LayerSummary(op.layer, gated, (channels, kept), inputs, before[node], after[node])
        )
    return Summary(
        tuple(layers), total(before, analysis), total(after, analysis), analysis.declined
    )
