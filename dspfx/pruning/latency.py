"""How long a pruned network is likely to take, from the times of its layers.

Layers are timed whole and at smaller shares of their weights, see `dspfx.pruning.layer_times`.
Between these shares times are interpolated; layers that are not timed are taken to need as long for
a multiply-accumulate as the others. What is between the layers does not shrink as they do: whole
networks that were measured, see `dspfx.pruning.whole_times`, say what a model takes whose layers
promise so much; between them it is interpolated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from torch.fx.node import Node

from dspfx.model.analysed import analyse_prepared
from dspfx.model.liveness import present_liveness
from dspfx.model.module import PreparedModule
from dspfx.model.parts import Part
from dspfx.passes.analysis.channel_ops import ChannelAnalysis
from dspfx.passes.analysis.cost import Cost, layer_costs
from dspfx.passes.analysis.liveness import Liveness
from dspfx.pruning.budget import Budget
from dspfx.pruning.layer_times import SHARES, layer_times
from dspfx.utils.distributed import Processes

MOST_BELOW = 10.0  # how much cheaper than on average a multiply-accumulate may seem
LEAST_SAVED = 0.05  # of what layers save, a network is taken to save as much at least
SAME = 0.01  # promises that are no further apart are averaged


@dataclass(frozen=True)
class LatencyTable:
    """The times of the layers of one prepared module.

    Attributes:
        analysis: of its graph.
        before: the cost of every layer, whole.
        times: seconds of the layers that were timed, at each of `SHARES`, by the node's name.
        own_inputs: by the name of a gated layer, what share of the time that is saved where its
            inputs go from the whole network is saved where its groups alone drop them; 1 for those
            that are not in it.
    """

    analysis: ChannelAnalysis
    before: dict[Node, Cost]
    times: Mapping[str, Sequence[float]] = field(default_factory=dict)
    own_inputs: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def blank(module: PreparedModule) -> "LatencyTable":
        """A table of `module` without times."""
        analysis = analyse_prepared(module)
        return LatencyTable(analysis, layer_costs(analysis))

    @property
    def a_mac(self) -> float:
        """Seconds of a multiply-accumulate of the layers that were not timed."""
        timed = sum(cost.macs for node, cost in self.before.items() if node.name in self.times)
        return sum(own[-1] for own in self.times.values()) / timed if timed else 1.0

    def predict(self, live: Liveness | None = None) -> float:
        """The seconds of all layers together: dense, or what is left under `live`."""
        costs, a_mac = layer_costs(self.analysis, live), self.a_mac
        return sum(self._takes(node, cost.macs, a_mac) for node, cost in costs.items())

    def seconds_a_mac(self, live: Liveness) -> dict[Node, float]:
        """What a multiply-accumulate more, or less, takes of every layer where it is at present.

        Measured times are noisy: it is the slope from half to twice of what is alive.
        """
        costs, a_mac = layer_costs(self.analysis, live), self.a_mac
        return {node: self._slope(node, cost.macs, a_mac) for node, cost in costs.items()}

    def _slope(self, node: Node, macs: float, a_mac: float) -> float:
        whole = self.before[node].macs
        less, more = macs / 2, min(2 * macs, whole)
        if more <= less:
            return a_mac
        slope = (self._takes(node, more, a_mac) - self._takes(node, less, a_mac)) / (more - less)
        return max(slope, a_mac / MOST_BELOW)

    def _takes(self, node: Node, macs: float, a_mac: float) -> float:
        if node.name not in self.times:
            return macs * a_mac
        share = macs / max(1, self.before[node].macs)
        return float(np.interp(share, (0.0, *SHARES), (0.0, *self.times[node.name])))


@dataclass(frozen=True)
class Latency:
    """What fraction of its time a model takes, by the times of the layers of all its parts.

    Attributes:
        tables: of the parts.
        measured: pairs: what fraction was left of the time of the layers, and of the whole model's.
    """

    tables: tuple[LatencyTable, ...]
    measured: tuple[tuple[float, float], ...] = ()

    @staticmethod
    def of(parts: Sequence[Part], budget: Budget, processes: Processes) -> "Latency | None":
        """Measure the layers of `parts`, or remember them; None if `budget` is of something else.

        Raises:
            BudgetError: the engine of the budget is not there, or has not its precision.
        """
        if budget.latency is None:
            return None
        tables = []
        for part in parts:
            blank = LatencyTable.blank(part.module)
            measure = partial(layer_times, part.module, blank.analysis, budget)
            found = processes.of_first(measure)
            tables.append(replace(blank, times=found.times, own_inputs=found.own_inputs))
        return Latency(tuple(tables))

    def predict(self, lives: Sequence[Liveness]) -> float:
        """What fraction of the dense model's time is left under `lives` of all parts."""
        promised = self._promised(lives)
        points = sorted([(1.0, 1.0), *self.measured])
        lowest, fraction = points[0]
        if promised >= lowest:
            xs, ys = zip(*points, strict=True)
            return float(np.interp(promised, xs, np.maximum.accumulate(ys)))
        if lowest == 1.0:
            return promised
        slope = max(LEAST_SAVED, (1 - fraction) / (1 - lowest))
        return fraction - slope * (lowest - promised)

    def corrected(self, modules: Sequence[PreparedModule], measured: float) -> "Latency":
        """With what was `measured` of `modules`, the parts, as they are masked now."""
        promised = self._promised([present_liveness(module)[1] for module in modules])
        if promised >= 1 - SAME:
            return self
        near = [point for point in self.measured if abs(point[0] - promised) <= SAME]
        others = [point for point in self.measured if point not in near]
        mean = np.mean([(promised, measured), *near], axis=0)
        return replace(self, measured=(*others, (float(mean[0]), float(mean[1]))))

    def _promised(self, lives: Sequence[Liveness]) -> float:
        """The fraction that is left of the time of all layers."""
        pairs = zip(self.tables, lives, strict=True)
        dense = sum(table.predict() for table in self.tables)
        return sum(table.predict(live) for table, live in pairs) / dense

    def on(self, parts: Sequence[Part]) -> "Latency":
        """The same for copies of the parts."""
        blank = (LatencyTable.blank(part.module) for part in parts)
        pairs = zip(blank, self.tables, strict=True)
        tables = (replace(b, times=own.times, own_inputs=own.own_inputs) for b, own in pairs)
        return replace(self, tables=tuple(tables))

    def state(self) -> dict[str, Any]:
        """All that was measured, as plain values."""
        return {
            "times": [dict(table.times) for table in self.tables],
            "own_inputs": [dict(table.own_inputs) for table in self.tables],
            "measured": [list(point) for point in self.measured],
        }

    def with_state(self, state: Mapping[str, Any]) -> "Latency":
        """As it was when `state` was taken."""
        kept = zip(self.tables, state["times"], state["own_inputs"], strict=True)
        tables = (replace(table, times=times, own_inputs=own) for table, times, own in kept)
        points = tuple((float(promised), float(own)) for promised, own in state["measured"])
        return Latency(tuple(tables), points)
