"""The order in which channels and inputs of groups go: by what the loss says, over what they cost.

Costs are marginal, at what is alive at present: of a coupling class, what all layers spend on
writing and reading it; of a channel of a group, what the group's filters spend on reading it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch.fx.node import Node

from dspfx.budget import Budget
from dspfx.gates import gated_layers
from dspfx.masks import present_liveness
from dspfx.module import PreparedModule
from dspfx.parts import Part
from dspfx.passes.liveness import Liveness, ReadLists, liveness
from dspfx.passes.values import BoolArray, ChannelAnalysis, FloatArray, IntArray, Mix
from dspfx.prune import PrunableLayer
from dspfx.prune_channels import classes_gone, removable, sides, without
from dspfx.sensitivity import Sensitivity


@dataclass(frozen=True)
class SensitivePart:
    """A prepared module whose channels and inputs of groups are ordered together.

    Attributes:
        module, analysis, name: see `PrunablePart`.
        masks: bool `[O, C/S]` of the gated layers at present.
        layers: the order of the inputs of groups.
        lost: `[classes]`, the order of whole channels; infinite for those that stay.
        widths: the classes of the channels that each layer writes or reads.
    """

    module: PreparedModule
    analysis: ChannelAnalysis
    name: str
    masks: dict[str, BoolArray]
    layers: dict[str, PrunableLayer]
    lost: FloatArray
    widths: tuple[IntArray, ...]

    def liveness(self, threshold: float) -> Liveness:
        """The liveness where all that comes before `threshold` in the order is gone."""
        round_to = self.module.config.round_to
        gone = classes_gone(self.lost, threshold, self.widths, round_to)
        reads = {name: self._reads(name, threshold) for name in self.layers}
        for node, op in self.analysis.ops.items():
            if isinstance(op, Mix) and op.gated:
                reads[op.layer] = without(reads[op.layer], self.analysis, node, op, gone)
        return liveness(self.analysis, reads, round_to=round_to)

    def _reads(self, name: str, threshold: float) -> ReadLists:
        layer = self.layers[name]
        wanted = layer.reads(threshold, self.module.config.round_to).mask(layer.mix)
        return ReadLists.masked(layer.mix, wanted & self.masks[name])


def sensitive_parts(
    parts: Iterable[Part], sensitivities: Iterable[Sensitivity], budget: Budget, groups: bool
) -> list[SensitivePart]:
    """The order of everything in all parts, by sensitivity over cost, as shares of its number."""
    made = [
        _unordered(part, sensitivity, budget.macs is not None, groups)
        for part, sensitivity in zip(parts, sensitivities, strict=True)
    ]
    scores = [a for part in made for a in (part.lost, *_channels(part))]
    everything = np.concatenate([a.ravel() for a in scores])
    order = np.argsort(everything, kind="stable")[: int(np.isfinite(everything).sum())]
    everything[order] = np.arange(1, len(order) + 1) / max(len(order), 1)
    ends = np.cumsum([a.size for a in scores])[:-1]
    for array, ranks in zip(scores, np.split(everything, ends), strict=True):
        array[...] = ranks.reshape(array.shape)
    return made


def _channels(part: SensitivePart) -> list[FloatArray]:
    return [layer.lost_channels for layer in part.layers.values()]


def _unordered(part: Part, sensitivity: Sensitivity, macs: bool, groups: bool) -> SensitivePart:
    """A part with scores in place of the order."""
    analysis, live = present_liveness(part.module)
    both = list(sides(part, analysis, None))
    own = sensitivity.classes.cpu().numpy()
    cost = np.zeros(len(own))
    costs: dict[str, FloatArray] = {}  # [O, C], of a gated layer
    mixes: dict[str, Mix] = {}
    for node, op in analysis.ops.items():
        if not isinstance(op, Mix):
            continue
        each = op.taps * op.positions if macs else op.taps
        matrix = _alive(live, node, op)
        cost += np.bincount(analysis.class_of(node), matrix.sum(1) * each, len(own))
        if not op.restored:
            inputs = analysis.class_of(op.operands[0])
            cost += np.bincount(inputs, matrix.sum(0) * each, len(own))
        if op.gated:
            mixes[op.layer] = op
            costs.setdefault(op.layer, np.zeros(matrix.shape))
            costs[op.layer] += matrix * float(each)
    may_go = removable(analysis, both, own) & ~sensitivity.unseen.cpu().numpy() & (cost > 0)
    lost = np.full(len(own), np.inf)
    lost[may_go] = own[may_go] / cost[may_go]
    masks, layers = {}, {}
    for name, layer in gated_layers(part.module).items():
        masks[name] = layer.gate.mask.cpu().numpy()
        op = mixes[name]
        seen = groups and name not in sensitivity.unseen_layers
        values = sensitivity.groups[name].cpu().numpy()
        assignment = layer.gate.assignment.cpu().numpy()
        channels = _scores(op, values, costs[name], assignment, seen)
        alive = layer.gate.alive.cpu().numpy()
        layers[name] = PrunableLayer(op, assignment, channels, np.full(op.filters, np.inf), alive)
    widths = tuple(np.unique(side.classes) for side in both)
    return SensitivePart(part.module, analysis, part.name, masks, layers, lost, widths)


def _alive(live: Liveness, node: Node, op: Mix) -> BoolArray:
    """Bool `[O, C]`: what the kept filters of a call read of what is alive."""
    reads = live.reads[op.layer]
    kept = live.kept.get(node, np.zeros(op.filters, bool)) & (reads.row >= 0)
    alive: BoolArray = live.reads_live(node, op)[reads.row] & kept[:, None]
    return alive


def _scores(
    op: Mix, values: FloatArray, costs: FloatArray, assignment: IntArray, seen: bool
) -> FloatArray:
    """`[S, G, C/S]`: sensitivity over cost; infinite for the best of a group, and all not seen."""
    structural, groups, width = values.shape
    members = np.eye(groups)[assignment].reshape(structural, -1, groups)
    split = costs.reshape(structural, -1, structural, width)
    by_structure = split[np.arange(structural), :, np.arange(structural)]  # [S, O/S, C/S]
    cost = np.einsum("sog,soc->sgc", members, by_structure)
    scores = np.full(values.shape, np.inf)
    if not seen:
        return scores
    scores[cost > 0] = values[cost > 0] / cost[cost > 0]
    best = np.where(cost > 0, values, -1.0).argmax(-1)
    np.put_along_axis(scores, best[..., None], np.inf, -1)
    return scores
