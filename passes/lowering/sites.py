"""Relowering: read the groups of layers back from a compact model, and emit it in other forms.

In every form, the weight of a layer shows which channels each filter reads: those whose weights are
not all zero. Filters that read the same channels are a group.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dspfx.errors import EquivalenceError
from dspfx.layers import native
from dspfx.layers.branches import Branches
from dspfx.layers.group_conv import GroupConv2d, group_conv_like
from dspfx.layers.weights import filters_first
from dspfx.passes.lowering.cost_model import Geometry
from dspfx.passes.lowering.emit import emit
from dspfx.passes.lowering.forms import MOST_GROUPS, Group, Lowering, groups_of
from dspfx.utils.arrays import BoolArray, equal_rows

# a layer whose weight would have more elements than this, zeros included, is left as it is
MOST_WEIGHTS = 2**26
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True, eq=False)
class Site:
    """A layer of a compact model and how it is called.

    Attributes:
        name: of the module that is called.
        layer: an ordinary layer of the same kind and settings.
        weight: `[O, C/S, *taps]`, zero where a filter does not read.
        bias: `[O]`, or None.
        groups: of filters; channels are counted as they are stored.
        input: shape of the tensor that it reads, and of the one that it writes.
        structural_groups: S, of a layer that has many, as a depthwise one; it is emitted in its own
            form and by the project's kernel only.
    """

    name: str
    layer: nn.Module
    weight: Tensor
    bias: Tensor | None
    groups: tuple[Group, ...]
    input: torch.Size
    output: torch.Size
    structural_groups: int = 1

    @property
    def geometry(self) -> Geometry:
        """For the cost model; of all samples together."""
        (count, channels), taps = self.weight.shape[:2], self.weight.shape[2:].numel()
        read, written = self.input.numel() // channels, self.output.numel() // count
        return Geometry(channels, read, written, max(1, written), taps)

    def example(self) -> Tensor:
        """An input as it comes in a compiled network: images have their channels last."""
        x = torch.randn(self.input, device=self.weight.device, dtype=self.weight.dtype)
        if x.dim() == 4 and not isinstance(self.layer, nn.Linear):
            return x.contiguous(memory_format=torch.channels_last)
        return x

    def emit(self, lowering: Lowering) -> nn.Module:
        """The module that computes this layer as `lowering` says."""
        filters, channels = (np.arange(n) for n in self.weight.shape[:2])
        return emit(self.layer, self.weight, self.bias, lowering, filters, channels).eval()

    def emit_native(self) -> nn.Module | None:
        """The module that computes this layer by the project's own kernel, if that can."""
        conv = self.layer
        if type(conv) is not nn.Conv2d or self.weight.device.type != "cpu" or not native.built():
            return None
        plain = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        if not plain or self.weight.dtype != torch.float32:
            return None
        groups = [(group.filters, group.inputs) for group in self.groups]
        return group_conv_like(conv, groups, self.weight, self.bias, self.structural_groups).eval()


def sites(model: nn.Module, inputs: tuple[Any, ...]) -> list[Site]:
    """The layers of `model`, as they are called for `inputs`.

    Args:
        model: in evaluation mode; it is run once.
        inputs: positional inputs.
    """
    shapes: dict[nn.Module, tuple[torch.Size, torch.Size]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        shapes.setdefault(module, (args[0].shape, output.shape))

    modules = dict(_layers(model))
    hooks = [module.register_forward_hook(note) for module in modules.values()]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    found = (_site(n, m, *shapes[m]) for n, m in modules.items() if m in shapes)
    return [site for site in found if site is not None]


def relowered(model: nn.Module, modules: Mapping[Site, nn.Module]) -> nn.Module:
    """A copy of `model` in which `modules` replace the layers; the rest is shared.

    Raises:
        EquivalenceError: a layer has another weight than before, read back from its new form.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for site, module in modules.items():
        filters, channels = site.weight.shape[:2]
        weight, bias = _whole(module, filters, channels, site.structural_groups)
        if not (_equal(weight, site.weight) and _equal(bias, site.bias)):
            raise EquivalenceError(
                f"layer {site.name!r} changed when it was emitted again. This is a bug of dspfx; "
                "please report the model"
            )
        memo[id(model.get_submodule(site.name))] = module
    return copy.deepcopy(model, memo)


def _layers(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The modules that are layers, those inside `Branches` left out."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        if isinstance(child, (Branches, *_LAYERS)):
            found.append((prefix + name, child))
        else:
            found += _layers(child, f"{prefix}{name}.")
    return found


def _site(name: str, module: nn.Module, input: torch.Size, output: torch.Size) -> Site | None:
    branches = isinstance(module, Branches)
    layer: Any = next(module.children()) if branches else module
    channels = input[-1] if isinstance(layer, nn.Linear) else input[1]
    filters = output[-1] if isinstance(layer, nn.Linear) else output[1]
    taps = layer.weight.shape[2:]
    structured = not branches and getattr(layer, "groups", 1) > MOST_GROUPS
    structural_groups = layer.groups if structured else 1
    if filters * channels // structural_groups * taps.numel() > MOST_WEIGHTS:
        return None
    if structured:
        weight, bias = filters_first(layer).detach(), layer.bias
        own = (
            np.split(np.arange(filters), structural_groups),
            np.split(np.arange(channels), structural_groups),
        )
        groups = [Group(f, c) for f, c in zip(*own, strict=True)]
    else:
        weight, bias = _whole(module, filters, channels)
        reads = (weight != 0).flatten(2).any(2) if len(taps) else weight != 0
        groups = _groups(reads.cpu().numpy())
    return Site(name, layer, weight, bias, tuple(groups), input, output, structural_groups)


def _whole(
    module: Any, filters: int, channels: int, structural_groups: int = 1
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer, as of one convolution over all channels of a structural group."""
    if isinstance(module, GroupConv2d):
        return module.whole(structural_groups), module.bias  # type: ignore[return-value]
    branches = isinstance(module, Branches)
    layers: list[Any] = list(module.children()) if branches else [module]
    reads = [module.read_by(i) for i in range(len(layers))] if branches else [np.arange(channels)]
    order = module.written() if branches else np.arange(filters)
    pieces = []
    for layer, own_reads in zip(layers, reads, strict=True):
        own = filters_first(layer).detach()
        read = torch.from_numpy(own_reads).to(own.device)
        read = read.reshape(getattr(layer, "groups", 1), -1)
        read = read.repeat_interleave(len(own) // len(read), 0)
        piece = own.new_zeros(len(own), channels, *own.shape[2:])
        index = read.reshape(*read.shape, *[1] * (own.dim() - 2)).expand_as(own)
        pieces.append(piece.scatter_add_(1, index, own))  # what only fills up adds nothing
    written = torch.from_numpy(order).to(pieces[0].device)
    weight = torch.cat(pieces)[written]
    if layers[0].bias is None:
        return weight, None
    return weight, torch.cat([layer.bias.detach() for layer in layers])[written]


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return torch.equal(a, b) if a is not None and b is not None else a is b


def _groups(reads: BoolArray) -> list[Group]:
    """The groups of filters with equal rows of `reads`, bool `[O, C]`."""
    return groups_of(np.arange(len(reads)), *equal_rows(reads))
