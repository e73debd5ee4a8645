"""What is kept of a pruned network, so that it can be built and timed again: no weights.

Of a network with groups the masks, packed; of one with fewer channels the width of every layer.
"""

import base64
import zlib
from typing import Any

import numpy as np
import torch
from torch import nn

import dspfx
from dspfx.gates import gated_layers


def shape_of(model: nn.Module) -> dict[str, Any]:
    """Plain values that `masks_of` or a builder understands."""
    if isinstance(model, dspfx.PreparedModule):
        masks = [layer.gate.mask for layer in gated_layers(model).values()]
        bits = np.packbits(torch.cat([mask.flatten() for mask in masks]).numpy())
        return {"masks": base64.b64encode(zlib.compress(bits.tobytes(), 9)).decode()}
    convs = {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    return {"filters": convs}
