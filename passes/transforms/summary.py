"""Summary of a compaction, layer by layer, as plain data that a compact model carries."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx
from torch.fx.node import Node

from dspfx.layers.branches import Branches
from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Channelwise, Constant, Declined, Mix
from dspfx.passes.analysis.cost import Cost, layer_costs, total
from dspfx.passes.analysis.liveness import Liveness
from dspfx.passes.analysis.removable import pinned_classes, with_lines
from dspfx.passes.transforms.emitted import emitted_costs, emitted_total
from dspfx.passes.transforms.plan import CompactionPlan

NOT_PRUNABLE = "not prunable: "
ONE_CHANNEL_EACH = "its filters read one channel each"


@dataclass(frozen=True)
class LayerSummary:
    """One convolution or linear layer, or anything else that does multiply-accumulates.

    Attributes:
        name: of the module; of what is no such layer with `NOT_PRUNABLE` before it.
        gated: whether its inputs can be pruned by groups.
        filters: before and after.
        inputs: its input channels before, and those of each group after.
        before, after: its cost for one sample.
        emitted: the cost of the form it is emitted in, with the zero weights that fill that up.
        free: how many of its filters can leave the network whole.
        coupled: the other layers that write the same channels, by addition or multiplication.
        why_not: why it has no gate; empty where it has one.
        pin: what keeps the other filters in place; None where all are free.
    """

    name: str
    gated: bool
    filters: tuple[int, int]
    inputs: tuple[int, tuple[int, ...]]
    before: Cost
    after: Cost
    emitted: Cost
    free: int
    coupled: tuple[str, ...]
    why_not: str
    pin: Declined | None

    @property
    def follows(self) -> bool:
        """Whether it needs no gate: its filters go with the channels that they read (depthwise)."""
        return not self.gated and self.why_not == ONE_CHANNEL_EACH


@dataclass(frozen=True)
class Summary:
    """A whole model: its layers, its total costs, and what was declined.

    `gathers` counts the index selections that are left in a compact model.
    """

    layers: tuple[LayerSummary, ...]
    before: Cost
    after: Cost
    emitted: Cost
    declined: tuple[Declined, ...]
    gathers: int = 0


def summarise(
    analysis: ChannelAnalysis,
    live: Liveness,
    plan: CompactionPlan,
    left_alone: Mapping[str, str],
    lines: Mapping[str, str],
) -> Summary:
    """Collect the summary of a compaction, layer by layer in the order of the graph."""
    before, after = layer_costs(analysis), layer_costs(analysis, live)
    emitted = emitted_costs(analysis, live, plan)
    pinned, writers = pinned_classes(analysis, lines), _writers(analysis)
    layers = {node: _fixed_row(node, analysis, live) for node in analysis.fixed.macs}
    for node, op in analysis.ops.items():
        if not isinstance(op, Mix | Channelwise) or op.layer is None:
            continue
        kept = int(live.kept[node].sum()) if node in live.kept else 0
        classes = analysis.class_of(node).tolist()
        if isinstance(op, Mix):
            groups = plan.layers[node].groups if node in plan.layers else ()
            inputs = op.channels, tuple(max(1, len(group.inputs)) for group in groups)
            why_not = left_alone.get(op.layer, "")
        else:
            inputs, why_not = (len(classes), (kept,)), ONE_CHANNEL_EACH
        others = {name: None for c in dict.fromkeys(classes) for name in writers[c]}
        layers[node] = LayerSummary(
            op.layer,
            isinstance(op, Mix) and op.gated,
            (len(classes), kept),
            inputs,
            before[node],
            after[node],
            emitted[node],
            free=sum(c not in pinned for c in classes),
            coupled=tuple(name for name in others if name != op.layer),
            why_not=why_not,
            pin=next((pinned[c] for c in classes if c in pinned), None),
        )
    graph = next(iter(analysis.ops)).graph
    return Summary(
        tuple(layers[node] for node in graph.nodes if node in layers),
        total(analysis),
        total(analysis, live),
        emitted_total(analysis, live, plan),
        with_lines(analysis.declined, lines),
    )


def _fixed_row(node: Node, analysis: ChannelAnalysis, live: Liveness) -> LayerSummary:
    """The summary of an operator with multiply-accumulates but no channels to prune."""
    name = str(node.target) if node.op == "call_module" else node.name
    fixed = analysis.fixed
    before = Cost(fixed.macs[node], max(0, fixed.parameters.get(node, 0)))
    op = analysis.ops.get(node)
    left = before if op is None or node in live.kept else Cost(0, 0)
    if isinstance(op, Constant):
        left = Cost(0, before.parameters)
    return LayerSummary(
        name=f"{NOT_PRUNABLE}{name}",
        gated=False,
        filters=(0, 0),
        inputs=(0, ()),
        before=before,
        after=left,
        emitted=left,
        free=0,
        coupled=(),
        why_not="it is no layer whose channels can be told apart",
        pin=None,
    )


def count_gathers(module: fx.GraphModule) -> int:
    """How many index selections a compact model makes in a call; slices are none."""
    in_graph = sum(node.target is torch.index_select for node in module.graph.nodes)
    called = [
        module.get_submodule(str(n.target)) for n in module.graph.find_nodes(op="call_module")
    ]
    branches = [layer for layer in called if isinstance(layer, Branches)]
    in_layers = sum(isinstance(own, str) for b in branches for own in (*b.inputs, b.order))
    return in_graph + in_layers


def _writers(analysis: ChannelAnalysis) -> dict[int, dict[str, None]]:
    """The layers that write to every coupling class."""
    writers: dict[int, dict[str, None]] = defaultdict(dict)
    for node, op in analysis.ops.items():
        if isinstance(op, Mix):
            for channel in np.unique(analysis.class_of(node)).tolist():
                writers[channel][op.layer] = None
    return writers
