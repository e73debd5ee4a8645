"""What operators do to numbers of 8 bits: which compute with them, clip, move or add them.

As in `passes.analysis.operators`, an operator is found by identity, a method by its name, a module
by its type.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Node

from dspfx.passes.analysis import operators
from dspfx.passes.analysis.operators import Key

CONVOLUTIONS: frozenset[Key] = frozenset(
    (*(torch.conv1d, torch.conv2d, torch.conv3d), *(F.conv1d, F.conv2d, F.conv3d))
)
LAYERS: frozenset[Key] = CONVOLUTIONS | {F.linear}

# what an integer kernel does for nothing as it rounds: the range of the result begins at zero
CLIPS: frozenset[Key] = frozenset(
    (nn.ReLU, nn.ReLU6, nn.Hardtanh, torch.relu, F.relu, F.relu6, F.hardtanh, "relu")
)

# the result has values of the input alone, and perhaps zeros: it is rounded to the same numbers
MOVES: frozenset[Key] = frozenset(
    (
        *operators.RELAYOUTS,
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.UpsamplingNearest2d),
        *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
        *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
        *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
        *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
        *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.pixel_shuffle, F.pixel_unshuffle),
        *(torch.reshape, torch.flatten, torch.permute, torch.transpose, torch.movedim),
        *(torch.squeeze, torch.unsqueeze, torch.narrow, torch.index_select, torch.zeros_like),
        *("reshape", "view", "flatten", "permute", "transpose", "movedim", "squeeze"),
        *("unsqueeze", "narrow", "index_select", "expand", "unflatten", "swapaxes"),
        *(torch.channel_shuffle, operator.getitem),
    )
)

ADDITIONS = operators.ADDITIONS
CONCATENATIONS: frozenset[Key] = frozenset((torch.cat, torch.concat, torch.concatenate))

_PADS: frozenset[Key] = frozenset(
    (
        *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
        *(nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    )
)

# products that stay as they are
_PRODUCTS: frozenset[Key] = frozenset(
    (
        *(torch.matmul, torch.bmm, torch.einsum, torch.baddbmm, torch.addmm, "matmul", "bmm"),
        *(operator.matmul, F.scaled_dot_product_attention, F.bilinear),
        *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    )
)


def moves(node: Node, root: nn.Module) -> bool:
    """Whether the result of `node` has values of its first operand alone, and perhaps zeros."""
    key = operators.key(node, root)
    if key is F.pad:
        return not pads(node, root)
    if key is nn.Upsample:
        module: Any = root.get_submodule(str(node.target))
        return bool(module.mode == "nearest")
    if key is F.interpolate:
        return bool(node.kwargs.get("mode", "nearest") == "nearest" and len(node.args) < 4)
    return key in MOVES


def pads(node: Node, root: nn.Module) -> bool:
    """Whether `node` puts a constant around its input, which is not rounded before that.

    OpenVINO pads integers with 0, whatever number stands for zero.
    """
    key = operators.key(node, root)
    if key is F.pad:
        mode = node.kwargs.get("mode", node.args[2] if len(node.args) > 2 else "constant")
        return bool(mode == "constant")
    return key in _PADS


def whole(node: Node, root: fx.GraphModule) -> str | None:
    """Why the multiplications that `node` does stay in float32; None if it does none."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        weights = [p for p in module.parameters() if p.dim() > 1]
        if not weights or isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm):
            return None
        return f"{type(module).__name__} is called whole, and has no form with integers"
    if node.op in ("call_function", "call_method") and operators.key(node, root) in _PRODUCTS:
        return "it is no layer with a weight of its own"
    return None
