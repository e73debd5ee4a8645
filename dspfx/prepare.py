"""`prepare`: from the user's model to a gated graph of it."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx.errors import PrepareError, TraceError
from dspfx.inputs import by_name, choose_inputs, evaluate, fresh, parameter_dtype_and_device
from dspfx.module import PreparedModule
from dspfx.passes.channels import analyse
from dspfx.passes.insert_gates import insert_gates, plan_gates
from dspfx.passes.trace import copy_model, trace
from dspfx.passes.values import ChannelAnalysis


@dataclass(frozen=True)
class PrepareConfig:
    """How a model is prepared.

    Attributes:
        groups: G, into how many groups the filters of a layer may be divided.
        ignore: layers to leave alone, with all their filters and inputs: names, patterns such as
            `"*.downsample.*"`, or module types.
    """

    groups: int = 4
    ignore: tuple[str | type[nn.Module], ...] = ()

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise PrepareError(f"groups must be at least 1, got {self.groups}")


def prepare(
    model: nn.Module, example_inputs: Any = None, *, config: PrepareConfig | None = None
) -> PreparedModule:
    """Trace a copy of `model` and put gates into it; the model itself is left alone.

    Until masks are set the prepared model computes what the model does, bit for bit, in
    training and evaluation mode, and its `state_dict` has the model's keys and the gates'.

    Args:
        model: any traceable module.
        example_inputs: a tensor, a tuple of positional inputs or a dict of inputs by name; the
            analysis runs on their shapes. One sample is enough. Inferred from the first layer if
            left out. Arguments that have a default and are left out keep it for good.
        config: see `PrepareConfig`.

    Returns:
        A `GraphModule` in the model's mode, for the user's own training loop.

    Raises:
        TraceError: the model has no graph; the message names the place.
        PrepareError: the example inputs do not fit, no layer can be gated, a pattern of
            `ignore` matches nothing, or a weight is not finite.
    """
    config = config or PrepareConfig()
    if isinstance(model, PreparedModule):
        raise PrepareError("this model is prepared already; prepare the original one")
    _check_weights(model)
    root = copy_model(model)
    frozen = _matching(root, config.ignore)
    inputs, notes = choose_inputs(root, example_inputs)
    expected = evaluate(root, inputs)
    traced = trace(root, by_name(root, inputs))
    prepared = PreparedModule(root, {False: traced.eval, True: traced.train}, type(model).__name__)
    _check_trace(prepared, inputs, expected)
    analysis = analyse_prepared(prepared, inputs, frozen)
    plan = plan_gates(prepared, analysis, frozen)
    if not plan.layers:
        raise PrepareError(
            f"{type(model).__name__} has no layer to prune: dspfx gates convolutions with two or "
            "more input channels for each filter that do not read the model's inputs directly"
        )
    insert_gates(prepared, set(prepared.graphs.values()), plan, config.groups)
    prepared.recompile()
    prepared.example_inputs, prepared.frozen = inputs, frozen
    prepared.notes = notes + tuple(
        f"opaque, since it cannot be traced: {name}: {why}" for name, why in traced.opaque.items()
    )
    return prepared


def analyse_prepared(
    prepared: PreparedModule, inputs: tuple[Any, ...], frozen: frozenset[str]
) -> ChannelAnalysis:
    """The analysis of the evaluation graph, whose nodes are the keys of the result."""
    with prepared.evaluation_view() as view:
        return analyse(view, inputs, frozen)


def _check_trace(prepared: PreparedModule, inputs: tuple[Any, ...], expected: Any) -> None:
    """Compare the evaluation graph's outputs for the example inputs with the model's own."""
    with torch.no_grad(), prepared.evaluation_view() as view:
        actual = pytree.tree_leaves(view(*fresh(inputs)))
    expected = pytree.tree_leaves(expected)
    same = len(expected) == len(actual) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, Tensor) else a == b
        for a, b in zip(expected, actual, strict=True)
    )
    if not same:
        raise TraceError(
            f"the graph of {type(prepared).__name__} does not compute what the model does: its "
            "code probably reads a tensor under one name after overwriting it under another "
            "(`+=`); write `y = y + x` there"
        )


def fitting_inputs(prepared: PreparedModule) -> tuple[Any, ...]:
    """The example inputs, as the prepared model's present dtype and device want them."""
    dtype, device = parameter_dtype_and_device(prepared)

    def fit(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else None)

    fitted: tuple[Any, ...] = pytree.tree_map(fit, prepared.example_inputs)
    return fitted


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            raise PrepareError(f"{name} holds NaN or infinite values; repair the weights first")


def _matching(root: nn.Module, ignore: Iterable[str | type[nn.Module]]) -> frozenset[str]:
    """The names of the modules that `ignore` names, and of all that is inside them."""
    names = {name: module for name, module in root.named_modules(remove_duplicate=False) if name}
    found: set[str] = set()
    for rule in ignore:
        matches = {
            name
            for name, module in names.items()
            if (fnmatch.fnmatchcase(name, rule) if isinstance(rule, str) else type(module) is rule)
        }
        if not matches:
            raise PrepareError(
                f"ignore={rule!r} matches no module; names look like {', '.join(list(names)[:5])}"
            )
        found |= {n for n in names for m in matches if n == m or n.startswith(f"{m}.")}
    return frozenset(found)
