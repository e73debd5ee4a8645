"""The lifting pass: functional calls on a module's own parameters become calls of the module.

Subclasses of torch's layers are traced through, down to `F.conv2d(x, self.weight, ...)`. Where all
parameters of such a call belong to one module of the matching kind,

1. `F.batch_norm` becomes an `nn.BatchNorm`, its counter of batches included,
2. `F.conv1d`, `F.conv2d` and `F.conv3d` become an `nn.Conv`, `F.linear` an `nn.Linear`,
3. a convolution whose weight is computed from the module's own parameters becomes a `WeightedConv`,
   which is given the weight,

and that module takes the place of the user's in the private copy, with the same parameters, buffers
and children under the same names. Left alone: parameters of several modules, and modules that one
call uses otherwise than another.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Node

from dspfx.layers.computed_weight import WEIGHTED, is_weighted

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS: dict[Callable[..., Any], type[nn.Module]] = {
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
}
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


def lift(by_mode: Mapping[bool, fx.Graph], root: nn.Module) -> bool:
    """Lift what can be lifted in the graphs of evaluation and training; whether anything was."""
    calls: dict[str, list[tuple[Node, nn.Module]]] = {}
    graphs = set(by_mode.values())
    for graph in graphs:
        modes = {mode for mode, own in by_mode.items() if own is graph}
        for node in graph.nodes:
            found = _module_of(node, root, modes)
            if found is not None:
                calls.setdefault(found[0], []).append((node, found[1]))
    lifted = False
    for name, sites in calls.items():
        first = sites[0][1]
        if all(_same_settings(first, module) for _, module in sites):
            lifted = True
            _replace_module(root, name, first)
            for node, _ in sites:
                _replace_call(node, name, is_weighted(first))
            for graph in graphs if isinstance(first, BATCH_NORMS) else ():
                _leave_counting_to(name, graph)
    return lifted


def _leave_counting_to(norm: str, graph: fx.Graph) -> None:
    """A norm counts batches itself."""
    for counter in graph.find_nodes(op="get_attr"):
        if counter.target == f"{norm}.num_batches_tracked":
            for node in [n for n in counter.users if n.target == "add_" and n.args[1:] == (1,)]:
                graph.erase_node(node)
            if not counter.users:
                graph.erase_node(counter)


def _module_of(node: Node, root: nn.Module, modes: set[bool]) -> tuple[str, nn.Module] | None:
    """The module equivalent to `node`, and the name of the module that it replaces.

    In all `modes` that it is called in, True being training.
    """
    if node.op != "call_function":
        return None
    if node.target is F.batch_norm:
        return _batch_norm(node, root, modes)
    if node.target in CONVOLUTIONS:
        return _convolution(node, root)
    if node.target is F.linear:
        return _linear(node, root)
    return None


def _batch_norm(node: Node, root: nn.Module, modes: set[bool]) -> tuple[str, nn.Module] | None:
    bound = signature(F.batch_norm).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given: dict[str, Any] = bound.arguments
    named = {k: given[k] for k in ("running_mean", "running_var", "weight", "bias")}
    owner = _owner({k: v for k, v in named.items() if v is not None})
    module: Any = None if owner is None else root.get_submodule(owner)
    kind = next((k for k in BATCH_NORMS if isinstance(module, k)), None)
    if kind is None or type(module) is kind or module.running_mean is None:
        return None
    agrees = (
        given["eps"] == module.eps
        and given["momentum"] in (module.momentum, 0.0)
        and (named["weight"] is None) == (module.weight is None)
        and {given["training"]} == modes
    )
    if owner is None or not agrees:
        return None
    affine = module.weight is not None
    return owner, kind(module.num_features, module.eps, module.momentum, affine, device="meta")


def _convolution(node: Node, root: nn.Module) -> tuple[str, nn.Module] | None:
    given = _given(node, _CONV_ARGUMENTS)
    owner = _own_weight(given)
    kind: Any = CONVOLUTIONS[node.target]  # type: ignore[index]
    plain = kind
    if owner is None:
        owner, kind = _computed_by(given), WEIGHTED[kind]
    module: Any = None if owner is None else root.get_submodule(owner)
    settings = [given.get(k, d) for k, d in zip(_CONV_ARGUMENTS[3:], (1, 0, 1, 1), strict=True)]
    fixed = all(_is_fixed(setting) for setting in settings)
    if owner is None or not isinstance(module, plain) or type(module) is plain or not fixed:
        return None
    bias = given.get("bias") is not None
    shape = module.out_channels, module.in_channels, module.kernel_size
    if bias != (module.bias is not None):
        return None
    out, channels, kernel = shape
    return owner, kind(channels, out, kernel, *settings, bias=bias, device="meta")


def _is_fixed(setting: Any) -> bool:
    """Whether a value is the same in every call, not computed from the input."""
    numbers = setting if isinstance(setting, tuple | list) else [setting]
    return all(isinstance(n, int | str) for n in numbers)


def _computed_by(given: dict[str, Any]) -> str | None:
    """The one module from whose parameters and buffers alone the weight is computed."""
    seen: set[Node] = set()
    ahead = [given["weight"]]
    while ahead:
        node = ahead.pop()
        if isinstance(node, Node) and node not in seen:
            seen.add(node)
            ahead += node.all_input_nodes
    targets = [str(node.target) if node.op == "get_attr" else "" for node in seen if _is_leaf(node)]
    owners = {target.rpartition(".")[0] for target in targets}
    if len(owners) != 1 or "" in owners:
        return None
    (owner,) = owners
    bias = given.get("bias")
    own_bias = bias is None or (isinstance(bias, Node) and bias.target == f"{owner}.bias")
    return owner if own_bias and f"{owner}.weight" in targets else None


def _is_leaf(node: Node) -> bool:
    return not node.all_input_nodes


def _linear(node: Node, root: nn.Module) -> tuple[str, nn.Module] | None:
    given = _given(node, ("input", "weight", "bias"))
    owner = _own_weight(given)
    module: Any = None if owner is None else root.get_submodule(owner)
    bias = given.get("bias") is not None
    if owner is None or not isinstance(module, nn.Linear) or type(module) is nn.Linear:
        return None
    if bias != (module.bias is not None):
        return None
    return owner, nn.Linear(module.in_features, module.out_features, bias, device="meta")


def _given(node: Node, names: tuple[str, ...]) -> dict[str, Any]:
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _own_weight(given: dict[str, Any]) -> str | None:
    return _owner({k: given[k] for k in ("weight", "bias") if given.get(k) is not None})


def _owner(arguments: dict[str, Any]) -> str | None:
    """The one module that has the arguments as attributes of these names."""
    owners = set()
    for name, node in arguments.items():
        target = str(node.target) if isinstance(node, Node) and node.op == "get_attr" else ""
        owner, _, leaf = target.rpartition(".")
        owners.add(owner if leaf == name else "")
    return owners.pop() if len(owners) == 1 and "" not in owners else None


def _same_settings(a: nn.Module, b: nn.Module) -> bool:
    return type(a) is type(b) and a.extra_repr() == b.extra_repr()


def _replace_module(root: nn.Module, name: str, plain: nn.Module) -> None:
    """Replace the module `name` by `plain` everywhere, with its state and children."""
    old = root.get_submodule(name)
    for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        vars(plain)[kind] = vars(old)[kind]
    plain.training = old.training
    for module in list(root.modules()):
        for child_name, child in list(module._modules.items()):
            if child is old:
                module._modules[child_name] = plain


def _replace_call(node: Node, name: str, weighted: bool) -> None:
    given = _given(node, ("input", "weight"))
    with node.graph.inserting_before(node):
        operands = (given["input"], given["weight"]) if weighted else (given["input"],)
        call = node.graph.call_module(name, operands)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    parameters = [n for n in node.all_input_nodes if n.op == "get_attr" and len(n.users) == 1]
    node.graph.erase_node(node)
    for parameter in parameters:
        node.graph.erase_node(parameter)
