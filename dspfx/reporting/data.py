"""What there is to show of a model, as plain data; text, page and pictures are drawn from it."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from dspfx.passes.analysis.channel_ops import Declined
from dspfx.passes.analysis.cost import Cost
from dspfx.passes.transforms.grouped_masks import GroupedMask
from dspfx.passes.transforms.summary import LayerSummary


@dataclass(frozen=True)
class ReportData:
    """The fields of `dspfx.Report`, which says what they are."""

    model: str
    layers: tuple[LayerSummary, ...]
    masks: tuple[GroupedMask, ...] = field(repr=False)
    before: Cost
    after: Cost
    emitted: Cost
    gated_before: Cost
    gated_after: Cost
    declined: tuple[Declined, ...]
    notes: tuple[str, ...]
    gathers: int
    prepared: bool
    dtype: str
    parameter_bytes: int

    def to_rows(self) -> list[dict[str, Any]]:
        """A dict of plain values for each layer; a data frame takes the list as it is."""
        return [_row(layer) for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """All but the masks, which `dspfx.get_masks` has, as plain values.

        MACs are multiply-accumulates of one sample, `bytes` what the parameters take.
        """
        emitted = None if self.prepared else asdict(self.emitted)
        return {
            "model": self.model,
            "prepared": self.prepared,
            "dtype": self.dtype,
            "before": self._sized(self.before),
            "after": self._sized(self.after),
            "emitted": emitted,
            "gated_before": asdict(self.gated_before),
            "gated_after": asdict(self.gated_after),
            "gathers": None if self.prepared else self.gathers,
            "layers": self.to_rows(),
            "declined": [asdict(declined) for declined in self.declined],
            "notes": list(self.notes),
        }

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def bytes_of(self, cost: Cost) -> int:
        """What the parameters of `cost` take."""
        return cost.parameters * self.parameter_bytes

    def _sized(self, cost: Cost) -> dict[str, int]:
        return {**asdict(cost), "bytes": self.bytes_of(cost)}


def _row(layer: LayerSummary) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "gated": layer.gated,
        "filters_before": layer.filters[0],
        "filters_after": layer.filters[1],
        "inputs_before": layer.inputs[0],
        "inputs_of_groups": list(layer.inputs[1]),
        "macs_before": layer.before.macs,
        "macs_after": layer.after.macs,
        "macs_emitted": layer.emitted.macs,
        "parameters_before": layer.before.parameters,
        "parameters_after": layer.after.parameters,
        "free_filters": layer.free,
        "coupled": list(layer.coupled),
        "why_not": layer.why_not or None,
        "pin": None if layer.pin is None else str(layer.pin),
    }
