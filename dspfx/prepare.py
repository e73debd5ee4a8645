"""`prepare`: from the user's model to a gated graph of it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dspfx.errors import PrepareError, TraceError
from dspfx.layers.gated import GATED
from dspfx.model.calls import calls_of
from dspfx.model.config import PrepareConfig, matching
from dspfx.model.division import Division, copied, gated_in, hides_most
from dspfx.model.gating import Task, gate
from dspfx.model.module import PreparedModule
from dspfx.model.outside import macs_outside
from dspfx.model.parts import parts_of
from dspfx.model.rebuilt import check_written, forms_inside, plain_copy
from dspfx.model.whole import Whole
from dspfx.passes.sandbox.calls import Call, choose_inputs, of_few_samples, samples_of


def prepare(
    model: nn.Module, example_inputs: Any = None, *, config: PrepareConfig | None = None
) -> nn.Module:
    """Trace a copy of `model` and put gates into it; the model itself is left alone.

    Until masks are set the prepared model computes what the model does, bit for bit, in
    training and evaluation mode, and its `state_dict` has the model's keys and the gates'.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional inputs or a dict of inputs by name; the
            analysis runs on their shapes. One sample is enough. Inferred from the first layer if
            left out. Arguments that have a default and are left out keep it for good.
        config: see `PrepareConfig`.

    Returns:
        A `PreparedModule`, which is a `GraphModule`, in the model's mode, for the user's own
        training loop. A model whose own code has no graph, since what it does depends on the
        values of its tensors, or one most of which is in children without, comes back as a copy
        of the user's class in which the largest modules that have one are `PreparedModule`s.

    Raises:
        TraceError: neither the model nor any child with a layer to prune has a graph; the
            message names the place.
        PrepareError: the example inputs do not fit, no layer can be gated, a pattern of
            `config` matches nothing, a weight is not finite, or the model is scripted or exported.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> bool((prepared(x) == model(x)).all())
        True
        >>> list(dspfx.get_masks(prepared))
        ['1', '2']
    """
    config = config or PrepareConfig()
    if not isinstance(model, nn.Module) or not isinstance(config, PrepareConfig):
        raise PrepareError(
            "prepare takes a torch.nn.Module and a PrepareConfig, got "
            f"{type(model).__name__} and {type(config).__name__}"
        )
    if any(isinstance(module, PreparedModule) for module in model.modules()):
        raise PrepareError("this model is prepared already; prepare the original one")
    check_written(model)
    _check_weights(model)
    with torch.inference_mode(mode=False):  # or what is prepared could not learn apart from it
        return _prepared(model, example_inputs, config)


def _prepared(model: nn.Module, example_inputs: Any, config: PrepareConfig) -> nn.Module:
    root = plain_copy(model)
    frozen = matching(root, config.ignore, "ignore")
    opaque = matching(root, config.opaque, "opaque")
    inputs, notes, outputs = choose_inputs(root, example_inputs)
    forms = forms_inside(root)
    task = Task(config, frozen, opaque, notes=(*notes, *forms))
    try:
        whole = gate(root, inputs, task, outputs)
    except (TraceError, PrepareError) as error:
        in_parts = _in_parts(plain_copy(model), inputs, task, f"since {error}")
        if in_parts is not None:
            return in_parts
        if not forms:
            raise
        raise type(error)("; ".join((str(error), *forms))) from error
    if not hides_most(whole):
        return whole
    names = ", ".join(whole.untraced)
    why = f"since most of it is in modules that are no part of a graph of the whole: {names}"
    in_parts = _in_parts(plain_copy(model), inputs, task, why)
    return whole if in_parts is None or gated_in(in_parts) <= gated_in(whole) else in_parts


def _in_parts(root: nn.Module, inputs: Call, task: Task, why: str) -> nn.Module | None:
    """`root` with its children prepared; None if none of them can be, or only single layers.

    With single layers alone no channel could be removed; the error says what to move out instead.
    """
    calls = calls_of(root, inputs)

    def prepare_one(child: nn.Module, name: str, call: Call) -> PreparedModule:
        if name in task.opaque:
            raise PrepareError(f"{name} is not to be traced into")
        twin = copied(child, root)
        own, _, outputs = of_few_samples(twin, call)  # heads are often called with many
        within = task.within(name, id(child) not in calls.of_inputs, calls.followed)
        # of the batch that it reads, a few stand for all
        samples = samples_of(inputs) * samples_of(own) / samples_of(call)
        part = gate(twin, own, replace(within, samples=samples), outputs)
        part.answer_for(child)
        return part

    found = Division(root, calls, prepare_one, Whole(root, inputs))
    if all(isinstance(part, tuple(GATED)) for part in found.parts.values()):
        return None
    parts = parts_of(root)
    first = parts[0].module
    first.whole = inputs
    left = (f"left as it is: {name}, since {reason}" for name, reason in found.refused.items())
    names = ", ".join(part.name for part in parts)
    first.outside, outside = macs_outside(root, inputs, parts)
    notes = f"prepared in parts, {names}, {why}", *left, outside
    first.notes = (*first.notes, *filter(None, notes))
    return root


def _is_finite(x: Tensor) -> bool:
    if not x.is_floating_point() or not x.numel() or x.layout != torch.strided:
        return bool(torch.isfinite(x).all())
    return bool(torch.stack(x.aminmax()).isfinite().all())  # in one pass, without a copy


@torch.no_grad()  # weights made in inference mode have no gradients
def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise PrepareError(
                f"{name} has no shape yet, as of a lazy module; call the model once, with an "
                "example, before it is prepared"
            )
        if not parameter.is_meta and not _is_finite(parameter):
            raise PrepareError(f"{name} holds NaN or infinite values; repair the weights first")
