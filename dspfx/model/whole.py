"""A model in parts, compared as a whole: the code around the parts does not see the difference.

That code has no graph. It may ask a part for its class, for a layer inside, or call something else
in its place; so the model is run with the parts exchanged.
"""

import copy
import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from dspfx.errors import EquivalenceError
from dspfx.model.analysed import fitting
from dspfx.model.modes import modes_kept, put_all
from dspfx.model.parts import Part
from dspfx.model.single import tensors_hidden
from dspfx.model.training_check import difference, rounding_errors, training_pass
from dspfx.passes.sandbox.calls import Call, evaluate, fresh, parameter_dtype_and_device
from dspfx.passes.sandbox.randomness import fixed_seeds
from dspfx.passes.sandbox.state import state_kept
from dspfx.utils.pytree import leaves, structure


class Whole:
    """What a model computes for some inputs, in evaluation and, where it can train, in training."""

    def __init__(self, root: nn.Module, inputs: Call) -> None:
        self.inputs = inputs
        self.expected, self.trained = evaluate(root, inputs), training_pass(root, inputs)
        self.reference = None if self.trained is None else copy.deepcopy(root)

    def difference(self, root: nn.Module, parts: Collection[nn.Module]) -> str | None:
        """What `root`, in which `parts` were exchanged, does that it did not do; None if nothing.

        The outputs have to be the same, bit for bit.
        """
        called: set[nn.Module] = set()

        def note(part: nn.Module, *_: Any) -> None:
            called.add(part)

        with ExitStack() as hooks:
            for part in parts:
                hooks.callback(part.register_forward_hook(note).remove)
            hooks.enter_context(tensors_hidden(parts))
            try:
                actual = evaluate(root, self.inputs)
            except Exception as error:
                return f"it raises {type(error).__name__}: {error}"
        if not same(self.expected, actual):
            return "its outputs are others"
        if len(called) < len(parts):
            return "something else is called in its place"
        if self.trained is None:
            return None
        trained = training_pass(root, self.inputs)
        if trained is None:
            return "it cannot be trained"
        different = difference(self.trained, trained)
        if different is not None and self.reference is not None:  # perhaps by rounding alone
            errors = rounding_errors(self.reference, self.inputs)
            different = difference(self.trained, trained, errors)
        return None if different is None else f"{different} is another in training"


def same(a: Any, b: Any, within: frozenset[int] = frozenset()) -> bool:
    """Whether two results hold equal values, bit for bit, in objects of the same classes.

    Args:
        within: the `id` of objects that hold `a`, and are being compared.
    """
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if type(a) is not type(b) or structure(a) != structure(b):
        return False
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    inside, other = list(leaves(a)), list(leaves(b))
    if len(inside) != 1 or inside[0] is not a:
        return len(inside) == len(other) and all(
            same(x, y, within) for x, y in zip(inside, other, strict=True)
        )
    compares: object = type(a).__eq__
    if compares is not object.__eq__:
        return bool(a == b)
    own, its = _attributes(a), _attributes(b)  # their class does not say when two are equal
    return id(a) in within or (
        own.keys() == its.keys()
        and all(same(value, its[name], within | {id(a)}) for name, value in own.items())
    )


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes that are no functions or modules."""
    return {name: x for name, x in getattr(value, "__dict__", {}).items() if not callable(x)}


def check_whole(model: nn.Module, twin: nn.Module, parts: Sequence[Part]) -> None:
    """Compare `twin`, in which the `parts` of `model` have another form, with it.

    Code that decides by numbers may decide otherwise for the last bit of them. So each call of a
    part is compared by itself, and then gives `twin` what the part of `model` gave: all else has to
    be the same, bit for bit.

    Args:
        model: masked.
        twin: with parts of the same names.
        parts: of `model`; the first one knows the inputs to compare for.

    Raises:
        EquivalenceError: they differ, or only `twin` raises.
    """
    whole = parts[0].module.whole
    if whole is None:
        return  # it was traced as a whole, or loaded
    inputs = whole.map(fitting(model))
    names: dict[nn.Module, str] = {part.module: part.name for part in parts}
    forms = {twin.get_submodule(name): name for name in names.values()}
    given: dict[str, list[tuple[Call, Any]]] = {name: [] for name in names.values()}

    def record(part: nn.Module, call: Call, outputs: Any) -> Any:
        given[names[part]].append((call, fresh(outputs)))
        return fresh(outputs)  # as `compare` does

    def compare(form: nn.Module, call: Call, _: Any) -> Any:
        name = forms[form]
        if not given[name]:
            raise EquivalenceError(f"it calls '{name}' more often")
        before, known = given[name].pop(0)
        if not same((before.args, before.kwargs), (call.args, call.kwargs)):
            raise EquivalenceError(f"it gives '{name}' other inputs")
        return known

    try:
        expected = _evaluate(model, inputs, names, record)
    except Exception:
        return  # it does not run in its present type, or where it is: nothing to compare with
    different: str | None = None
    try:
        actual = _evaluate(twin, inputs, forms, compare)
    except EquivalenceError as error:
        different = str(error)
    except Exception as error:
        different = f"it raises {type(error).__name__}: {error}"
    else:
        if left := next((name for name, calls in given.items() if calls), None):
            different = f"it calls '{left}' less often"
        elif not same(expected, actual):
            different = "its outputs are others"
    if different is not None:
        raise EquivalenceError(
            f"the parts of {type(model).__name__} are equal, but the code around them differs: "
            f"{different}. It probably reads weights or layers of a part; name that part in "
            "PrepareConfig(opaque=...)"
        )


After = Callable[[nn.Module, Call, Any], Any]


def _evaluate(model: nn.Module, call: Call, parts: Collection[nn.Module], after: After) -> Any:
    """Like `evaluate`, but each call of a part returns what `after` makes of its outputs.

    By no `train` of the user's, which may want modules that are gone.
    """
    _, device = parameter_dtype_and_device(model)
    call = call.map(fresh)
    with modes_kept(model), torch.no_grad(), state_kept(model), fixed_seeds(device):
        put_all(model, mode=False)
        with ExitStack() as stack:
            kinds: list[Any] = [type(part) for part in parts]  # each has a class of its own
            for kind in kinds:
                instead = _followed_by(kind.forward, after)
                stack.enter_context(mock.patch.object(kind, "forward", instead))
            return model(*call.args, **call.kwargs)


def _followed_by(forward: Callable[..., Any], after: After) -> Callable[..., Any]:
    """`forward`, and then `after`: before any hook or wrapper sees the result."""

    @functools.wraps(forward)
    def both(part: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs).map(fresh)
        return after(part, call, forward(part, *args, **kwargs))

    return both
