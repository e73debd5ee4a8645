"""`report`: what a prepared or compact model is made of, layer by layer."""

from dataclasses import dataclass

from tabulate import tabulate
from torch import nn

from dspfx.errors import ConvertError
from dspfx.masks import present_liveness
from dspfx.module import CompactModule, PreparedModule
from dspfx.passes.cost import Cost
from dspfx.passes.plan import plan
from dspfx.passes.summary import LayerSummary, Summary, summarise

WIDEST_GROUPS = 32


@dataclass(frozen=True)
class Report:
    """The layers of a model, what they cost and what they would cost dense; `str` is a table.

    Attributes:
        layers: every convolution and linear layer, in the order of execution.
        before, after: cost of the whole model for one sample, dense and pruned.
        gated_before, gated_after: of its gated layers alone, the figure papers report.
        declined: (node, reason) of every node that keeps its inputs at full width.
        notes: what was decided without being asked.
    """

    layers: tuple[LayerSummary, ...]
    before: Cost
    after: Cost
    gated_before: Cost
    gated_after: Cost
    declined: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

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
        totals = tabulate(
            [
                ("whole model, MACs", *_row(self.before.macs, self.after.macs)),
                ("whole model, parameters", *_row(self.before.parameters, self.after.parameters)),
                ("gated layers only, MACs", *_row(self.gated_before.macs, self.gated_after.macs)),
            ],
            ("", "before", "after", "kept"),
            disable_numparse=True,
            colalign=("left", "right", "right", "right"),
        )
        full = [f"kept at full width: {node}: {reason}" for node, reason in self.declined]
        return "\n".join([table, "", totals, *full, *self.notes])


def report(model: nn.Module) -> Report:
    """The report of a prepared model as it is masked now, or of a compact one.

    MACs are multiply-accumulates of convolutions and linear layers for one sample of the example
    inputs; parameters include those of norms, before they are folded.

    Raises:
        ConvertError: `model` comes from neither `dspfx.prepare` nor `dspfx.convert`.
    """
    if isinstance(model, CompactModule):
        return _report(model.summary, ())
    if isinstance(model, PreparedModule):
        return _report(_summary(model), model.notes)
    raise ConvertError(
        f"{type(model).__name__} is neither prepared nor compact; call dspfx.prepare(model) first"
    )


def _summary(prepared: PreparedModule) -> Summary:
    analysis, live = present_liveness(prepared)
    with prepared.evaluation_view() as view:
        return summarise(analysis, live, plan(view, analysis, live))


def _report(summary: Summary, notes: tuple[str, ...]) -> Report:
    gated = [layer for layer in summary.layers if layer.gated]
    nothing = Cost(0, 0)
    return Report(
        summary.layers,
        summary.before,
        summary.after,
        sum((layer.before for layer in gated), nothing),
        sum((layer.after for layer in gated), nothing),
        tuple((d.node, d.reason) for d in summary.declined),
        notes,
    )


def _change(before: int, after: int) -> str:
    return str(before) if before == after else f"{before} -> {after}"


def _inputs(layer: LayerSummary) -> str:
    text = " ".join(str(count) for count in layer.inputs[1]) or "0"
    return text if len(text) <= WIDEST_GROUPS else f"{text[:WIDEST_GROUPS]}..."


def _row(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", f"{after / before:.2%}" if before else "-"
