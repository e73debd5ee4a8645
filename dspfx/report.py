"""`report`: what a prepared or compact model is made of, layer by layer."""

from dataclasses import dataclass, replace
from typing import Any

from tabulate import tabulate
from torch import nn

from dspfx.masks import present_liveness
from dspfx.module import PreparedModule
from dspfx.parts import compact_parts_of, full_name, parts_of
from dspfx.passes.cost import Cost, together
from dspfx.passes.cost_model import CPU
from dspfx.passes.plan import plan
from dspfx.passes.summary import LayerSummary, Summary, summarise
from dspfx.passes.values import Declined
from dspfx.records import to_json

WIDEST_GROUPS = 32
MOST_NAMES = 3


@dataclass(frozen=True)
class Report:
    """The layers of a model, what they cost and what they would cost dense; `str` is a table.

    Attributes:
        layers: every convolution and linear layer, in the order of execution.
        before, after: cost of the whole model for one sample, dense and pruned.
        emitted: of the forms that its layers are emitted in, zero weights included.
        gated_before, gated_after: of its gated layers alone, the figure papers report.
        declined: the nodes that keep their inputs at full width, and why.
        notes: what was decided without being asked.
        gathers: the index selections that a compact model makes in a call.
        prepared: whether the table says what could be pruned, as it does of a prepared model.
    """

    layers: tuple[LayerSummary, ...]
    before: Cost
    after: Cost
    emitted: Cost
    gated_before: Cost
    gated_after: Cost
    declined: tuple[Declined, ...]
    notes: tuple[str, ...]
    gathers: int
    prepared: bool

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                _change(*layer.filters),
                len(layer.inputs[1]) if layer.gated else "",
                f"{layer.inputs[0]} -> {_inputs(layer)}",
                f"{layer.before.macs:,}",
                f"{layer.after.macs:,}",
            )
            for layer in self.layers
        ]
        header = ("layer", "filters", "groups", "inputs of each group", "MACs before", "after")
        table = tabulate(
            rows, header, disable_numparse=True, colalign=("left",) * 4 + ("right",) * 2
        )
        emitted = "whole model, MACs as emitted", *_row(self.before.macs, self.emitted.macs)
        totals = tabulate(
            [
                ("whole model, MACs", *_row(self.before.macs, self.after.macs)),
                ("whole model, parameters", *_row(self.before.parameters, self.after.parameters)),
                ("gated layers only, MACs", *_row(self.gated_before.macs, self.gated_after.macs)),
                *([] if self.prepared else [emitted]),
            ],
            ("", "before", "after", "kept"),
            disable_numparse=True,
            colalign=("left", "right", "right", "right"),
        )
        full = [f"kept at full width: {declined}" for declined in self.declined]
        possible = [self._possible(), ""] if self.prepared else []
        gathers = [] if self.prepared else [f"gathers left: {self.gathers}"]
        return "\n".join([table, "", *possible, totals, *gathers, *full, *self.notes])

    def as_json(self) -> dict[str, Any]:
        """The same as plain values: dicts, lists, numbers and strings."""
        plain: dict[str, Any] = to_json(self)
        return plain

    def _possible(self) -> str:
        """What of every layer could be pruned, with what it is coupled, and why not."""
        rows = [
            (
                layer.name,
                "yes" if layer.gated else "no",
                f"{layer.free} of {layer.filters[0]}",
                _shortened(layer.coupled),
                _reasons(layer),
            )
            for layer in self.layers
        ]
        header = ("layer", "gated", "free filters", "coupled with", "why not")
        return tabulate(rows, header, disable_numparse=True)


def report(model: nn.Module) -> Report:
    """The report of a prepared model as it is masked now, or of a compact one.

    MACs are multiply-accumulates of convolutions and linear layers for one sample of the example
    inputs; parameters include those of norms, before they are folded. Of a model in parts, only
    the parts are counted.

    Raises:
        ConvertError: `model` comes from neither `dspfx.prepare` nor `dspfx.convert`.
    """
    compact = compact_parts_of(model)
    if compact:
        return _joined([(name, module.summary) for name, module in compact], (), prepared=False)
    parts = parts_of(model)
    notes = tuple(note for part in parts for note in part.module.notes)
    summaries = [(part.name, _summary(part.module)) for part in parts]
    return _joined(summaries, notes, prepared=True)


def _summary(prepared: PreparedModule) -> Summary:
    analysis, live = present_liveness(prepared)
    with prepared.evaluation_view() as view:
        planned = plan(view, analysis, live, CPU)
        return summarise(analysis, live, planned, prepared.left_alone, prepared.lines)


def _joined(summaries: list[tuple[str, Summary]], notes: tuple[str, ...], prepared: bool) -> Report:
    """The summaries of the parts of a model, under their full names."""
    layers = [
        replace(
            layer,
            name=full_name(part, layer.name),
            coupled=tuple(full_name(part, other) for other in layer.coupled),
        )
        for part, summary in summaries
        for layer in summary.layers
    ]
    gated = [layer for layer in layers if layer.gated]
    return Report(
        tuple(layers),
        together(summary.before for _, summary in summaries),
        together(summary.after for _, summary in summaries),
        together(summary.emitted for _, summary in summaries),
        together(layer.before for layer in gated),
        together(layer.after for layer in gated),
        tuple(
            replace(declined, node=full_name(part, declined.node))
            for part, summary in summaries
            for declined in summary.declined
        ),
        notes,
        sum(summary.gathers for _, summary in summaries),
        prepared,
    )


def _shortened(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:MOST_NAMES])
    return shown if len(names) <= MOST_NAMES else f"{shown} and {len(names) - MOST_NAMES} more"


def _reasons(layer: LayerSummary) -> str:
    """Why a layer has no gate, and what keeps its filters in place."""
    reasons = [layer.why_not] if layer.why_not else []
    if layer.pin is not None:
        reasons.append(f"filters stay: {layer.pin}")
    return "; ".join(reasons)


def _change(before: int, after: int) -> str:
    return str(before) if before == after else f"{before} -> {after}"


def _inputs(layer: LayerSummary) -> str:
    text = " ".join(str(count) for count in layer.inputs[1]) or "0"
    return text if len(text) <= WIDEST_GROUPS else f"{text[:WIDEST_GROUPS]}..."


def _row(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", f"{after / before:.2%}" if before else "-"
