"""The analysis of a prepared module, made once and kept as long as it holds.

A graph is executed and analysed again only if its form has changed: its nodes, the modules that
they call, shapes and types, what was asked for. What an analysis says of the values of parameters,
such as which biases are zero, is looked up again each time (`Findings`). Masks are no part of it.

Nothing is kept of a graph that calls a user's own code, which may depend on anything.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.layers.gates import ChannelGate, FilterGate
from dspfx.model.module import CompactModule, PreparedModule
from dspfx.passes.analysis.agreement import SizeFacts
from dspfx.passes.analysis.channel_ops import ChannelAnalysis
from dspfx.passes.analysis.channels import analyse
from dspfx.passes.analysis.execution import Execution
from dspfx.passes.analysis.state import Findings
from dspfx.passes.sandbox.calls import fresh, parameter_dtype_and_device
from dspfx.passes.sandbox.state import only_reads, state_kept, written_by
from dspfx.utils.pytree import leaves, map_leaves

_PLAIN = (bool, int, float, str, tuple, type(None), torch.dtype)


@dataclass(frozen=True)
class Analysed:
    """An analysis, the form of the module it is of, and what it has found out from values."""

    form: tuple[Any, ...]
    analysis: ChannelAnalysis
    findings: Findings


def analyse_prepared(prepared: PreparedModule) -> ChannelAnalysis:
    """The analysis of the evaluation graph, whose nodes are the keys of the result."""
    inputs = fitting_inputs(prepared)
    with _sandboxed(prepared) as analyse_on:
        form = _form(prepared, inputs)
        kept: Analysed | None = prepared.analysed
        if kept is not None and kept.form == form and kept.findings.hold():
            return kept.analysis
        findings = Findings()
        analysis = analyse_on(inputs, prepared.size_facts, None, findings)
        repeatable = _calls_no_other_code(prepared)
    prepared.analysed = Analysed(form, analysis, findings) if repeatable else None
    return analysis


Analyser = Callable[[Any, SizeFacts, Execution | None, Findings | None], ChannelAnalysis]


@contextmanager
def _sandboxed(prepared: PreparedModule) -> Iterator[Analyser]:
    """What analyses the evaluation graph on an example, whose nodes are the same in all results."""
    with prepared.evaluation_view() as view, state_kept(prepared, written=written_by(view)):
        frozen, rules = prepared.frozen, prepared.asked.rules
        whole, samples = prepared, prepared.samples

        def analyse_on(inputs: Any, facts: SizeFacts, *rest: Any) -> ChannelAnalysis:
            found = analyse(view, inputs, frozen, rules, facts, whole, samples, *rest)
            return replace(found, fixed=replace(found.fixed, outside=prepared.outside))

        yield analyse_on


def analyse_executions(
    prepared: PreparedModule, facts: SizeFacts, executions: list[tuple[Any, Execution]]
) -> list[ChannelAnalysis]:
    """The analyses of the evaluation graph, given `facts`, on inputs that it was executed on."""
    with _sandboxed(prepared) as analyse_on:
        return [analyse_on(inputs, facts, execution, None) for inputs, execution in executions]


def fitting_inputs(module: PreparedModule | CompactModule) -> tuple[Any, ...]:
    """Copies of the example inputs of `module`, as its present dtype and device want them."""
    fitted: tuple[Any, ...] = map_leaves(fitting(module), fresh(module.example_inputs))
    return fitted


def fitting(module: nn.Module) -> Callable[[Any], Any]:
    """What brings a tensor to the present dtype and device of `module`, and leaves the rest."""
    dtype, device = parameter_dtype_and_device(module)

    def fit(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else None)

    return fit


def _form(prepared: PreparedModule, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that an analysis depends on but for values of tensors; comparable by `==`."""
    graph = prepared.graphs[False]
    nodes = tuple((node, node.op, node.target, node.args, node.kwargs) for node in graph.nodes)
    modules = tuple(
        (name, id(module), _settings(module))
        for name, module in prepared.named_modules(remove_duplicate=False)
        if name  # it is not its own
    )
    first: dict[int, str] = {}
    tensors = tuple(
        (name, first.setdefault(id(x), name), isinstance(x, nn.Parameter), *_kind(x))
        for name, x in (
            *prepared.named_parameters(remove_duplicate=False),
            *prepared.named_buffers(remove_duplicate=False),
        )
    )
    given = tuple(_kind(x) if isinstance(x, Tensor) else (type(x), x) for x in leaves(inputs))
    asked = prepared.asked, prepared.frozen, prepared.size_facts, prepared.samples, prepared.outside
    return nodes, modules, tensors, given, asked


def _kind(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), x.dtype, x.device


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """The plain attributes of a module, such as a stride, but for its mode."""
    if isinstance(module, FilterGate | ChannelGate):
        return (type(module),)  # masks are no part of an analysis
    own = vars(module).items()
    plain = [(name, x) for name, x in own if isinstance(x, _PLAIN) and name != "training"]
    return type(module), tuple(plain)


def _calls_no_other_code(prepared: PreparedModule) -> bool:
    """Whether the graph calls no modules but torch's and ours, and nobody taught it rules."""
    calls = prepared.graphs[False].find_nodes(op="call_module")
    called = {str(node.target) for node in calls}
    inside = (part for name in called for part in prepared.get_submodule(name).modules())
    return not prepared.asked.rules and all(map(only_reads, inside))
