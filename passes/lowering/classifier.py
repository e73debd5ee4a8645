"""Classifier lowering: a small linear layer after a global average pool becomes a 1x1 convolution.

    GroupConv2d -> AdaptiveAvgPool2d(1) -> flatten -> Linear
    GroupConv2d -> AdaptiveAvgPool2d(1) -> GroupConv2d (1x1) -> flatten

`runs` then joins it with the convolutions before. A large linear layer is better left to torch,
which multiplies all images of a batch at once.
"""

from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import Node

from dspfx.layers.group_conv import FilterGroup, GroupConv2d
from dspfx.passes.analysis import operators
from dspfx.passes.lowering.runs import layer_of

MOST_WEIGHTS = 2**15


def join_classifiers(module: fx.GraphModule) -> bool:
    """Change small classifiers in `module` to convolutions; whether there were any."""
    found = [node for node in module.graph.nodes if _is_classifier(module, node)]
    for node in found:
        _convolve(module, node)
    if found:
        module.delete_all_unused_submodules()
        module.graph.lint()
        module.recompile()
    return bool(found)


def _is_classifier(module: fx.GraphModule, node: Node) -> bool:
    linear = operators.called_module(module, node)
    if type(linear) is not nn.Linear or node.kwargs or linear.weight.numel() > MOST_WEIGHTS:
        return False
    if linear.weight.dtype != torch.float32 or linear.weight.device.type != "cpu":
        return False
    flat = node.args[0]
    if not isinstance(flat, Node) or len(flat.users) > 1 or not _flattens(flat):
        return False
    pool = flat.args[0]
    if not isinstance(pool, Node) or len(pool.users) > 1:
        return False
    if not isinstance(layer_of(module, pool), nn.AdaptiveAvgPool2d):
        return False
    conv = pool.args[0]
    return isinstance(conv, Node) and isinstance(operators.called_module(module, conv), GroupConv2d)


def _flattens(node: Node) -> bool:
    named = (node.op, node.target) in {("call_function", torch.flatten), ("call_method", "flatten")}
    return named and node.args[1:] == (1,) and not node.kwargs


def _convolve(module: fx.GraphModule, node: Node) -> None:
    """From pool, flatten, linear to pool, convolution, flatten."""
    linear: Any = operators.called_module(module, node)
    filters, channels = linear.weight.shape
    group = FilterGroup(np.arange(filters), np.arange(channels), linear.weight[..., None, None])
    pixel = [1, 1], [1, 1], [0, 0], [1, 1]
    conv = GroupConv2d(pixel, [group], channels, filters, linear.bias).eval()
    name = f"{node.name}_in_run"
    module.add_submodule(name, conv)
    flat: Any = node.args[0]
    with module.graph.inserting_before(flat):
        call = module.graph.call_module(name, (flat.args[0],))
    flat.replace_input_with(flat.args[0], call)
    node.replace_all_uses_with(flat)
    module.graph.erase_node(node)
