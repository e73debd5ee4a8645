"""The energy of a layer's weights, `E[o,c] = sum_k W[o,c,k]^2`, for pruning and grouping."""

import numpy as np
import torch
from torch import nn

from dspfx.errors import PrepareError
from dspfx.filters import filters_first
from dspfx.gates import GatedLayer
from dspfx.passes.values import FloatArray
from dspfx.penalty import energy


@torch.no_grad()
def energies_of(name: str, layer: nn.Module) -> FloatArray:
    """`[O, C/S]` of the layer that is called `name`, zero where its weight is masked.

    Raises:
        PrepareError: the weight is not finite.
    """
    weight = layer.masked()[0] if isinstance(layer, GatedLayer) else None
    energies: FloatArray = energy(filters_first(layer, weight).double()).cpu().numpy()
    if not np.isfinite(energies).all():
        raise PrepareError(f"{name} holds NaN or infinite weights; repair them first")
    return energies
