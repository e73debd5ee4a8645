"""From a private copy of a module to a gated graph of it, and the analysis of what came out."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dspfx.errors import PrepareError, TraceError
from dspfx.layers.parametrised import why_computed
from dspfx.model.config import PrepareConfig
from dspfx.model.modes import modes_kept
from dspfx.model.module import CompactModule, PreparedModule
from dspfx.model.origin import Origin
from dspfx.model.rebuilt import refuse_rebuilding
from dspfx.model.single import names_inside
from dspfx.model.training_check import Results, difference, rounding_errors, training_pass
from dspfx.passes.analysis.agreement import SizeFacts, agree
from dspfx.passes.analysis.channel_ops import ChannelAnalysis
from dspfx.passes.analysis.channels import analyse
from dspfx.passes.sandbox.calls import Call, evaluate, fresh, parameter_dtype_and_device, samples_of
from dspfx.passes.sandbox.randomness import drawing_anew
from dspfx.passes.sandbox.sizes import (
    Place,
    Shapes,
    changed_places,
    fix_sizes,
    other_sizes,
    resized,
    shapes_of,
    shown_places,
    sizes_in_steps,
)
from dspfx.passes.sandbox.state import state_kept, written_by
from dspfx.passes.tracing.insert_gates import insert_gates, plan_gates
from dspfx.passes.tracing.trace import trace
from dspfx.utils.pytree import leaves, map_leaves, structure


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
    """

    config: PrepareConfig
    frozen: frozenset[str] = frozenset()
    opaque: frozenset[str] = frozenset()
    gate_first: bool = False
    followed: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    samples: float | None = None

    def within(self, prefix: str, gate_first: bool, followed: frozenset[str]) -> "Task":
        """The same for the child at the path `prefix`; `followed` are names in the model."""
        return replace(
            self,
            frozen=names_inside(self.frozen, prefix),
            opaque=names_inside(self.opaque, prefix),
            gate_first=gate_first,
            followed=names_inside(followed, prefix),
        )


def gate(root: nn.Module, call: Call, task: Task, *, prove: bool = True) -> PreparedModule:
    """Trace `root`, a private copy, for the arguments of `call`, and put gates into it.

    With `prove` it is run, and its graph, forward and backward in training mode, where it can train
    on `call` alone.

    Raises:
        TraceError: it has no graph, or its graph computes something else.
        PrepareError: there is no layer to gate.
    """
    config, name = task.config, type(root).__name__
    dtype, _ = parameter_dtype_and_device(root)
    expected, trained = evaluate(root, call), training_pass(root, call) if prove else None
    others = _other_calls(root, call)
    reference = None if trained is None else copy.deepcopy(root)
    leaves = frozenset(key for key in config.rules if isinstance(key, type))
    arguments = call.map(fresh).by_name(root)
    frozen_modes = _frozen_modes(root)
    traced = trace(root, arguments, task.opaque, leaves)
    prepared = PreparedModule(root, {False: traced.eval, True: traced.train}, name)
    prepared.example_inputs = _positional(prepared.graph, call.by_name(root))
    prepared.frozen, prepared.asked = task.frozen, config
    prepared.lines, prepared.frozen_modes = traced.lines, frozen_modes
    prepared.samples = float(task.samples or samples_of(call))
    prepared.left_alone, prepared.notes = {}, task.notes
    prepared.origin = Origin(call.map(fresh), task.opaque, task.gate_first, dtype)
    _check_trace(prepared, name, expected)
    if trained is not None and reference is not None:
        _check_training(prepared, name, trained, lambda: rounding_errors(reference, call))
    _settle_sizes(
        prepared, [(_positional(prepared.graph, own.by_name(root)), found) for own, found in others]
    )
    analysis = _analyse_all_sizes(prepared)
    with prepared.evaluation_view() as view:  # whatever mode the model is in
        plan = plan_gates(
            view, analysis, config.layers, task.frozen, task.gate_first, task.followed
        )
    if not plan.layers:
        raise PrepareError(
            f"{name} has no layer to prune: dspfx gates convolutions and linear layers, apart from "
            "depthwise ones, those that read the model's inputs directly, and linear layers that "
            "come last" + _of_computed(prepared)
        )
    insert_gates(prepared, set(prepared.graphs.values()), plan, config.groups)
    prepared.recompile()
    refuse_rebuilding(_entered(prepared))
    prepared.left_alone, prepared.untraced = plan.left_alone, tuple(traced.opaque)
    prepared.notes += tuple(
        f"opaque, since it cannot be traced: {child}: {why}" for child, why in traced.opaque.items()
    )
    return prepared


def _of_computed(prepared: nn.Module) -> str:
    """What to do about the first layer that a hook keeps from being gated, if there is one."""
    reasons = ((name, why_computed(module)) for name, module in prepared.named_modules())
    return next((f"; of '{name}', {why}" for name, why in reasons if why), "")


def _entered(prepared: PreparedModule) -> list[nn.Module]:
    """The modules inside `prepared` that its graphs do not call, since they were traced into."""
    graphs = prepared.graphs.values()
    names = {str(node.target) for g in graphs for node in g.find_nodes(op="call_module")}
    called = {inner for name in names for inner in prepared.get_submodule(name).modules()}
    return [module for module in prepared.modules() if module not in {*called, prepared}]


def analyse_prepared(prepared: PreparedModule) -> ChannelAnalysis:
    """The analysis of the evaluation graph, whose nodes are the keys of the result."""
    with _analyser_of(prepared) as analyse_on:
        return analyse_on(fitting_inputs(prepared), prepared.size_facts)


@contextmanager
def _analyser_of(
    prepared: PreparedModule,
) -> Iterator[Callable[[Any, SizeFacts], ChannelAnalysis]]:
    """What analyses the evaluation graph on an example, whose nodes are the same in all results."""
    with prepared.evaluation_view() as view, state_kept(prepared, written=written_by(view)):
        frozen, rules = prepared.frozen, prepared.asked.rules
        whole, samples = prepared, prepared.samples
        yield lambda inputs, facts: analyse(view, inputs, frozen, rules, facts, whole, samples)


def _analyse_all_sizes(prepared: PreparedModule) -> ChannelAnalysis:
    """The analysis of the example, with what other sizes say of it kept in `prepared`."""
    inputs = fitting_inputs(prepared)
    examples = [inputs, *(resized(inputs, shapes) for shapes in prepared.other_sizes)]
    with _analyser_of(prepared) as analyse_on:
        analysis, facts = agree(analyse_on, examples)
    prepared.size_facts = facts
    return analysis


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


def _positional(graph: fx.Graph, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments in the order of the graph's inputs, without the defaults at the end."""
    for name in [name for name in arguments if name.startswith("**")]:
        arguments |= arguments.pop(name)
    inputs: list[Any] = []
    for node in graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name.startswith("*"):
            inputs += arguments.pop(name, ())
        elif name in arguments:
            inputs.append(arguments.pop(name))
        elif arguments:
            inputs.append(node.args[0])
    return tuple(inputs)


def _other_calls(root: nn.Module, call: Call) -> list[tuple[Call, Any]]:
    """Calls of `root` with inputs of other sizes, and what it computes for them."""
    found: dict[Shapes, tuple[Call, Any]] = {}
    given = call.args, call.kwargs

    def accepts(shapes: Shapes) -> bool:
        other = Call(*resized(given, shapes))
        try:
            found[shapes] = other, evaluate(root, other)
        except Exception:
            return False
        return True

    likely = other_sizes(given, accepts)
    further = [own for own in sizes_in_steps(given) if own not in found and accepts(own)]
    return [found[shapes] for shapes in (*likely, *further)]


def _settle_sizes(prepared: PreparedModule, others: list[tuple[tuple[Any, ...], Any]]) -> None:
    """Find which of the sizes that the model takes its graph takes; refuse what it gets wrong.

    Args:
        prepared: traced, without gates; checks of sizes are put into its graphs where the code
            of the model does something else for these sizes than the graph.
        others: inputs of the graph, and what the model computes for them.
    """
    example, taken = shapes_of(prepared.example_inputs), list[Shapes]()
    shown: set[Place] = set()
    for inputs, expected in others:
        shapes = shapes_of(inputs)
        if taken and changed_places(example, shapes) <= shown:
            continue
        try:
            actual = _run_graph(prepared, inputs)
        except Exception:  # a check in the graph, made when it was traced
            continue
        if _is_same(expected, actual):
            taken.append(shapes)
            shown |= shown_places(example, shapes)
            continue
        fix_sizes(prepared.graphs.values(), prepared.example_inputs, shapes)
        prepared.recompile()
        prepared.notes += (
            f"takes inputs of the shapes {example} only, since its code does something else for "
            "other sizes than its graph",
        )
    prepared.other_sizes = tuple(taken)


def _frozen_modes(root: nn.Module) -> frozenset[str]:
    """The modules that `root.train(True)` leaves in evaluation mode; what it freezes is frozen."""
    with modes_kept(root):
        root.train(True)
        return frozenset(name for name, module in root.named_modules() if not module.training)


def _run_graph(prepared: PreparedModule, inputs: tuple[Any, ...]) -> Any:
    """What the evaluation graph computes; nothing of `prepared` changes, nor of `inputs`."""
    _, device = parameter_dtype_and_device(prepared)
    with (
        torch.no_grad(),
        state_kept(prepared),
        drawing_anew(device),
        prepared.evaluation_view() as view,
    ):
        return view.forward(*fresh(inputs))  # a call would print where it fails


def _is_same(expected: Any, actual: Any) -> bool:
    """Whether two outputs are the same, bit for bit."""
    one, other = list(leaves(expected)), list(leaves(actual))
    return len(one) == len(other) and all(map(_equal, one, other))


def _check_trace(prepared: PreparedModule, name: str, expected: Any) -> None:
    """Compare the evaluation graph's outputs for the example inputs with the model's own."""
    found = _run_graph(prepared, prepared.example_inputs)
    if structure(found) != structure(expected):
        raise TraceError(
            f"{name} returns a container that cannot be made again from its fields or items, or "
            "one that its caller changed; return a tuple, a dict or a plain dataclass. Where its "
            "code compares `type(x)`, write `isinstance`"
        )
    if not _is_same(expected, found):
        raise TraceError(
            f"the graph of {name} does not compute what the model does: its code probably "
            "compares `type(x)`, where `isinstance` is to be written, or reads a tensor after "
            "overwriting its memory under another name"
        )


def _equal(one: Any, other: Any) -> bool:
    """Whether two leaves of outputs are the same, NaN being itself."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def _check_training(
    prepared: PreparedModule, name: str, expected: Results, errors: Callable[[], dict[str, float]]
) -> None:
    """Compare a pass forward and backward of the training graph with the model's own.

    Where they differ, they may by the rounding `errors` of gradients that are zero.
    """
    actual = training_pass(prepared, Call(prepared.example_inputs))
    different = "whether it runs" if actual is None else difference(expected, actual)
    if actual is not None and different is not None:
        different = difference(expected, actual, errors())
    if different is not None:
        raise TraceError(
            f"the graph of {name} does not train as the model does: after one pass, {different} "
            "differs. Its code probably counts calls, writes into what `parameters()` or "
            "`buffers()` return, sets the mode of a module, or keeps what is random; move it out "
            "of `forward`, or name the module that does it in PrepareConfig(opaque=...)"
        )
