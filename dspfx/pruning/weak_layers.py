"""Layers that pruning has closed or nearly closed: the first suspects where accuracy collapses.

One narrow layer limits all that follows it, however wide the rest is (layer collapse: Tanaka,
Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively conserving synaptic
flow", NeurIPS 2020). Of the gated layers, these are weak:

1. Gone: no filter is left. In a residual network its branch writes nothing any more.
2. Narrow: at most one filter, or `SMALL` of its filters, is left, of at least `MANY`.
3. Starved: the same of the input channels that any of its filters reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dspfx.layers.gated import gated_layers
from dspfx.layers.parametrised import weight_of
from dspfx.model.liveness import present_liveness
from dspfx.model.parts import full_name, parts_of
from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Mix
from dspfx.passes.analysis.liveness import Liveness
from dspfx.utils.arrays import any_along

SMALL = 0.05
MANY = 8
MOST_NAMES = 6
REMEDY = (
    "raise the budget, let PrepareConfig(ignore=...) leave these layers alone, or ask for fewer "
    "groups"
)


@dataclass(frozen=True)
class WeakLayer:
    """A layer that hardly lets anything through.

    Attributes:
        name: of the layer.
        kept: the share of its filters or inputs that is left, whichever is smaller.
        why: what is left of what, in words.
    """

    name: str
    kept: float
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def weak_layers(part: str, analysis: ChannelAnalysis, live: Liveness) -> Iterator[WeakLayer]:
    """The weak layers of the part of a model that is called `part`, under `live`."""
    for node, op in analysis.ops.items():
        if not isinstance(op, Mix) or not op.gated:
            continue
        filters = int((live.kept[node] & ~live.zero[node]).sum()) if node in live.kept else 0
        read = 0
        if filters:
            rows = live.reads[op.layer].row[live.kept[node]]
            read = int(any_along(live.reads_live(node, op)[rows[rows >= 0]], 0).sum())
        name = full_name(part, op.layer)
        if not filters or not read:
            yield WeakLayer(name, 0.0, "no filter is left, the branch it is in writes nothing")
        elif _little(filters, op.filters):
            yield WeakLayer(name, filters / op.filters, f"{filters} of {op.filters} filters left")
        elif _little(read, op.channels):
            yield WeakLayer(name, read / op.channels, f"reads {read} of {op.channels} channels")


def weak_layers_of(prepared: nn.Module) -> list[WeakLayer]:
    """The weak layers of a prepared model under the masks that it has."""
    return [
        layer
        for part in parts_of(prepared)
        for layer in weak_layers(part.name, *present_liveness(part.module))
    ]


def in_words(weak: list[WeakLayer]) -> tuple[str, ...]:
    """A warning of `weak` that says what to do; none if there are none."""
    if not weak:
        return ()
    count = "one layer is" if len(weak) == 1 else f"{len(weak)} layers are"
    return (f"{count} nearly closed: {named(weak)}; if accuracy does not come back, {REMEDY}",)


def named(weak: list[WeakLayer]) -> str:
    """The weakest first, a few of them by name."""
    worst = [str(layer) for layer in sorted(weak, key=lambda layer: layer.kept)]
    rest = len(worst) - MOST_NAMES
    return ", ".join(worst[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def suspects(prepared: nn.Module) -> list[str]:
    """The layers that may be why a prepared model has stopped working, and what is odd in them."""
    odd = [
        f"{name} (holds NaN or infinite weights)"
        for name, layer in gated_layers(prepared).items()
        if not torch.isfinite(weight_of(layer)).all()
    ]
    weak = weak_layers_of(prepared)
    return [*odd, *([named(weak)] if weak else [])]


def _little(left: int, of: int) -> bool:
    return of >= MANY and left <= max(1, int(SMALL * of))
