"""The energy of a layer's weights, `E[o,c] = sum_k W[o,c,k]^2`, for pruning and grouping."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dspfx.errors import DataError, PrepareError
from dspfx.layers.gated import GatedLayer
from dspfx.layers.parametrised import weight_of
from dspfx.layers.weights import energy, filters_first, structural_groups
from dspfx.utils.arrays import FloatArray
from dspfx.utils.wrappers import unwrapped


def check_moments(moments: Mapping[str, Tensor] | None, model: nn.Module) -> None:
    """Refuse moments of other layers than those of `model`; None and an empty dict are fine.

    Raises:
        DataError: they are of another model, or no dict of tensors.
    """
    if moments is None:
        return
    names = dict(unwrapped(model).named_modules()).keys()
    known = isinstance(moments, Mapping) and all(isinstance(x, Tensor) for x in moments.values())
    if not known or (moments and not moments.keys() & names):
        raise DataError(
            "the moments are of no layer of this model; measure them by dspfx.input_moments on it"
        )


@torch.no_grad()
def energies_of(
    name: str, layer: nn.Module, moments: Mapping[str, Tensor] | None = None
) -> FloatArray:
    """`[O, C/S]` of the layer that is called `name`, zero where its weight is masked.

    Args:
        name, layer: the layer.
        moments: name -> `[C]`, what every channel's energy is multiplied by; see
            `dspfx.input_moments`. Layers that are not among them count by their weights alone.

    Raises:
        PrepareError: the weight is not finite.
        DataError: the moments are of other channels, negative or not finite.
    """
    weight = layer.masked(weight_of(layer))[0] if isinstance(layer, GatedLayer) else None
    energies: FloatArray = energy(filters_first(layer, weight).double()).cpu().numpy()
    if not np.isfinite(energies).all():
        raise PrepareError(f"{name} holds NaN or infinite weights; repair them first")
    if moments is None or name not in moments:
        return energies
    groups, (filters, channels) = structural_groups(layer), energies.shape
    own = moments[name].detach().double().cpu().numpy()
    if own.shape != (groups * channels,) or not (np.isfinite(own) & (own >= 0)).all():
        raise DataError(
            f"the moments of {name} are not those of its {groups * channels} input channels; "
            "measure them by dspfx.input_moments on this very model"
        )
    weighted: FloatArray = energies * own.reshape(groups, channels).repeat(filters // groups, 0)
    return weighted
