"""`prepare`: from the user's model to a gated graph of it."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx.errors import PrepareError, TraceError
from dspfx.module import PreparedModule
from dspfx.passes.channels import analyse
from dspfx.passes.insert_gates import insert_gates, plan_gates
from dspfx.passes.trace import parameter_dtype_and_device, trace
from dspfx.passes.values import ChannelAnalysis

IMAGE_SIZES = (224, 32, 28, 64, 299)


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
        example_inputs: a tensor, or a tuple of positional inputs; the analysis runs on their
            shapes. One sample is enough. Inferred from the first layer if left out.
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
    traced = trace(model)
    frozen = _matching(traced.root, config.ignore)
    prepared = PreparedModule(
        traced.root, {False: traced.eval, True: traced.train}, type(model).__name__
    )
    inputs, notes = _inputs(prepared, example_inputs)
    _check_trace(traced.root, prepared, inputs)
    analysis = analyse_prepared(prepared, inputs, frozen)
    plan = plan_gates(prepared, analysis, frozen)
    if not plan.layers:
        raise PrepareError(
            f"{type(model).__name__} has no layer to prune: dspfx gates convolutions with two or "
            "more input channels for each filter that do not read the model's inputs directly"
        )
    insert_gates(prepared, set(prepared.graphs.values()), plan, config.groups)
    prepared.replace_graphs(prepared.graphs)
    prepared.example_inputs, prepared.frozen, prepared.notes = inputs, frozen, notes
    return prepared


def analyse_prepared(
    prepared: PreparedModule, inputs: tuple[Any, ...], frozen: frozenset[str]
) -> ChannelAnalysis:
    """The analysis of the evaluation graph, whose nodes are the keys of the result."""
    with prepared.evaluation_view() as view:
        return analyse(view, inputs, frozen)


def _check_trace(root: nn.Module, prepared: PreparedModule, inputs: tuple[Any, ...]) -> None:
    """Run the copied model and its evaluation graph on the example inputs and compare."""

    def fresh() -> Any:
        return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)

    with torch.no_grad(), prepared.evaluation_view() as view:
        root.training = False
        expected, actual = pytree.tree_leaves(root(*fresh())), pytree.tree_leaves(view(*fresh()))
    same = len(expected) == len(actual) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, Tensor) else a == b
        for a, b in zip(expected, actual, strict=True)
    )
    if not same:
        raise TraceError(
            f"the graph of {type(root).__name__} does not compute what the model does: its code "
            "probably reads a tensor under one name after overwriting it under another (`+=`); "
            "write `y = y + x` there"
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


def as_inputs(given: Any) -> tuple[Any, ...]:
    """Positional inputs from a tuple, a list or a single one."""
    return tuple(given) if isinstance(given, tuple | list) else (given,)


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


def _inputs(prepared: PreparedModule, given: Any) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Example inputs that the model accepts, of two samples where it takes two, and notes."""
    if given is None:
        return _inferred_inputs(prepared)
    inputs = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, as_inputs(given))
    error = _failure(prepared, inputs)
    if error is not None:
        raise PrepareError(
            f"the model does not accept the example inputs ({_shapes(inputs)}): {error}"
        ) from error
    doubled = pytree.tree_map(_two_samples, inputs)
    return (doubled if _failure(prepared, doubled) is None else inputs), ()


def _two_samples(leaf: Any) -> Any:
    """A single sample twice, so that batch and channels cannot be mistaken for each other."""
    single = isinstance(leaf, Tensor) and leaf.dim() > 1 and len(leaf) == 1
    return torch.cat([leaf, leaf]) if single else leaf


def _inferred_inputs(prepared: PreparedModule) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    layer: Any = next(
        (m for m in prepared.modules() if isinstance(m, (*_SPATIAL, nn.Linear))), None
    )
    dtype, device = parameter_dtype_and_device(prepared)
    shapes: list[tuple[int, ...]] = []
    if isinstance(layer, nn.Linear):
        shapes = [(2, layer.in_features)]
    elif layer is not None:
        rank = _SPATIAL.get(type(layer), 2)
        shapes = [(2, layer.in_channels, *[size] * rank) for size in IMAGE_SIZES]
    for shape in shapes:
        inputs = (torch.zeros(shape, dtype=dtype, device=device),)
        if _failure(prepared, inputs) is None:
            note = f"example inputs were inferred: one tensor of shape {shape}"
            return inputs, (note,)
    raise PrepareError(
        "no example inputs were given and none could be inferred from the first layer; pass "
        "example_inputs=..., a tensor or a tuple of the model's positional inputs"
    )


_SPATIAL: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def _failure(prepared: PreparedModule, inputs: tuple[Any, ...]) -> Exception | None:
    """What the evaluation graph raises on `inputs`; nothing of the model changes."""
    try:
        with torch.no_grad(), prepared.evaluation_view() as view:
            view(*inputs)
    except Exception as error:
        return error
    return None


def _shapes(inputs: Any) -> str:
    leaves = pytree.tree_leaves(inputs)
    return ", ".join(
        str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in leaves
    )
