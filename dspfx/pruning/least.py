"""What could be pruned of a model at most, and what holds the rest.

1. On a copy, all channels go that may go whole, but for one of every layer; in any runtime this is
   what counts.
2. From there, all inputs of groups go but for one of every group.
3. What is left after the first of these is sorted by the reasons that hold it.

No model is of use then: these are bounds of what a budget may ask for, not advice.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from dspfx.model.liveness import apply_reads
from dspfx.model.parts import parts_of
from dspfx.passes.analysis.cost import Cost
from dspfx.passes.transforms.summary import LayerSummary
from dspfx.pruning.prune import group_parts
from dspfx.pruning.prune_channels import channel_parts
from dspfx.pruning.search import PrunablePart
from dspfx.reporting.report import report

MOST_HOLDERS, LEAST_HELD = 4, 0.001  # that are named, and the share of the MACs that each has
LAST_CHANNEL = "one channel of every layer stays"
READS_FIXED = "what it reads cannot go"


@dataclass(frozen=True)
class Holder:
    """Layers that are held by the same reason.

    Attributes:
        reason: in words.
        layers: their names.
        macs: the fraction of the dense network's MACs that they keep.
    """

    reason: str
    layers: tuple[str, ...]
    macs: float

    def __str__(self) -> str:
        count = len(self.layers)
        which = self.layers[0] if count == 1 else f"{count} layers"
        return f"{self.macs:.1%} in {which}: {self.reason}"


@dataclass(frozen=True)
class Prunable:
    """How much may go at most; `str` is what `dspfx inspect` begins with.

    Attributes:
        before: what there is.
        channels: what is left without all whole channels that may go.
        groups: what is left without all inputs of groups, too.
        holders: what holds most of `channels`, the largest first.
    """

    before: Cost
    channels: Cost
    groups: Cost
    holders: tuple[Holder, ...]

    def __str__(self) -> str:
        whole, more = (self._gone(left) for left in (self.channels, self.groups))
        lines = [
            f"{whole[0]} of the MACs, {whole[1]} of the parameters can go at most, as whole "
            "channels."
        ]
        if more != whole:
            lines.append(f"{more[0]} and {more[1]} if groups of filters drop inputs, too.")
        if self.holders:
            lines += ["What holds the rest of the MACs:", *(f"  {held}" for held in self.holders)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """These bounds as plain values."""
        return asdict(self)

    def _gone(self, left: Cost) -> tuple[str, str]:
        macs, parameters = self.before.macs or 1, self.before.parameters or 1
        return f"{1 - left.macs / macs:.1%}", f"{1 - left.parameters / parameters:.1%}"


def prunable(prepared: nn.Module) -> Prunable:
    """What could go of `prepared` beyond its present masks, which stay as they are.

    Raises:
        ConvertError: `prepared` does not come from `dspfx.prepare`.
    """
    parts_of(prepared)
    trial = copy.deepcopy(prepared)
    _drop(channel_parts(trial))
    channels = report(trial)
    _drop(group_parts(trial))
    groups = report(trial)
    holders = _holders(channels.layers, channels.before.macs)
    return Prunable(channels.before, channels.after, groups.after, holders)


def _drop(parts: Sequence[PrunablePart]) -> None:
    """Mask all that the last threshold leaves out."""
    for part in parts:
        apply_reads(part.module, part.analysis, part.liveness(1.0))


def _holders(layers: Sequence[LayerSummary], macs: int) -> tuple[Holder, ...]:
    held: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for layer in layers:
        held[_reason(layer)][layer.name] += layer.after.macs
    found = [
        Holder(
            reason, tuple(name for name, own in names.items() if own), sum(names.values()) / macs
        )
        for reason, names in held.items()
        if sum(names.values()) >= LEAST_HELD * macs > 0
    ]
    return tuple(sorted(found, key=lambda holder: -holder.macs)[:MOST_HOLDERS])


def _reason(layer: LayerSummary) -> str:
    """What keeps the most of a layer of which all has gone that can."""
    if layer.why_not and not layer.follows:
        return layer.why_not
    if layer.pin is not None:
        return layer.pin.reason
    reads = max(layer.inputs[1], default=0)
    return READS_FIXED if reads > 1 and not layer.follows else LAST_CHANNEL
