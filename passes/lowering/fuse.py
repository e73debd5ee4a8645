"""Operator fusion: fold what surrounds a native convolution into it.

    index_select -> GroupConv2d -> BatchNorm2d -> add(_, y) -> relu    becomes    GroupConv2d(x, y)

1. Input gather: channels that are only moved (narrow, index_select, pad, cat with zeros) before a
   convolution or its residual. Its lists name the channels where they come from.
2. Output scatter: channels that are only moved after a convolution. It writes them in place.
3. conv -> batch norm in evaluation: folded into the weight and bias of the convolution.
4. conv -> add with a tensor of the same shape, at every image and batch size: the other operand
   becomes the residual of the convolution.
5. conv -> activation that the kernel knows: it becomes the convolution's.

Only where the value in between has no other reader, and in that order; a sum after an activation is
left alone. A convolution that is called several times becomes several.
"""

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import Node

from dspfx.layers.group_conv import Added, FilterGroup, GroupConv2d
from dspfx.layers.weights import folded_batch_norm
from dspfx.passes.analysis import operators
from dspfx.utils.arrays import IntArray

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
        module: a graph that calls `GroupConv2d` layers.
        inputs: of `module`; shapes are found with them.
    """
    _skip_identities(module)
    _separate_calls(module)
    fusion = _Fusion(module, inputs)
    fused = False
    for node in list(module.graph.nodes):
        if isinstance(operators.called_module(module, node), GroupConv2d):
            fused |= fusion.fold_input_gather(node)
            fused |= fusion.fold_output_scatter(node)
            fused |= fusion.fold_batch_norm(node)
            fused |= fusion.fuse_add(node)
            fused |= fusion.fuse_activation(node)
    operators.remove_dead_code(module.graph)
    module.graph.lint()
    module.recompile()
    return fused


@dataclass(frozen=True, eq=False)
class _Moved:
    """A value whose channels are moved from another value.

    Attributes:
        source: where they come from; None if all are zero.
        channels: int `[C]`, the channel of the source for each, -1 for zero.
    """

    source: Node | None
    channels: IntArray


class _Seen(NamedTuple):
    """The shape, type and device of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class _Fusion:
    """A graph, and shape, type and device of its tensors."""

    def __init__(self, module: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
        self.module = module
        watched = _Watched(module)
        with torch.no_grad():
            watched.run(*inputs)
        self.seen = watched.seen

    def _channels(self, node: Node) -> int:
        return self.seen[node].shape[1]

    def _moved(self, node: Node) -> _Moved | None:
        """The source of `node` and its channels, if it only moves channels of another value."""
        if node.op != "call_function" or node not in self.seen or len(self.seen[node].shape) != 4:
            return None
        args: Any = node.args
        if node.target is torch.zeros_like:
            return _Moved(None, np.full(self._channels(node), -1))
        if node.target is torch.cat and args[1:] == (1,):
            return _together([self._as_moved(part) for part in args[0]])
        added = _channels_added(node)
        if added is not None:
            before = self._as_moved(args[0])
            return _Moved(before.source, np.pad(before.channels, added, constant_values=-1))
        if node.target is torch.narrow and args[1] == 1:
            before, first, count = self._as_moved(args[0]), args[2], args[3]
            if isinstance(first, int) and isinstance(count, int):
                return _Moved(before.source, before.channels[first : first + count])
        if node.target is torch.index_select and args[1] == 1 and args[2].op == "get_attr":
            before = self._as_moved(args[0])
            index: Any = operator.attrgetter(str(args[2].target))(self.module)
            return _Moved(before.source, before.channels[index.cpu().numpy()])
        return None

    def _as_moved(self, node: Node) -> _Moved:
        return self._moved(node) or _Moved(node, np.arange(self._channels(node)))

    def _conv(self, node: Node) -> GroupConv2d:
        conv = operators.called_module(self.module, node)
        assert isinstance(conv, GroupConv2d)
        return conv

    def _become(self, node: Node, conv: GroupConv2d) -> None:
        self.module.set_submodule(str(node.target), conv)

    def fold_input_gather(self, node: Node) -> bool:
        """1: the convolution reads channels where they come from."""
        (x, *others) = node.args
        moved = self._moved(x) if isinstance(x, Node) else None
        if moved is None or moved.source is None:
            return False
        conv, groups = self._conv(node), []
        for group in conv.groups():
            inputs = moved.channels[group.inputs]
            real = inputs >= 0
            weight = group.weight[:, torch.from_numpy(real)]
            groups.append(FilterGroup(group.filters, inputs[real], weight))
        if not _reads_any(groups):
            return False
        self._become(node, conv.remade(groups=groups, channels=self._channels(moved.source)))
        node.args = (moved.source, *others)
        return True

    def fold_output_scatter(self, node: Node) -> bool:
        """2: the convolution writes channels to where they go, if they all go to one value."""
        conv = self._conv(node)
        between = self._moves_after(node)
        ends = [n for n in (node, *between) if any(r not in between for r in n.users)]
        moved = self._moved(ends[0]) if len(ends) == 1 else None
        if moved is None or moved.source is not node:
            return False
        place = np.full(conv.count, -1)
        kept = np.flatnonzero(moved.channels >= 0)
        place[moved.channels[kept]] = kept
        if len(kept) != (place >= 0).sum() or conv.activation != "none" or conv.adds:
            return False  # a channel goes to two places, or what is zero would not be
        groups = []
        for group in conv.groups():
            real = place[group.filters] >= 0
            weight = group.weight[torch.from_numpy(real)]
            groups.append(FilterGroup(place[group.filters[real]], group.inputs, weight))
        if not _reads_any(groups):
            return False
        bias = None
        if conv.bias is not None:
            own: Any = conv.bias
            bias = own.new_zeros(len(moved.channels))
            bias[torch.from_numpy(kept)] = own[torch.from_numpy(moved.channels[kept])]
        self._become(node, conv.remade(groups=groups, filters=len(moved.channels), bias=bias))
        self.seen[node] = self.seen[ends[0]]
        ends[0].replace_all_uses_with(node)
        for move in sorted(between, reverse=True):
            self.module.graph.erase_node(move)
        return True

    def _moves_after(self, node: Node) -> list[Node]:
        """All values made of `node` by moving channels."""
        found = [node]
        for value in found:  # grows
            found += [r for r in value.users if r not in found and self._moved(r) is not None]
        return found[1:]

    def fold_batch_norm(self, node: Node) -> bool:
        """3: a batch norm after the convolution is folded into its filters and bias."""
        reader, conv = _only_reader(node), self._conv(node)
        norm = None if reader is None else operators.called_module(self.module, reader)
        if reader is None or type(norm) is not nn.BatchNorm2d or norm.training:
            return False
        if norm.running_mean is None or norm.running_var is None or conv.activation != "none":
            return False
        if conv.adds or len(reader.args) != 1:
            return False
        own: Any = conv.bias
        scale, bias = folded_batch_norm(norm, own, torch.float64)
        groups = [
            FilterGroup(
                group.filters,
                group.inputs,
                (group.weight * scale[torch.from_numpy(group.filters), None, None, None]).float(),
            )
            for group in conv.groups()
        ]
        self._become(node, conv.remade(groups=groups, bias=bias.float()))
        reader.replace_all_uses_with(node)
        reader.graph.erase_node(reader)
        return True

    def fuse_add(self, node: Node) -> bool:
        """4: the other operand of a sum becomes the residual."""
        add = _only_reader(node)
        if add is None or len(node.args) != 1 or add.op not in ("call_function", "call_method"):
            return False
        if add.target not in _ADDS or len(add.args) != 2 or add.kwargs:
            return False
        (other,) = [a for a in add.args if a is not node] or [None]
        if not isinstance(other, Node) or self.seen.get(other) != self.seen[node]:
            return False
        if 1 in self.seen[node].shape[2:] or not self._depends_on_inputs(other):
            return False  # the sum of larger images, or of more, may broadcast
        moved = self._as_moved(other)
        if moved.source is None:
            return False
        add.prepend(node)  # after the other operand
        node.args = (*node.args, moved.source)
        added = Added(self._channels(moved.source), moved.channels)
        self._become(node, self._conv(node).remade(added=added))
        add.replace_all_uses_with(node)
        add.graph.erase_node(add)
        return True

    def _depends_on_inputs(self, node: Node) -> bool:
        """Whether `node` depends on the values of inputs, not on their sizes alone."""
        found = [node]
        for value in found:  # grows
            found += [x for x in value.all_input_nodes if x in self.seen and x not in found]
        return any(value.op == "placeholder" for value in found)

    def fuse_activation(self, node: Node) -> bool:
        """5: the activation after the convolution becomes its own."""
        act, conv = _only_reader(node), self._conv(node)
        if act is None or act.all_input_nodes != [node] or conv.activation != "none":
            return False
        called = operators.called_module(self.module, act)
        key = act.target if called is None else type(called)
        others = {k: v for k, v in act.kwargs.items() if k != "inplace"}
        if key not in _ACTIVATIONS or len(act.args) != 1 or others:
            return False
        self._become(node, conv.remade(activation=_ACTIVATIONS[key]))
        act.replace_all_uses_with(node)
        act.graph.erase_node(act)
        return True


def _reads_any(groups: list[FilterGroup]) -> bool:
    """Whether anything is left for the kernel to multiply."""
    return any(len(group.filters) and len(group.inputs) for group in groups)


def _together(parts: list[_Moved]) -> _Moved | None:
    sources = {part.source for part in parts} - {None}
    if len(sources) != 1:
        return None
    return _Moved(sources.pop(), np.concatenate([part.channels for part in parts]))


def _channels_added(node: Node) -> tuple[int, int] | None:
    """How many zeros a pad puts before and after the channels of an image, if it does no more."""
    if node.target is not F.pad or len(node.args) < 2:
        return None
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    pads: Any = given["pad"]
    zeros = given.get("mode", "constant") == "constant" and given.get("value") in (None, 0)
    known = isinstance(pads, list | tuple) and len(pads) == 6  # width comes first
    known = known and all(type(p) is int and p >= 0 for p in pads)
    return (pads[4], pads[5]) if zeros and known and not any(pads[:4]) else None


class _Watched(fx.Interpreter):
    """Records shape, type and device of every tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[Node, _Seen] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.seen[n] = _Seen(result.shape, result.dtype, result.device)
        return result


def _skip_identities(module: fx.GraphModule) -> None:
    for node in list(module.graph.nodes):
        called = operators.called_module(module, node)
        if type(called) is nn.Identity or (type(called) is nn.Dropout and not called.training):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _separate_calls(module: fx.GraphModule) -> None:
    """Give every call of a convolution a module of its own: each is fused by itself."""
    names: set[str] = set()
    for node in module.graph.nodes:
        conv, name = operators.called_module(module, node), str(node.target)
        if isinstance(conv, GroupConv2d) and name in names:
            node.target = f"{name}_for_{node.name}"
            module.set_submodule(node.target, conv)
        names.add(str(node.target))


def _only_reader(node: Node) -> Node | None:
    (reader,) = node.users if len(node.users) == 1 else (None,)
    return reader
