"""Example inputs: given or inferred, tried on the model, two samples where it takes two."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx.errors import PrepareError

IMAGE_SIZES = (224, 32, 28, 64, 299)
_SPATIAL: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


def choose_inputs(root: nn.Module, given: Any) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Positional inputs that `root` accepts, and notes on what was decided unasked.

    A single sample is doubled if the model takes two, so that batch and channels cannot be
    mistaken for each other. `root` is run in evaluation mode; modes and buffers are restored.

    Raises:
        PrepareError: the model does not accept `given`, or nothing can be inferred.
    """
    if given is None:
        return _inferred(root)
    inputs = pytree.tree_map(
        lambda x: x.detach() if isinstance(x, Tensor) else x, _positional(root, given)
    )
    error = _failure(root, inputs)
    if error is not None:
        raise PrepareError(
            f"the model does not accept the example inputs ({_shapes(inputs)}): {error}"
        ) from error
    doubled = pytree.tree_map(_two_samples, inputs)
    return (doubled if _failure(root, doubled) is None else inputs), ()


def by_name(root: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Fresh copies of `inputs` by the names of the arguments; `*` before a variadic one's."""
    signature = inspect.signature(root.forward)
    stars: dict[Any, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    return {
        stars.get(signature.parameters[name].kind, "") + name: fresh(value)
        for name, value in signature.bind(*inputs).arguments.items()
    }


def as_inputs(given: Any) -> tuple[Any, ...]:
    """Positional inputs from a tuple, or from a single one."""
    return given if isinstance(given, tuple) else (given,)


def fresh(inputs: Any) -> Any:
    """`inputs` with copies of its tensors, which a model may overwrite."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)


def parameter_dtype_and_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Those of the first floating-point parameter or buffer; torch's default without any."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return torch.get_default_dtype(), torch.device("cpu")


def _positional(root: nn.Module, given: Any) -> tuple[Any, ...]:
    """`given` in the order of the arguments, a dict by its names unless the model takes one."""
    if not isinstance(given, Mapping):
        return as_inputs(given)
    try:
        bound = inspect.signature(root.forward).bind(**given)
    except TypeError:
        return (given,)
    bound.apply_defaults()
    last = max((i for i, name in enumerate(bound.arguments) if name in given), default=-1)
    return tuple(bound.arguments.values())[: last + 1]


def _two_samples(leaf: Any) -> Any:
    single = isinstance(leaf, Tensor) and leaf.dim() > 1 and len(leaf) == 1
    return torch.cat([leaf, leaf]) if single else leaf


def _inferred(root: nn.Module) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    layer: Any = next((m for m in root.modules() if isinstance(m, (*_SPATIAL, nn.Linear))), None)
    dtype, device = parameter_dtype_and_device(root)
    shapes: list[tuple[int, ...]] = []
    if isinstance(layer, nn.Linear):
        shapes = [(2, layer.in_features)]
    elif layer is not None:
        rank = next(rank for kind, rank in _SPATIAL.items() if isinstance(layer, kind))
        shapes = [(2, layer.in_channels, *[size] * rank) for size in IMAGE_SIZES]
    for shape in shapes:
        inputs = (torch.zeros(shape, dtype=dtype, device=device),)
        if _failure(root, inputs) is None:
            return inputs, (f"example inputs were inferred: one tensor of shape {shape}",)
    raise PrepareError(
        "no example inputs were given and none could be inferred from the first layer; pass "
        "example_inputs=..., a tensor, a tuple of positional inputs or a dict of named ones"
    )


def evaluate(root: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What `root` computes in evaluation mode; nothing of it changes, nor of `inputs`."""
    modes = {module: module.training for module in root.modules()}
    try:
        with torch.no_grad():
            return root.eval()(*fresh(inputs))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _failure(root: nn.Module, inputs: tuple[Any, ...]) -> Exception | None:
    try:
        evaluate(root, inputs)
    except Exception as error:
        return error
    return None


def _shapes(inputs: Any) -> str:
    leaves = pytree.tree_leaves(inputs)
    return ", ".join(
        str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in leaves
    )
