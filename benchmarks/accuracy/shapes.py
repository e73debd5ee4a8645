"""What is kept of a pruned network, so that it can be built and timed again: no weights.

Of a network with groups the masks, packed; of one with fewer channels the filters of every layer.
"""

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

import dspfx
from benchmarks.accuracy.scenarios import IMAGE, Scenario
from dspfx.layers.gated import gated_layers
from dspfx.recipe.networks.cifar_resnet import CifarResNet


def shape_of(model: nn.Module) -> dict[str, Any]:
    """Plain values from which `rebuilt` makes a network of the same layers."""
    if isinstance(model, dspfx.PreparedModule):
        masks = [layer.gate.mask for layer in gated_layers(model).values()]
        bits = np.packbits(torch.cat([mask.flatten() for mask in masks]).numpy())
        return {"masks": base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode()}
    convs = {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {"filters": convs}


def rebuilt(scenario: Scenario, shape: Mapping[str, Any]) -> nn.Module:
    """The network with random weights, in evaluation mode: compact if it has groups.

    Raises:
        NotImplementedError: a network with fewer channels that is no CIFAR ResNet.
    """
    model = scenario.build().eval()
    if "masks" in shape:
        return dspfx.convert(_masked(model, shape["masks"]))
    if not shape:
        return model
    if not isinstance(model, CifarResNet):
        raise NotImplementedError("only CIFAR ResNets are built anew with fewer channels")
    filters = shape["filters"]
    blocks = [name for name in filters if name.endswith("conv_b")]
    first, second, third = (
        next(filters[name] for name in blocks if name.startswith(f"stage_{stage}"))
        for stage in (1, 2, 3)
    )
    inner = [filters[name.replace("conv_b", "conv_a")] for name in blocks]
    depth = 2 * len(blocks) + 2
    return CifarResNet(depth, widths=(first, second, third), inner=inner).eval()


def _masked(model: nn.Module, packed: str) -> nn.Module:
    prepared = dspfx.prepare(
        model, IMAGE.repeat(2, 1, 1, 1), config=dspfx.PrepareConfig(groups=10_000)
    )
    raw = np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8)
    bits = torch.from_numpy(np.unpackbits(raw)).bool()
    masks = {}
    for name, layer in gated_layers(prepared).items():
        mask = layer.gate.mask
        own, bits = bits[: mask.numel()], bits[mask.numel() :]
        masks[name] = own.reshape(mask.shape)
    dspfx.set_masks(prepared, masks)
    return prepared
