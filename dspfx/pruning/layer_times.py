"""The times of the layers of a prepared module in an engine, at several shares of their weights.

- In the project's own kernel and torch: every convolution and linear layer as two groups of filters
  that read overlapping channels, in its fastest form; on the own kernel as part of a run.
- In an engine that reads files: with fewer filters and channels, in the multiples that it likes,
  and without what it takes to enter and leave the engine. And with half of its inputs gathered for
  each of its groups, which tells whether groups that drop inputs by themselves save time there.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dspfx.engines.engine import Engine, Precision
from dspfx.engines.engines import OWN, engines_named
from dspfx.engines.on_files import OnFiles
from dspfx.engines.one_layer import INPUT, OneLayer
from dspfx.errors import BudgetError
from dspfx.layers.gated import gated_layers
from dspfx.layers.group_conv_run import GroupConvRun
from dspfx.layers.parametrised import weight_of
from dspfx.layers.weights import TRANSPOSED
from dspfx.model.module import PreparedModule
from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Mix
from dspfx.passes.analysis.removable import pinned_classes
from dspfx.passes.lowering.emit import like
from dspfx.passes.lowering.forms import Group, dense
from dspfx.passes.lowering.measure import Measured
from dspfx.passes.lowering.sites import Site
from dspfx.pruning.budget import Budget
from dspfx.pruning.multiples import multiple_of
from dspfx.utils.timing import block

SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
UNION = 1.5  # how many channels two groups read together, compared to one
CALLS, WARM_UP = 25, 0.01  # of a layer in an engine that reads files; seconds
LEAST_OF_FILE = 0.02  # of what a file takes, its layer is taken to take as much at least


@dataclass(frozen=True)
class LayerTimes:
    """What was measured of one module; see `dspfx.pruning.latency.LatencyTable`."""

    times: dict[str, tuple[float, ...]]
    own_inputs: dict[str, float]


def engine_of(budget: Budget, device: torch.device) -> Engine:
    """The engine that `budget` is for.

    Raises:
        BudgetError: it is not there, or does not compute in the budget's precision.
    """
    (engine,) = engines_named([budget.engine])
    if why := engine.missing(device):
        raise BudgetError(f"the budget is of time in {engine.name}, but {why}")
    there = engine.precisions(device)
    if budget.precision not in there:
        raise BudgetError(
            f"{engine.name} does not compute in {budget.precision} here; it does in "
            + ", ".join(there)
        )
    return engine


def layer_times(module: PreparedModule, analysis: ChannelAnalysis, budget: Budget) -> LayerTimes:
    """The seconds of every layer that can be timed, at each of `SHARES`.

    Raises:
        BudgetError: see `engine_of`.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    measured = Measured(device)
    engine: Engine | None = None
    if budget.engine != "own" or budget.precision != "fp32":  # torch serves where it is not built
        engine = engine_of(budget, device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if isinstance(engine, OnFiles):
            found = _InEngine(module, analysis, engine, budget.precision, measured).all()
        else:
            found = LayerTimes(_in_torch(module, analysis, measured, budget), {})
    measured.save()
    return found


# -- in the own kernel and torch -----------------------------------------------------------------


def _in_torch(
    module: PreparedModule, analysis: ChannelAnalysis, measured: Measured, budget: Budget
) -> dict[str, tuple[float, ...]]:
    seconds = {}
    for node, op in analysis.ops.items():
        if isinstance(op, Mix) and _can_be_timed(module, op):
            shape = analysis.values[op.operands[0]].shape
            sites = [_site(module, op, torch.Size(shape), share) for share in SHARES]
            seconds[node.name] = tuple(_fastest(site, measured, budget) for site in sites)
    return seconds


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
    own: Tensor = weight_of(layer)
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


def _fastest(site: Site, measured: Measured, budget: Budget) -> float:
    modules = {"dense": site.emit(dense(site.groups))}
    native = site.emit_native() if budget.engine == OWN else None
    if native is not None:
        run = GroupConvRun([native], [(0, -1)], 1, [1])
        if budget.precision == "bf16":
            modules = {"native": run.in_bf16()}
        else:
            modules |= {"native": run, "Winograd": run.transformed(run.transformable())}
    return min(measured(modules, site.example()).values())


# -- in engines that read files ------------------------------------------------------------------


@dataclass(frozen=True)
class _InEngine:
    module: PreparedModule
    analysis: ChannelAnalysis
    engine: OnFiles
    precision: Precision
    measured: Measured

    def all(self) -> LayerTimes:
        """The times of all layers, and what groups save of them."""
        gates = {name: layer.gate for name, layer in gated_layers(self.module).items()}
        pinned = np.zeros(self.analysis.class_count, bool)
        pinned[list(pinned_classes(self.analysis, {}))] = True
        times: dict[str, tuple[float, ...]] = {}
        own_inputs: dict[str, float] = {}
        for node, op in self.analysis.ops.items():
            one = self._layer(op) if isinstance(op, Mix) else None
            if one is None or not isinstance(op, Mix):
                continue
            fixed = [pinned[self.analysis.class_of(x)].all() for x in (node, op.operands[0])]
            times[node.name] = self._at_shares(one, *map(bool, fixed))
            if op.gated and one.structural_groups == 1:
                groups = len(set(gates[op.layer].assignment.tolist()))
                own_inputs[op.layer] = self._saved_by_own_inputs(one, groups)
        return LayerTimes(times, own_inputs)

    def _layer(self, op: Mix) -> OneLayer | None:
        """As it is, if it can be timed."""
        layer: Any = self.module.get_submodule(op.layer)
        if isinstance(layer, TRANSPOSED) or op.full_width:
            return None
        shape = tuple(self.analysis.values[op.operands[0]].shape)
        if isinstance(layer, nn.Linear):
            return OneLayer(op.filters, op.channels, shape[:-1], None)
        if not isinstance(layer, nn.modules.conv._ConvNd):
            return None
        positions = shape[0], *shape[2:]
        groups = op.structural_groups
        return OneLayer(op.filters, op.channels, positions, _attributes(layer), groups)

    def _at_shares(
        self, one: OneLayer, filters_fixed: bool, channels_fixed: bool
    ) -> tuple[float, ...]:
        known = {0.0: 0.0, 1.0: self._seconds(one)}
        for share in SHARES[:-1]:
            smaller = self._fewer_groups(one, share)
            if one.structural_groups == 1:
                side = share if filters_fixed or channels_fixed else math.sqrt(share)
                filters = one.filters if filters_fixed else self._width(one.filters, side)
                channels = one.channels if channels_fixed else self._width(one.channels, side)
                smaller = replace(one, filters=filters, channels=channels)
            known[_weights(smaller) / _weights(one)] = self._seconds(smaller)
        shares = sorted(known)
        return tuple(map(float, np.interp(SHARES, shares, [known[share] for share in shares])))

    def _fewer_groups(self, one: OneLayer, share: float) -> OneLayer:
        """A layer with groups of its own, of which fewer are left."""
        width = one.channels // one.structural_groups
        left = max(1, self._width(one.channels, share) // width)
        filters = one.filters // one.structural_groups * left
        return replace(one, filters=filters, channels=width * left, structural_groups=left)

    def _width(self, whole: int, share: float) -> int:
        step = multiple_of(self.engine.multiple, whole)
        return min(whole, max(step, step * round(whole * share / step)))

    def _saved_by_own_inputs(self, one: OneLayer, groups: int) -> float:
        half = max(1, one.channels // 2)
        generator = np.random.default_rng(0)
        reads = tuple(
            tuple(map(int, np.sort(generator.permutation(one.channels)[:half])))
            for _ in range(groups)
        )
        whole = self._seconds(one)
        smaller, gathered = replace(one, channels=half), replace(one, reads=reads)
        if (most := whole - self._seconds(smaller)) <= 0:
            return 0.0
        return min(1.0, max(0.0, (whole - self._seconds(gathered)) / most))

    def _seconds(self, one: OneLayer) -> float:
        """Of the layer alone."""
        whole = self._of_file(one, one.file)
        around = self._of_file(one, one.around) + self._of_file(one.after(), one.after().around)
        return max(whole - around / 2, LEAST_OF_FILE * whole)

    def _of_file(self, one: OneLayer, file: Callable[[Precision], bytes]) -> float:
        def find() -> float:
            run = self.engine.opened(file(self.precision), [INPUT], self.precision)
            x = torch.randn(one.input_shape())
            return block(lambda: run([x]), CALLS, WARM_UP)

        key = f"{self.engine.version()} {self.precision} {file.__name__} {one!r}"
        return self.measured.remembered(key, find)


def _weights(one: OneLayer) -> int:
    return one.filters * one.channels // one.structural_groups


def _attributes(layer: nn.modules.conv._ConvNd) -> dict[str, tuple[int, ...]]:
    """Those of ONNX's Conv; padded with whatever, it takes as long as with zeros."""
    before, after = zip(*_padding(layer), strict=True)
    return {
        "kernel_shape": tuple(layer.kernel_size),
        "strides": tuple(layer.stride),
        "dilations": tuple(layer.dilation),
        "pads": (*before, *after),
    }


def _padding(layer: nn.modules.conv._ConvNd) -> Iterator[tuple[int, int]]:
    """Before and after each dimension."""
    if isinstance(layer.padding, str):
        for taps, dilation in zip(layer.kernel_size, layer.dilation, strict=True):
            both = dilation * (taps - 1) if layer.padding == "same" else 0
            yield both // 2, both - both // 2
        return
    for own in layer.padding:
        yield own, own
