"""From a private copy of a module to a gated graph of it."""

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dspfx.errors import PrepareError
from dspfx.layers.parametrised import why_computed
from dspfx.model.config import PrepareConfig
from dspfx.model.modes import modes_kept
from dspfx.model.module import PreparedModule
from dspfx.model.origin import TRACING, Origin
from dspfx.model.rebuilt import refuse_rebuilding
from dspfx.model.same_graph import SameGraph, positional
from dspfx.model.single import names_inside
from dspfx.passes.sandbox.calls import Call, fresh, parameter_dtype_and_device, samples_of
from dspfx.passes.tracing.insert_gates import insert_gates, plan_gates
from dspfx.passes.tracing.trace import trace


@dataclass(frozen=True)
class Task:
    """What is to be gated, and how.

    Attributes:
        config: the user's.
        frozen: names of the layers that keep all their filters and inputs.
        opaque: names of the modules that are not traced into.
        gate_first: whether layers that read the inputs directly are gated too.
        followed: linear layers whose outputs other layers read, beyond what is traced: they are
            not the last ones, though they may come last in it.
        notes: what was decided without the user, for the report.
        samples: how many the call is of, if that is not the length of its first tensor.
        tracing: see `Origin`.
    """

    config: PrepareConfig
    frozen: frozenset[str] = frozenset()
    opaque: frozenset[str] = frozenset()
    gate_first: bool = False
    followed: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    samples: float | None = None
    tracing: int = TRACING

    def within(self, prefix: str, gate_first: bool, followed: frozenset[str]) -> "Task":
        """The same for the child at the path `prefix`; `followed` are names in the model."""
        return replace(
            self,
            frozen=names_inside(self.frozen, prefix),
            opaque=names_inside(self.opaque, prefix),
            gate_first=gate_first,
            followed=names_inside(followed, prefix),
        )


def gate(
    root: nn.Module, call: Call, task: Task, expected: Any, *, prove: bool = True
) -> PreparedModule:
    """Trace `root`, a private copy, for the arguments of `call`, and put gates into it.

    With `prove` it is run, and its graph, forward and backward in training mode, where it can train
    on `call` alone.

    Args:
        expected: what it computes for `call` in evaluation mode.

    Raises:
        TraceError: it has no graph, or its graph computes something else.
        PrepareError: there is no layer to gate.
    """
    config, name = task.config, type(root).__name__
    dtype, _ = parameter_dtype_and_device(root)
    model = copy.deepcopy(root)
    leaves = frozenset(key for key in config.rules if isinstance(key, type))
    arguments = call.map(fresh).by_name(root)
    frozen_modes = _frozen_modes(root)
    traced = trace(root, arguments, task.opaque, leaves, follow_types=task.tracing > 0)
    prepared = PreparedModule(root, {False: traced.eval, True: traced.train}, name)
    prepared.example_inputs = positional(prepared.graph, call.by_name(root))
    prepared.frozen, prepared.asked = task.frozen, config
    prepared.lines, prepared.frozen_modes = traced.lines, frozen_modes
    prepared.samples, prepared.outside = float(task.samples or samples_of(call)), 0
    prepared.left_alone, prepared.notes = {}, task.notes
    asked = task.opaque, task.gate_first, dtype, task.tracing
    prepared.origin = Origin(call.map(fresh), *asked)
    analysis = SameGraph(prepared, model, call).check(expected, train=prove)
    with prepared.evaluation_view() as view:  # whatever mode the model is in
        plan = plan_gates(
            view, analysis, config.layers, task.frozen, task.gate_first, task.followed
        )
    if not plan.layers:
        raise PrepareError(
            f"{name} has no layer to prune: dspfx gates convolutions and linear layers, apart from "
            "depthwise ones, those that read the model's inputs directly, and linear layers that "
            "come last" + _hint_on_hooks(prepared)
        )
    insert_gates(prepared, set(prepared.graphs.values()), plan, config.groups)
    prepared.recompile()
    refuse_rebuilding(_entered(prepared))
    prepared.left_alone, prepared.untraced = plan.left_alone, tuple(traced.opaque)
    prepared.notes += tuple(
        f"opaque, since it cannot be traced: {child}: {why}" for child, why in traced.opaque.items()
    )
    return prepared


def _hint_on_hooks(prepared: nn.Module) -> str:
    """What to do about the first layer that a hook keeps from being gated, if there is one."""
    reasons = ((name, why_computed(module)) for name, module in prepared.named_modules())
    return next((f"; of '{name}', {why}" for name, why in reasons if why), "")


def _entered(prepared: PreparedModule) -> list[nn.Module]:
    """The modules inside `prepared` that its graphs do not call, since they were traced into."""
    graphs = prepared.graphs.values()
    names = {str(node.target) for g in graphs for node in g.find_nodes(op="call_module")}
    called = {inner for name in names for inner in prepared.get_submodule(name).modules()}
    return [module for module in prepared.modules() if module not in {*called, prepared}]


def _frozen_modes(root: nn.Module) -> frozenset[str]:
    """The modules that `root.train(True)` leaves in evaluation mode; what it freezes is frozen."""
    with modes_kept(root):
        root.train(True)
        return frozenset(name for name, module in root.named_modules() if not module.training)
