"""`report`: what a prepared or compact model is made of, layer by layer, and how it is shown.

Everything there is to show is in a `Report`, plain data: the text, the page and the picture are
drawn from it, and nothing else is looked at.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from dspfx.engines.report import CompileReport
from dspfx.model.liveness import arranged_masks, present_liveness
from dspfx.model.module import CompactModule, PreparedModule
from dspfx.model.parts import compact_parts_of, full_name, parts_of
from dspfx.passes.analysis.channel_ops import Declined
from dspfx.passes.analysis.cost import Cost, together
from dspfx.passes.lowering.cost_model import CPU
from dspfx.passes.sandbox.calls import parameter_dtype_and_device
from dspfx.passes.transforms.emitted import broken_ties
from dspfx.passes.transforms.grouped_masks import GroupedMask
from dspfx.passes.transforms.plan import plan
from dspfx.passes.transforms.summary import NOT_PRUNABLE, Summary, summarise
from dspfx.reporting.data import ReportData
from dspfx.reporting.text import text_of
from dspfx.reporting.text import together as by_reason
from dspfx.utils.wrappers import unwrapped

PartSummary = tuple[str, Summary, tuple[GroupedMask, ...]]
Noted = tuple[PartSummary, tuple[str, ...]]


@dataclass(frozen=True)
class Report(ReportData):
    """The layers of a model, what they cost and what they would cost dense; `str` is a table.

    Attributes:
        model: the name of its class.
        layers: every call of a convolution or linear layer, in the order of execution.
        masks: of the gated ones, in that order, see `GroupedMask`; `dspfx.plot` draws them.
        before, after: cost of the whole model for one sample, dense and pruned.
        emitted: of the forms that its layers are emitted in, zero weights included.
        gated_before, gated_after: of its gated layers alone, the figure papers report.
        declined: the nodes that keep their inputs at full width, and why.
        notes: what was decided without being asked, and which layers of a quantised model compute
            with floating point.
        gathers: the index selections that a compact model makes in a call.
        prepared: whether the table says what could be pruned, as it does of a prepared model.
        dtype: of the parameters, for instance `float32`.
        parameter_bytes: that each of them takes.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> report = dspfx.report(dspfx.convert(prepared))
        >>> report.emitted.macs == report.before.macs  # nothing was pruned
        True
        >>> print(str(report).splitlines()[0].split()[:3])
        ['layer', 'filters', 'groups']
    """

    def __str__(self) -> str:
        return text_of(self)

    def to_html(
        self, path: str | os.PathLike[str], *, measured: CompileReport | None = None
    ) -> None:
        """Write one page that needs nothing else: the picture, the totals, tables and reasons.

        It works in any browser, light or dark, on paper and on a phone; there is no script in it.

        Args:
            path: of the file, which is replaced in one step when all is written.
            measured: `compiled.report` of what `dspfx.compile` returned, to show its times too.

        Raises:
            PlotError: matplotlib is missing, which draws the picture, or the file cannot be
                written.
        """
        from dspfx.reporting.page import write_page  # noqa: PLC0415

        write_page(self, path, measured)


def report(model: nn.Module) -> Report:
    """The report of a prepared model as it is masked now, or of a compact one.

    MACs are multiply-accumulates of convolutions and linear layers for one sample of the example
    inputs; parameters include those of norms, before they are folded. Of a model in parts, the MACs
    around the parts are counted, which stay, and parameters of the parts alone.

    Raises:
        ConvertError: `model` comes from neither `dspfx.prepare` nor `dspfx.convert`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> report = dspfx.report(prepared)
        >>> [layer.name for layer in report.layers if layer.gated]
        ['1', '2']
        >>> report.after == report.before  # nothing is pruned yet
        True
    """
    compact = compact_parts_of(model)
    if compact:
        found = [(name, module.summary, module.grouped_masks) for name, module in compact]
        return _joined(model, found, _quantised(compact), prepared=False)
    parts = parts_of(model)
    noted = [_part(part.name, part.module) for part in parts]
    notes = tuple(note for _, own in noted for note in own)
    return _joined(model, [part for part, _ in noted], notes, prepared=True)


def _quantised(parts: list[tuple[str, CompactModule]]) -> tuple[str, ...]:
    """How many layers compute with integers, and why others do not; nothing if none is to."""
    rounded = [(name, part.quantization.places) for name, part in parts if part.quantization]
    if not rounded:
        return ()
    count = sum(len(places.layers) for _, places in rounded)
    kept = [
        Declined(full_name(part, layer), why)
        for part, places in rounded
        for layer, why in places.kept.items()
    ]
    lines = [f"in float32: {line}" for line in by_reason(kept)]
    return f"{count} layers compute with integers of 8 bits", *lines


def _part(name: str, prepared: PreparedModule) -> Noted:
    analysis, live = present_liveness(prepared)
    with prepared.evaluation_view() as view:
        planned = plan(view, analysis, live, CPU)
        summary = summarise(analysis, live, planned, prepared.left_alone, prepared.lines)
    part = name, summary, arranged_masks(prepared, analysis, planned)
    return part, (*prepared.notes, *broken_ties(analysis, planned))


def _joined(
    model: nn.Module, parts: list[PartSummary], notes: tuple[str, ...], prepared: bool
) -> Report:
    """The parts of a model, under their full names."""
    layers = [
        replace(
            layer,
            name=_named(part, layer.name),
            coupled=tuple(full_name(part, other) for other in layer.coupled),
        )
        for part, summary, _ in parts
        for layer in summary.layers
    ]
    summaries = [summary for _, summary, _ in parts]
    gated = [layer for layer in layers if layer.gated]
    dtype, _ = parameter_dtype_and_device(model)
    return Report(
        model=type(unwrapped(model)).__name__,
        layers=tuple(layers),
        masks=tuple(
            replace(mask, name=full_name(part, mask.name)) for part, _, own in parts for mask in own
        ),
        before=together(summary.before for summary in summaries),
        after=together(summary.after for summary in summaries),
        emitted=together(summary.emitted for summary in summaries),
        gated_before=_total((layer.name, layer.before) for layer in gated),
        gated_after=_total((layer.name, layer.after) for layer in gated),
        declined=tuple(
            replace(declined, node=full_name(part, declined.node))
            for part, summary, _ in parts
            for declined in summary.declined
        ),
        notes=notes,
        gathers=sum(summary.gathers for summary in summaries),
        prepared=prepared,
        dtype=str(dtype).removeprefix("torch."),
        parameter_bytes=dtype.itemsize,
    )


def _named(part: str, name: str) -> str:
    prefix = NOT_PRUNABLE if name.startswith(NOT_PRUNABLE) else ""
    return prefix + full_name(part, name.removeprefix(prefix))


def _total(costs: Iterable[tuple[str, Cost]]) -> Cost:
    """MACs of every call, parameters once for every layer; see `passes.analysis.cost.total`."""
    calls = list(costs)
    parameters = {name: cost.parameters for name, cost in calls}
    return Cost(sum(cost.macs for _, cost in calls), sum(parameters.values()))
