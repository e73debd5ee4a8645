"""Slice modules to their kept channels, fold masks and norms in, and remove what is unused."""

import copy
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node

from dspfx.layers.gated import GatedLayer
from dspfx.layers.narrow_norm import NARROW_FORM, narrow_norm
from dspfx.layers.parametrised import make_plain
from dspfx.layers.weights import filters_first, folded_batch_norm
from dspfx.passes.analysis import operators
from dspfx.passes.analysis.channel_ops import ChannelAnalysis, Elementwise, Statistics
from dspfx.passes.transforms.plan import CompactionPlan, LayerPlan, Order
from dspfx.utils.arrays import IntArray


def private_copy(module: nn.Module, kept: Order, channels: int) -> nn.Module:
    """A frozen copy, of whose `channels` only those `kept` are left."""
    own = copy.deepcopy(module)
    make_plain(own)
    if kept is not None and len(kept):
        narrow = narrow_norm(own, kept) if len(kept) < channels else None
        if narrow is not None:
            return narrow
        _cut(own, kept, channels)
    if operators.is_torchs(own) and hasattr(own, "inplace"):
        setattr(own, "inplace", False)  # noqa: B010 (activations do not declare it)
    for parameter in own.parameters():
        parameter.detach_()
    return own


def narrow_call(norm: Node, width: int) -> None:
    """Make the call of a norm one over `width` channels, of which its operand has some."""
    form = NARROW_FORM[norm.target]
    _, _, *names = inspect.signature(form).parameters
    given = dict(zip(("input", "normalized_shape", *names), norm.args, strict=False)) | norm.kwargs
    norm.target, norm.args = form, (given["input"], width)
    norm.kwargs = {name: given[name] for name in names if name in given}


def bytes_of(tensor: Tensor) -> bytes:
    """The elements of a tensor as bytes, to compare tensors by."""
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def is_whole(wanted: IntArray, channels: int) -> bool:
    """Whether `wanted` is all channels in their order."""
    return np.array_equal(wanted, np.arange(channels))


def _cut(module: nn.Module, wanted: IntArray, channels: int) -> None:
    """Keep the `wanted` channels of a channelwise module's parameters and buffers."""
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers())}
    for name, tensor in tensors.items():
        if tensor.dim() and len(tensor) == channels:
            kept = tensor.detach()[torch.from_numpy(wanted).to(tensor.device)].clone()
            own = nn.Parameter(kept, False) if isinstance(tensor, nn.Parameter) else kept
            setattr(module, name, own)
    for count in ("num_features", "num_parameters", "in_channels", "out_channels", "groups"):
        if getattr(module, count, None) == channels:
            setattr(module, count, len(wanted))


def folded_weight(
    source: fx.GraphModule, layer: Any, plan: LayerPlan, computed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Masked weight `[O, C/S, *taps]` and bias `[O]` of a layer, its batch norm folded in.

    The weight is `computed` where that is given.
    """
    weight, bias = layer.weight if computed is None else computed, layer.bias
    if isinstance(layer, GatedLayer):
        weight, bias = layer.masked(weight)
    weight = filters_first(layer, weight.detach())
    if plan.norm is None:
        return weight, None if bias is None else bias.detach()
    norm = source.get_submodule(str(plan.norm.target))
    scale, bias = folded_batch_norm(norm, bias)
    return weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), bias


def constant_dim(analysis: ChannelAnalysis, plan: CompactionPlan, node: Node, whole: Tensor) -> int:
    """The dimension of a directly used parameter that its one reader cuts."""
    for reader, op in analysis.ops.items():
        if isinstance(op, Statistics) and node in op.operands and reader in plan.order:
            return 0
        if isinstance(op, Elementwise) and node in op.operands and reader in plan.order:
            value = analysis.values[reader]
            assert value.dim is not None
            return value.dim - len(value.shape) + whole.dim()
    raise AssertionError(f"{node} is cut but has no reader that cuts it")


def device_of(root: nn.Module) -> torch.device:
    """The device of a module's first tensor; the CPU without any."""
    return next((t.device for t in (*root.parameters(), *root.buffers())), torch.device("cpu"))


def remove_unused(graph: fx.Graph, root: nn.Module) -> None:
    """Remove dead nodes, and then the modules and buffers that no node uses."""
    operators.remove_dead_code(graph)
    named = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    _prune_tree(root, "", named)


def _prune_tree(module: nn.Module, prefix: str, named: set[str]) -> bool:
    """Remove what is not in `named` from `module`; whether anything is left of it."""
    if prefix[:-1] in named:
        return True
    for name, child in list(module.named_children()):
        if not _prune_tree(child, f"{prefix}{name}.", named):
            delattr(module, name)
    for name in [*dict(module.named_parameters(recurse=False)), *module._buffers]:
        if f"{prefix}{name}" not in named:
            delattr(module, name)
    return any(True for _ in module.children()) or bool(module._buffers) or bool(module._parameters)
