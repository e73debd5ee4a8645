"""Example inputs: given or inferred, checked against the model, with two samples if possible."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dspfx.errors import DspfxError, PrepareError
from dspfx.passes.sandbox.randomness import fixed_seeds
from dspfx.passes.sandbox.state import Values, state_kept
from dspfx.utils.pytree import leaves, map_leaves

IMAGE_RANK = 3  # channels, rows and columns
IMAGE_SIZES = (224, 32, 28, 64, 299)
_SPATIAL: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(self, function: Callable[[Any], Any]) -> "Call":
        """The same call with `function` applied to every leaf of its arguments."""
        return Call(map_leaves(function, self.args), map_leaves(function, self.kwargs))

    def by_name(self, root: nn.Module) -> dict[str, Any]:
        """The arguments by the names in `root.forward`; `*` or `**` before a variadic one's."""
        signature = inspect.signature(root.forward)
        stars: dict[Any, str] = {
            inspect.Parameter.VAR_POSITIONAL: "*",
            inspect.Parameter.VAR_KEYWORD: "**",
        }
        bound = signature.bind(*self.args, **self.kwargs).arguments
        return {stars.get(signature.parameters[k].kind, "") + k: v for k, v in bound.items()}


class Chosen(NamedTuple):
    """A call that a model accepts, notes on what was decided unasked, and what it computes."""

    call: Call
    notes: tuple[str, ...]
    outputs: Any


def choose_inputs(root: nn.Module, given: Any, *, as_given: bool = False) -> Chosen:
    """A call that `root` accepts, and what it computes for it in evaluation mode.

    A single sample is doubled if the model takes two, so that batch and channels cannot be
    mistaken for each other, unless it has to stay `as_given`. `root` is run in evaluation mode;
    modes and buffers are restored.

    Raises:
        PrepareError: the model does not accept `given`, or nothing can be inferred.
    """
    if given is None:
        return _inferred(root)
    call = given if isinstance(given, Call) else _as_call(root, given)
    call = call.map(lambda x: x.detach() if isinstance(x, Tensor) else x)
    if not as_given and any(_is_single(x) for x in leaves((call.args, call.kwargs))):
        doubled = call.map(_two_samples)
        outputs, error = _tried(root, doubled)
        if error is None:
            return Chosen(doubled, (), outputs)
    return Chosen(call, (), check_accepted(root, call, PrepareError))


def of_few_samples(root: nn.Module, call: Call) -> Chosen:
    """The same call with two samples, or unchanged if `root` does not accept that.

    Raises:
        PrepareError: it accepts neither.
    """
    few = call.map(lambda x: x[:2] if isinstance(x, Tensor) and x.dim() > 1 else x)
    try:
        return choose_inputs(root, few)
    except PrepareError:
        return choose_inputs(root, call)


def of_one_sample(call: Call) -> Call | None:
    """The same call with its first sample alone; None if it has no more.

    Zeros, of which examples are often made, have gradients of zero. So a tensor of
    floating-point numbers that are all the same becomes one of random numbers.
    """
    return _first_samples(call, 1) if samples_of(call) > 1 else None


def of_two_samples(call: Call) -> Call:
    """The same call with two samples at most, as `of_one_sample`."""
    return _first_samples(call, 2)


def _first_samples(call: Call, most: int) -> Call:
    count = samples_of(call)
    generator = torch.Generator().manual_seed(0)

    def first(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or len(x) != count:
            return x
        x = x[:most]
        if not x.is_floating_point() or not x.numel() or not bool((x == x.flatten()[0]).all()):
            return x
        return torch.randn(x.shape, generator=generator).to(x)

    return call.map(first)


def check_accepted(root: nn.Module, call: Call, failure: type[DspfxError]) -> Any:
    """What `root` computes; raises `failure` if it does not accept `call`. Neither changes."""
    outputs, error = _tried(root, call)
    if error is not None:
        raise failure(
            f"the model does not accept the example inputs ({_shapes(call)}): {error}"
        ) from error
    return outputs


def as_inputs(given: Any) -> tuple[Any, ...]:
    """Positional inputs from a tuple, or from a single one."""
    return given if isinstance(given, tuple) else (given,)


def samples_of(call: Call) -> int:
    """How many samples `call` is of: the length of its first tensor, 1 without any.

    Of a list of single images, as detectors take it, every one is a sample.
    """
    for argument in (*call.args, *call.kwargs.values()):
        if isinstance(argument, list | tuple) and argument and all(map(_is_image, argument)):
            return len(argument)
        for leaf in leaves(argument):
            if isinstance(leaf, Tensor) and leaf.dim() and len(leaf):
                return len(leaf)
    return 1


def _is_image(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dim() == IMAGE_RANK


def fresh(inputs: Any) -> Any:
    """`inputs` with copies of its tensors, which a model may overwrite."""
    return map_leaves(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)


def parameter_dtype_and_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Device and type of the first floating-point parameter or buffer, else torch's defaults."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return torch.get_default_dtype(), torch.device("cpu")


def _as_call(root: nn.Module, given: Any) -> Call:
    """A dict gives arguments by name, unless the model takes a dict itself."""
    if not isinstance(given, Mapping):
        return Call(as_inputs(given))
    try:
        inspect.signature(root.forward).bind(**given)
    except TypeError:
        return Call((given,))
    return Call(kwargs=dict(given))


def _is_single(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() >= 2 and len(leaf) <= 1


def _two_samples(leaf: Any) -> Any:
    """Two samples of a tensor that has one, or none."""
    if not _is_single(leaf):
        return leaf
    return torch.cat([leaf, leaf]) if len(leaf) else leaf.new_zeros(2, *leaf.shape[1:])


def _inferred(root: nn.Module) -> Chosen:
    layer: Any = next((m for m in root.modules() if isinstance(m, (*_SPATIAL, nn.Linear))), None)
    dtype, device = parameter_dtype_and_device(root)
    shapes: list[tuple[int, ...]] = []
    if isinstance(layer, nn.Linear):
        shapes = [(2, layer.in_features)]
    elif layer is not None:
        rank = next(rank for kind, rank in _SPATIAL.items() if isinstance(layer, kind))
        shapes = [(2, layer.in_channels, *[size] * rank) for size in IMAGE_SIZES]
    for shape in shapes:
        call = Call((torch.zeros(shape, dtype=dtype, device=device),))
        outputs, error = _tried(root, call)
        if error is None:
            note = f"example inputs were inferred: one tensor of shape {shape}"
            return Chosen(call, (note,), outputs)
    raise PrepareError(
        "no example inputs were given and none could be inferred from the first layer; pass "
        "example_inputs=..., a tensor, a tuple of positional inputs or a dict of named ones"
    )


def evaluate(root: nn.Module, call: Call, values: Values | None = None) -> Any:
    """The outputs of `root` in evaluation mode; neither it nor the arguments change.

    Args:
        values: of its parameters and buffers, kept once for many calls.
    """
    return run(root, call, values=values)


def run(
    root: nn.Module,
    call: Call,
    *,
    training: bool = False,
    gradients: bool = False,
    values: Values | None = None,
) -> Any:
    """The outputs of `root`, as `evaluate`, in either mode and with or without gradients."""
    call = call.map(fresh)
    _, device = parameter_dtype_and_device(root)
    with torch.set_grad_enabled(gradients), state_kept(root, values=values), fixed_seeds(device):
        root.train(training)  # anybody's; it may return nothing
        return root(*call.args, **call.kwargs)


def _tried(root: nn.Module, call: Call) -> tuple[Any, Exception | None]:
    """The outputs of `root`, or the error that it raises."""
    try:
        return evaluate(root, call), None
    except Exception as error:
        return None, error


def _shapes(call: Call) -> str:
    return ", ".join(
        str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__
        for x in leaves((call.args, call.kwargs))
    )
