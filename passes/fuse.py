"""Residual sums and activations become part of the native convolution before them.

1. conv -> add with a tensor of the same shape: the other operand becomes the residual of the conv.
2. conv -> activation that the kernel knows: it becomes the convolution's.

Only where nobody else reads what is between, and in that order; a sum behind an activation is left.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import Node

from dspfx.group_conv import GroupConv2d

_ADDS = {operator.add, torch.add, "add"}
_ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((nn.ReLU, torch.relu, F.relu, "relu"), "relu"),
    **dict.fromkeys((nn.ReLU6, F.relu6), "relu6"),
    **dict.fromkeys((nn.Hardswish, F.hardswish), "hardswish"),
    **dict.fromkeys((nn.SiLU, F.silu), "silu"),
}


def fuse(module: fx.GraphModule, inputs: tuple[Any, ...]) -> bool:
    """Fuse what can be fused in `module`, which is changed; whether anything was.

    Args:
        module: calls every `GroupConv2d` at most once.
        inputs: of `module`; shapes are found with them.
    """
    shapes = _Shapes(module)
    with torch.no_grad():
        shapes.run(*inputs)
    fused = False
    for node in list(module.graph.nodes):
        conv = _called(module, node)
        if isinstance(conv, GroupConv2d) and conv.activation == "none":
            fused |= _fuse_sum(node, shapes.of)
            fused |= _fuse_activation(module, node, conv)
    if fused:
        module.graph.lint()
        module.recompile()
    return fused


class _Shapes(fx.Interpreter):
    """Remembers the shape of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.of: dict[Node, torch.Size] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.of[n] = result.shape
        return result


def _called(module: fx.GraphModule, node: Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_reader(node: Node) -> Node | None:
    (reader,) = node.users if len(node.users) == 1 else (None,)
    return reader


def _fuse_sum(node: Node, shapes: dict[Node, torch.Size]) -> bool:
    add = _only_reader(node)
    if add is None or len(node.args) != 1 or add.op not in ("call_function", "call_method"):
        return False
    if add.target not in _ADDS or len(add.args) != 2 or add.kwargs:
        return False
    (other,) = [a for a in add.args if a is not node] or [None]
    if not isinstance(other, Node) or shapes.get(other) != shapes[node]:
        return False
    add.prepend(node)  # behind the other operand
    node.args = (*node.args, other)
    add.replace_all_uses_with(node)
    add.graph.erase_node(add)
    return True


def _fuse_activation(module: fx.GraphModule, node: Node, conv: GroupConv2d) -> bool:
    act = _only_reader(node)
    if act is None or act.all_input_nodes != [node]:
        return False
    called = _called(module, act)
    key = act.target if called is None else type(called)
    others = {k: v for k, v in act.kwargs.items() if k != "inplace"}
    if key not in _ACTIVATIONS or len(act.args) != 1 or others:
        return False
    conv.activation = _ACTIVATIONS[key]
    act.replace_all_uses_with(node)
    act.graph.erase_node(act)
    return True
