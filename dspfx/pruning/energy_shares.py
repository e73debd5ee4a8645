"""What layers lose of their energy, in place of the loss's sensitivities where there is no data.

1. A channel that goes whole: its shares of the energies of all layers that write or read it, added.
2. A channel that a group of filters drops: its share, in these filters, of the layer's energy.

A share is of what the layer has left when all that is weaker is gone: what a network keeps of its
signal is the product of what its layers keep, and the last channel of a layer counts for all of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspfx.layers.gated import gated_layers
from dspfx.model.analysed import analyse_prepared
from dspfx.model.parts import Part
from dspfx.passes.analysis.channel_ops import Mix
from dspfx.pruning.channel_order import sides
from dspfx.pruning.criteria import Criteria, strongest
from dspfx.utils.arrays import FloatArray


@dataclass(frozen=True)
class EnergyShares:
    """Of one prepared module; what stays at any rate counts as infinite.

    Attributes:
        classes: float64 `[classes]`.
        groups: name of a gated layer -> float64 `[S, G, C/S]`.
    """

    classes: Tensor
    groups: Mapping[str, Tensor]

    @staticmethod
    def of(part: Part, criteria: Criteria, *, whole: bool = True) -> "EnergyShares":
        """The shares of `part`; without `whole`, no channel goes from the whole model."""
        analysis = analyse_prepared(part.module)
        both = list(sides(part, analysis))
        mixes = {side.mix.layer: side.mix for side in both}
        energies = {name: energies_of_sides(part, mix, criteria) for name, mix in mixes.items()}
        classes, stays = np.zeros(analysis.class_count), np.zeros(analysis.class_count, bool)
        for side in both:
            own = energies[side.mix.layer][0 if side.writes else 1]
            classes += np.bincount(side.classes, _shares(own), len(classes))
        for side in both:
            least = criteria.least_of(part.full_name(side.mix.layer), len(side.classes))
            stays[side.classes[strongest(classes[side.classes], least)]] = True
        classes[stays | (not whole)] = np.inf
        groups = {
            name: torch.from_numpy(_of_groups(part, mixes[name], criteria))
            for name in gated_layers(part.module)
            if name in mixes
        }
        return EnergyShares(torch.from_numpy(classes), groups)

    def unknown(self) -> tuple[Tensor, frozenset[str]]:
        """Nothing: a weight is always known."""
        return torch.zeros(len(self.classes), dtype=torch.bool), frozenset()


def energies_of_sides(part: Part, mix: Mix, criteria: Criteria) -> tuple[FloatArray, FloatArray]:
    """The energies of what a layer writes, `[O]`, and of what it reads, `[C]`."""
    layer = part.module.get_submodule(mix.layer)
    energies = criteria.energies(part.full_name(mix.layer), layer)
    by_structure = energies.reshape(mix.structural_groups, -1, energies.shape[1])
    return energies.sum(1), by_structure.sum(1).reshape(-1)


def energies_of_groups(
    energies: FloatArray, group: np.ndarray, groups: int, structural: int
) -> FloatArray:
    """`[S, G, C/S]` from `energies`, `[O, C/S]`, of a layer whose filters are in `group`, `[O]`."""
    members = np.eye(groups)[group].reshape(structural, -1, groups)  # [S, O/S, G]
    by_structure = energies.reshape(structural, -1, energies.shape[1])  # [S, O/S, C/S]
    found: FloatArray = np.einsum("sog,soc->sgc", members, by_structure)
    return found


def _of_groups(part: Part, mix: Mix, criteria: Criteria) -> FloatArray:
    layer, name = gated_layers(part.module)[mix.layer], part.full_name(mix.layer)
    group = layer.gate.assignment.cpu().numpy()
    energies = criteria.energies(name, layer)
    found = energies_of_groups(energies, group, len(layer.gate.logits), mix.structural_groups)
    shares = _shares(found)
    shares[strongest(found, criteria.least_of(name, found.shape[-1]))] = np.inf
    return shares


def _shares(energies: FloatArray) -> FloatArray:
    """Of what is left of all `energies` when smaller ones are gone; zero where there is nothing."""
    order = np.argsort(energies, axis=None, kind="stable")
    own = energies.ravel()[order]
    left = np.cumsum(own[::-1])[::-1]
    shares = np.empty_like(own)
    shares[order] = np.divide(own, left, out=np.zeros_like(own), where=left > 0)
    found: FloatArray = shares.reshape(energies.shape)
    return found
