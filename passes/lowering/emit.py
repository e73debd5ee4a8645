"""Emit the module that computes a layer in the form chosen for it.

A branch is one ordinary layer. Several branches, or one that gathers its inputs, are put side by
side by `Branches`.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dspfx.layers.branches import Branches
from dspfx.layers.weights import TRANSPOSED, as_weight
from dspfx.passes.lowering.forms import Branch, Lowering, written
from dspfx.utils.arrays import IntArray

_PLAIN = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


def emit(
    layer: Any,
    weight: Tensor,
    bias: Tensor | None,
    lowering: Lowering,
    filters: IntArray,
    inputs: IntArray,
    structural_groups: int = 1,
) -> nn.Module:
    """What computes `layer` as `lowering` says.

    Args:
        layer: a linear layer or a convolution, perhaps transposed; only read.
        weight: `[O, C/S, *taps]`, zero where a filter does not read.
        bias: `[O]`, or None.
        lowering: counts filters and channels as they are stored.
        filters: the number, in `weight`, of every filter stored.
        inputs: the number, in the input of `layer`, of every channel stored.
        structural_groups: S, the structural groups in which `weight` is stored.
    """
    layers = [
        _branch(layer, branch, weight, bias, filters, inputs, structural_groups)
        for branch in lowering
    ]
    reads = [np.maximum(branch.inputs.reshape(-1), 0) for branch in lowering]
    outputs = written(lowering)
    order = np.argsort(outputs, kind="stable")[(outputs < 0).sum() :]
    as_it_is = np.array_equal(reads[0], np.arange(len(inputs)))
    if len(layers) == 1 and as_it_is and np.array_equal(order, np.arange(len(outputs))):
        return layers[0]
    return Branches(layers, reads, order, len(inputs))


def _branch(
    layer: Any,
    branch: Branch,
    weight: Tensor,
    bias: Tensor | None,
    filters: IntArray,
    inputs: IntArray,
    structural_groups: int,
) -> nn.Module:
    """One grouped convolution, or a linear layer, of the filters and inputs of `branch`."""
    device, width = weight.device, weight.shape[1]
    own = filters[branch.filters]
    # each filter's weights are stored from the first channel of its own structural group on
    first = own // (len(weight) // structural_groups) * width
    if alike := own.size > 0 and bool((first == first[:, :1]).all()):
        first = first[:, :1]
    read = inputs[branch.inputs][:, None] - first[:, :, None]
    reads = (branch.inputs >= 0)[:, None] & (read >= 0) & (read < width)
    real = branch.filters >= 0
    rows, columns = (torch.from_numpy(x).to(device) for x in (own, read.clip(0, width - 1)))
    if alike:  # all filters of a group read the same channels: far faster
        pairs = zip(rows, columns[:, 0], strict=True)
        cut = torch.cat([weight.index_select(0, o).index_select(1, i) for o, i in pairs])
    else:
        cut = weight[rows[:, :, None], columns].flatten(0, 1)
    if not (reads.all() and real.all()):
        kept = torch.from_numpy(reads & real[:, :, None]).to(device).flatten(0, 1)
        cut = torch.where(kept.reshape(*kept.shape, *[1] * (cut.dim() - 2)), cut, 0)
    if bias is not None:
        bias = torch.where(torch.from_numpy(real).to(device), bias[rows], 0).flatten()
    return like(layer, as_weight(layer, cut, len(branch.inputs)), bias, len(branch.inputs))


def like(layer: Any, weight: Tensor, bias: Tensor | None, groups: int) -> nn.Module:
    """A frozen layer of torch's own of the kind and settings of `layer`, with another weight.

    It takes over `weight` and `bias`, which are not copied.

    Args:
        layer: a linear layer or a convolution, perhaps transposed.
        weight: in the form in which such a layer stores it.
        bias: `[O]`, or None.
        groups: of the convolution.
    """
    kind: Any = nn.Linear
    settings = [*_SETTINGS, *(["output_padding"] if isinstance(layer, TRANSPOSED) else [])]
    count, reads = weight.shape[0], weight.shape[1]
    if isinstance(layer, nn.Linear):
        new: nn.Module = _undrawn(nn.Linear)(reads, count, bias is not None, device="meta")
    else:
        how = {name: getattr(layer, name) for name in settings}
        kind = next(k for k in _PLAIN if isinstance(layer, k))
        # transposed convolutions store [C, O/S, *taps]
        sizes = (groups * reads, count)[:: -1 if isinstance(layer, TRANSPOSED) else 1]
        new = _undrawn(kind)(*sizes, **how, groups=groups, bias=bias is not None, device="meta")
    new.__class__ = kind
    if isinstance(layer, TRANSPOSED):
        weight = weight.contiguous()  # a transposed view, which torch.export.save warns of
    new._parameters["weight"] = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        new._parameters["bias"] = nn.Parameter(bias.detach(), requires_grad=False)
    return new


@functools.cache
def _undrawn(kind: Any) -> Any:
    """`kind` without drawing weights that others take the place of, which takes long."""
    return type(kind.__name__, (kind,), {"reset_parameters": lambda _: None})
