"""How long a pruned network is likely to take, from measured layers.

Every convolution and linear layer is timed whole and at smaller shares of its weights, two groups
of filters that read overlapping channels, in its fastest form; on the own kernel as part of a run.
Between these shares times are interpolated; layers that are not timed, depthwise ones for instance,
are taken to need as long for a multiply-accumulate as the others.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx.node import Node

from dspfx.compile import compile
from dspfx.convert import convert
from dspfx.layers.gated import gated_layers
from dspfx.layers.group_conv import GroupConvRun
from dspfx.layers.parametrised import weight_of
from dspfx.layers.weights import TRANSPOSED
from dspfx.model.analysed import analyse_prepared, fitting_inputs
from dspfx.model.module import PreparedModule
from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Mix
from dspfx.passes.analysis.cost import Cost, layer_costs
from dspfx.passes.analysis.liveness import Liveness
from dspfx.passes.lowering.emit import like
from dspfx.passes.lowering.forms import Group, dense
from dspfx.passes.lowering.measure import Measured
from dspfx.passes.lowering.sites import Site
from dspfx.pruning.masks import set_masks
from dspfx.utils.distributed import Processes
from dspfx.utils.timing import medians

SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
UNION = 1.5  # how many channels two groups read together, compared to one
MOST_BELOW = 10.0  # how much cheaper than on average a multiply-accumulate may seem


@dataclass(frozen=True)
class LatencyTable:
    """The times of the layers of one prepared module.

    Attributes:
        analysis: of its graph.
        before: the cost of every layer, whole.
        times: seconds of the layers that were timed, at each of `SHARES`, by the node's name.
        a_mac: seconds of a multiply-accumulate of the others.
    """

    analysis: ChannelAnalysis
    before: dict[Node, Cost]
    times: Mapping[str, Sequence[float]]
    a_mac: float

    @staticmethod
    def of(module: PreparedModule, processes: Processes) -> "LatencyTable":
        """Measure the layers of `module` for its example inputs, or remember them."""
        blank = LatencyTable.blank(module)
        return blank.with_times(processes.of_first(lambda: _times(module, blank.analysis)))

    @staticmethod
    def blank(module: PreparedModule) -> "LatencyTable":
        """A table of `module` without times."""
        analysis = analyse_prepared(module)
        return LatencyTable(analysis, layer_costs(analysis), {}, 1.0)

    def with_times(self, times: Mapping[str, Sequence[float]]) -> "LatencyTable":
        """A copy with other times."""
        timed = sum(cost.macs for node, cost in self.before.items() if node.name in times)
        a_mac = sum(own[-1] for own in times.values()) / timed if timed else 1.0
        return replace(self, times=times, a_mac=a_mac)

    def predict(self, live: Liveness | None = None) -> float:
        """The seconds of all layers together: dense, or what is left under `live`."""
        costs = layer_costs(self.analysis, live)
        return sum(self._takes(node, cost.macs) for node, cost in costs.items())

    def seconds_a_mac(self, live: Liveness) -> dict[Node, float]:
        """What a multiply-accumulate more, or less, takes of every layer where it is at present.

        Measured times are noisy: it is the slope from half to twice of what is alive.
        """
        costs = layer_costs(self.analysis, live)
        return {node: self._slope(node, cost.macs) for node, cost in costs.items()}

    def _slope(self, node: Node, macs: float) -> float:
        whole = self.before[node].macs
        less, more = macs / 2, min(2 * macs, whole)
        if more <= less:
            return self.a_mac
        slope = (self._takes(node, more) - self._takes(node, less)) / (more - less)
        return max(slope, self.a_mac / MOST_BELOW)

    def _takes(self, node: Node, macs: float) -> float:
        if node.name not in self.times:
            return macs * self.a_mac
        share = macs / max(1, self.before[node].macs)
        return float(np.interp(share, (0.0, *SHARES), (0.0, *self.times[node.name])))


def _times(module: PreparedModule, analysis: ChannelAnalysis) -> dict[str, tuple[float, ...]]:
    """The seconds of every layer that can be timed, by its node's name, at each of `SHARES`."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    measured = Measured(device)
    seconds = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for node, op in analysis.ops.items():
            if isinstance(op, Mix) and _can_be_timed(module, op):
                shape = analysis.values[op.operands[0]].shape
                sites = [_site(module, op, torch.Size(shape), share) for share in SHARES]
                seconds[node.name] = tuple(_fastest(site, measured) for site in sites)
    measured.save()
    return seconds


def measured_fraction(modules: Sequence[PreparedModule]) -> float:
    """The time of `modules` as they are masked, over that without masks, converted and compiled."""
    before = after = 0.0
    for module in modules:
        dense_twin = deepcopy(module)
        whole = {n: torch.ones_like(g.gate.mask) for n, g in gated_layers(module).items()}
        set_masks(dense_twin, whole)
        calls = dict(_compiled(module, dense_twin))
        times = medians(calls)
        before, after = before + times["dense"], after + times["pruned"]
    return after / before


def _compiled(pruned: PreparedModule, whole: PreparedModule) -> Iterator[tuple[str, Any]]:
    for name, module in (("pruned", pruned), ("dense", whole)):
        inputs = fitting_inputs(module)
        yield name, partial(compile(convert(module, verify=False), inputs), *inputs)


def _can_be_timed(module: PreparedModule, op: Mix) -> bool:
    layer: Any = module.get_submodule(op.layer)
    known = isinstance(layer, nn.Linear | nn.Conv2d) and not isinstance(layer, TRANSPOSED)
    return known and op.structural_groups == 1 and not op.full_width


def _site(module: PreparedModule, op: Mix, shape: torch.Size, share: float) -> Site:
    """The layer at about `share` of its weights."""
    layer: Any = module.get_submodule(op.layer)
    side = math.sqrt(share)
    reads = max(1, round(op.channels * side))
    channels = min(op.channels, max(reads, round(op.channels * side * UNION)))
    filters = max(1, round(op.filters * side))
    own: torch.Tensor = weight_of(layer)
    weight = own.new_zeros(filters, channels, *own.shape[2:])
    half = max(1, filters // 2)
    groups = [Group(np.arange(half), np.arange(reads))]
    if half < filters:
        groups.append(Group(np.arange(half, filters), np.arange(channels - reads, channels)))
    for group in groups:
        weight[torch.from_numpy(group.filters)[:, None], torch.from_numpy(group.inputs)] = 1.0
    plain = like(layer, weight, None, 1)
    linear = isinstance(layer, nn.Linear)
    size = (*shape[:-1], channels) if linear else (shape[0], channels, *shape[2:])
    with torch.no_grad():
        output = plain(torch.empty(size, dtype=weight.dtype, device=weight.device)).shape
    return Site(op.layer, plain, weight, None, tuple(groups), torch.Size(size), output)


def _fastest(site: Site, measured: Measured) -> float:
    modules = {"dense": site.emit(dense(site.groups))}
    own = site.emit_native()
    if own is not None:
        run = GroupConvRun([own], [(0, -1)], 1, [1])
        modules |= {"native": run, "Winograd": run.transformed(run.transformable())}
    return min(measured(modules, site.example()).values())
