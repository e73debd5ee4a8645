"""Tables of torch's operators: sets of functions, methods and module types, by what they do.

An operator is found by identity, a method by its name, a module by its exact type; torchvision's by
their full names, for importing it takes as long as importing torch. An operator in no set is
opaque: converted correctly, at its full width.
"""

import inspect
import operator
import re
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Node

from dspfx.layers.parametrised import kind_of
from dspfx.layers.statements import as_left_by, set_item, with_item
from dspfx.layers.weights import TRANSPOSED

Key = Callable[..., Any] | str | type[nn.Module]
Rule = Literal["elementwise", "channelwise", "movement", "opaque"]

FROZEN_BATCH_NORM = "torchvision.ops.misc.FrozenBatchNorm2d"
STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth.stochastic_depth"


def key(node: Node, root: nn.Module) -> Key:
    """What identifies the operator of a call node: a function, a method's name, a module type."""
    if node.op == "call_module":
        return named(kind_of(root.get_submodule(str(node.target))))
    return named(node.target)


def called_module(root: nn.Module, node: Node) -> nn.Module | None:
    """The module that `node` calls; None if it calls none."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def named(called: Key) -> Key:
    """The full name of one of torchvision's operators above, any other operator itself."""
    name = f"{getattr(called, '__module__', '')}.{getattr(called, '__qualname__', '')}"
    return name if name in (FROZEN_BATCH_NORM, STOCHASTIC_DEPTH) else called


def _functions(*names: str) -> set[Key]:
    """The functions of these names in `torch`, `torch.nn.functional`, and the method names."""
    found: set[Key] = set()
    for name in names:
        for space in (torch, F):
            for spelling in (name, f"{name}_"):
                function = getattr(space, spelling, None)
                if callable(function):
                    found.add(function)
                if hasattr(torch.Tensor, spelling):
                    found.add(spelling)
    return found


MULTIPLICATIONS = _functions("mul", "multiply") | {operator.mul, operator.imul}
ADDITIONS = _functions("add") | {operator.add, operator.iadd}
SUBTRACTIONS = _functions("sub", "subtract") | {operator.sub, operator.isub}

_FURTHER: set[Key] = {
    *(operator.truediv, operator.itruediv, operator.neg, operator.pow),
    STOCHASTIC_DEPTH,
}

ELEMENTWISE: frozenset[Key] = frozenset(
    MULTIPLICATIONS
    | ADDITIONS
    | SUBTRACTIONS
    | _FURTHER
    | _functions(
        *("div", "true_divide", "divide", "pow", "neg", "negative", "abs", "square", "sqrt"),
        *("rsqrt", "reciprocal", "exp", "expm1", "log", "log1p", "sin", "cos", "erf", "sign"),
        *("floor", "ceil", "round", "clamp", "clip", "clamp_min", "clamp_max", "maximum"),
        *("minimum", "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu"),
        *("silu", "mish", "hardswish", "hardsigmoid", "sigmoid", "tanh", "softplus", "softsign"),
        *("softshrink", "hardshrink", "tanhshrink", "threshold", "logsigmoid", "dropout"),
        *("dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
        *("float", "double", "half", "bfloat16", "to"),
        "nan_to_num",
    )
    | {
        *(nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU),
        *(nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus),
        *(nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Threshold),
        *(nn.LogSigmoid, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        *(nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU),
    }
)

# change where elements lie in memory, or nothing
RELAYOUTS: frozenset[Key] = frozenset(_functions("clone", "detach", "contiguous") | {nn.Identity})

NORMS: frozenset[Key] = frozenset(
    {
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, FROZEN_BATCH_NORM),
    }
)
BATCH_NORMS: frozenset[Key] = frozenset(
    {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FROZEN_BATCH_NORM}
)
# norms over the channels of a value, which are its last dimension
LAYER_NORMS: frozenset[Key] = frozenset(_functions("layer_norm") | {nn.LayerNorm})
RMS_NORMS: frozenset[Key] = frozenset(_functions("rms_norm") | {nn.RMSNorm})
# modules outside torch.nn that are known whole
LEAVES: frozenset[Key] = frozenset({FROZEN_BATCH_NORM})

# work on dimension 1, one channel at a time, mixing positions
CHANNELWISE: frozenset[Key] = frozenset(
    NORMS
    | _functions(
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
        *("lp_pool1d", "lp_pool2d", "interpolate", "upsample"),
    )
    | {
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
        *(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, nn.PReLU, nn.Upsample),
        *(nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
        *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
        *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
        *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
        *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    }
)

_ANY_RANK = BATCH_NORMS - {FROZEN_BATCH_NORM}

# make one channel of several: of those that lie side by side, or of one of each half
PIXEL_SHUFFLES: frozenset[Key] = frozenset(_functions("pixel_shuffle") | {nn.PixelShuffle})
GLUS: frozenset[Key] = frozenset(_functions("glu") | {nn.GLU})

REDUCTIONS: frozenset[Key] = frozenset(
    _functions("mean", "sum", "amax", "amin", "std", "var", "logsumexp")
)

# name the size of every dimension of their result
SIZED: frozenset[Key] = frozenset(_functions("view", "reshape", "expand"))
SQUEEZES: frozenset[Key] = frozenset(_functions("squeeze"))
# may run unchanged on fewer channels, as long as they leave the list of channels alone
SIZE_FREE: frozenset[Key] = frozenset(
    _functions("permute", "transpose", "swapaxes", "movedim", "flatten", "unsqueeze", "pad")
    | _functions("flip", "roll", "select", "pixel_unshuffle")
    | {operator.getitem, nn.Flatten, nn.PixelUnshuffle}
)
MOVEMENT: frozenset[Key] = frozenset(
    SIZED
    | SQUEEZES
    | SIZE_FREE
    | _functions(
        *("unflatten", "t", "expand_as", "view_as", "reshape_as", "repeat", "tile"),
        *("repeat_interleave", "cat", "concat", "concatenate", "stack", "split", "chunk"),
        *("tensor_split", "unbind", "narrow", "index_select", "pixel_shuffle"),
        *("channel_shuffle", "unfold", "split_with_sizes"),
    )
    | {nn.Unflatten, nn.PixelShuffle, nn.ChannelShuffle, nn.Unfold}
)

# of these, what is along which dimension; and how their arguments name it
SPLITS: frozenset[Key] = frozenset(
    _functions("split", "chunk", "tensor_split", "unbind", "split_with_sizes")
)
ALONG_ONE: frozenset[Key] = frozenset(SPLITS | _functions("narrow", "index_select"))
REPEATS: frozenset[Key] = frozenset(_functions("repeat", "tile"))
REPEATED: frozenset[Key] = frozenset(REPEATS | _functions("expand"))
CONCATENATIONS: frozenset[Key] = frozenset(_functions("cat", "concat", "concatenate"))
FLATTENS: frozenset[Key] = frozenset(_functions("flatten") | {nn.Flatten})
FIXED_POOLS: frozenset[Key] = frozenset(
    _functions(
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    )
    | {nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d}
    | {nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d}
)

# have the same result for the same constants, in evaluation mode
_RANDOM = _functions(
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "rrelu")
)
OF_CONSTANTS: frozenset[Key] = frozenset(
    (ELEMENTWISE - _RANDOM)
    | RELAYOUTS
    | REDUCTIONS
    | MOVEMENT
    | _functions("var_mean", "std_mean", "norm", "matmul", "softmax", "batch_norm", "layer_norm")
    | {operator.matmul}
)

SIZES: frozenset[Key] = frozenset({"size", "dim", "numel"})

_FUNCTIONAL: dict[Any, Callable[..., Any]] = {
    set_item: with_item,
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def overwritten(node: Node, root: nn.Module) -> Node | None:
    """The value that an in-place operator overwrites and returns; None of other operators."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        in_place = is_torchs(module) and bool(getattr(module, "inplace", False))
    else:
        asked = node.op == "call_function" and bool(_argument(node, "inplace"))
        in_place = asked or overwrites(node.op, node.target)
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if in_place and isinstance(first, Node) else None


def left_by(node: Node) -> tuple[Node, Node] | None:
    """`x` and `call` of a node `as_left_by(x, call)`; None of other nodes."""
    if node.target is not as_left_by:
        return None
    value, call = node.args
    return cast(Node, value), cast(Node, call)


def writes_input(node: Node) -> bool:
    """Whether it writes into an input of the model, or an item of one: an effect, read or not."""
    written = node.args[0] if (node.op, node.target) == ("call_method", "copy_") else None
    while isinstance(written, Node) and written.target in (operator.getitem, getattr, "get"):
        written = written.args[0]
    return isinstance(written, Node) and written.op == "placeholder"


def remove_dead_code(graph: fx.Graph) -> None:
    """Remove the nodes that are never read and have no effect."""
    graph.eliminate_dead_code(lambda node: writes_input(node) or node.is_impure())


def is_torchs(module: nn.Module) -> bool:
    """Whether only torch's code runs in a call of `module`."""
    return type(module).__module__.startswith("torch.nn.")


def overwrites(kind: str, target: Any) -> bool:
    """Whether a call of a method or function overwrites its first argument, by its name."""
    if kind == "call_method":
        return _has_in_place_name(target)
    return kind == "call_function" and (target in _FUNCTIONAL or _twin(target) is not None)


def rank_with_batch(key: Key) -> int | None:
    """How many dimensions a `CHANNELWISE` operator's tensors have, None if any number is accepted.

    With one fewer, what looks like a batch are its channels: `F.max_pool1d` takes `[C, L]`.
    """
    name = key if isinstance(key, str) else key.__name__
    found = None if key in _ANY_RANK else re.search(r"([123])d", name)
    return None if found is None else int(found[1]) + 2


def sizes(node: Node) -> list[Any]:
    """The sizes that a `SIZED` operator is given, numbers or nodes; none if they are one node."""
    given = node.args[1:] or tuple(node.kwargs.values())
    if len(given) == 1 and not isinstance(given[0], int):
        return list(given[0]) if isinstance(given[0], tuple | list) else []
    return list(given)


def output_size(node: Node, layer: nn.Module) -> Any:
    """The size that a call of `layer`, if it is a transposed convolution, is asked for, or None."""
    if not isinstance(layer, TRANSPOSED):
        return None
    return node.kwargs.get("output_size", node.args[1] if len(node.args) > 1 else None)


def along(node: Node) -> Any:
    """The dimension that an `ALONG_ONE` operator works along, a number or a node."""
    if "dim" in node.kwargs:
        return node.kwargs["dim"]
    name = node.target if isinstance(node.target, str) else node.target.__name__
    place = 1 if name in ("narrow", "index_select", "unbind") else 2
    return node.args[place] if len(node.args) > place else 0


def reduced(node: Node, rank: int) -> set[int] | None:
    """The dimensions that a reduction is given to reduce; None if it is given none."""
    dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if not isinstance(dims, int | tuple | list) or isinstance(dims, bool):
        return None
    return {d % rank for d in ([dims] if isinstance(dims, int) else dims)}


def out_of_place(node: Node) -> None:
    """Make a call that overwrites its first argument return a new tensor instead."""
    target: Any = node.target
    if target in _FUNCTIONAL:
        node.target = _FUNCTIONAL[target]
    elif node.op == "call_method" and _has_in_place_name(target):
        if callable(getattr(torch.Tensor, target[:-1], None)):
            node.target = target[:-1]
        else:  # such as `copy_`: it overwrites a copy
            with node.graph.inserting_before(node):
                node.update_arg(0, node.graph.call_method("clone", (node.args[0],)))
    elif node.op == "call_function" and _twin(target) is not None:
        node.target = _twin(target)
    elif node.op == "call_function" and _argument(node, "inplace"):
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)
        bound.arguments["inplace"] = False
        node.args, node.kwargs = bound.args, bound.kwargs


def tolerate_strides(node: Node) -> None:
    """Make a view a reshape: compact tensors may be slices where the originals were not."""
    is_view = node.op == "call_method" and node.target == "view"
    if is_view and not any(isinstance(a, torch.dtype) for a in node.args):
        node.target = "reshape"


def _has_in_place_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _twin(function: Any) -> Any:
    """The out-of-place version of an in-place `function`; None of other functions."""
    name = getattr(function, "__name__", "")
    if not _has_in_place_name(name):
        return None
    return getattr(torch, name[:-1], None) or getattr(F, name[:-1], None)


def _argument(node: fx.Node, name: str) -> Any:
    """The argument `name` of a Python function's call, None without one."""
    if name in node.kwargs:
        return node.kwargs[name]
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return bound.arguments.get(name)
