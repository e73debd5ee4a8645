"""`cluster_groups`: groups without training, from the weights alone.

What a group of filters loses when it drops input channels is the energy `E[o,c]`, the sum over taps
of `W[o,c,k]^2`, that its filters have there. So this is k-means in which the centre of a cluster is
an order of the channels, the strongest for the cluster first, and a filter joins the cluster that
would keep most of its energy, on average over how many channels are kept:

1. Centres: `rank[g,c]`, the place of channel c when `sum_{o in g} E[o,c]` is sorted downwards.
2. Filters: `g(o) = argmax_g sum_c E[o,c] (1 - rank[g,c] / C)`: of the C possible numbers of kept
   channels, C - rank keep channel c.

Neither step lessens the energy kept, so it ends (Lloyd, "Least squares quantization in PCM", 1982,
for sums of squares); the best of several random starts counts.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dspfx.layers.gated import GatedLayer, gated_layers
from dspfx.layers.weights import structural_groups
from dspfx.model.parts import parts_of
from dspfx.pruning.energy import check_moments, energies_of
from dspfx.utils.arrays import FloatArray, IntArray
from dspfx.utils.wrappers import unwrapped

STARTS = 16
ITERATIONS = 50


def cluster_groups(
    prepared: nn.Module, *, seed: int = 0, moments: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Group the filters of every gated layer by the input channels that their energy lies in.

    A substitute for `GroupLearner` where nothing can be trained: no data is needed, and it takes
    seconds. The groups are as many as the model was prepared for; `prune` then uses them. Equal
    weights and seeds give equal groups.

    Args:
        prepared: from `dspfx.prepare`; only the logits of its gates are changed.
        seed: of the random starts.
        moments: from `input_moments`: energy counts by how strong its channel is.

    Returns:
        Name of a gated layer -> int64 `[O]`, the group of every filter.

    Raises:
        PrepareError: a gated weight is not finite; nothing is changed then.
        DataError: `moments` are of another model; nothing is changed then.
        ConvertError: `prepared` does not come from `dspfx.prepare`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x, config=dspfx.PrepareConfig(groups=2))
        >>> groups = dspfx.cluster_groups(prepared)
        >>> {name: group.shape for name, group in groups.items()}
        {'1': torch.Size([8]), '2': torch.Size([4])}
    """
    prepared = unwrapped(prepared)
    parts_of(prepared)
    check_moments(moments, prepared)
    layers = gated_layers(prepared)
    groups = {name: _groups(name, layer, seed, moments) for name, layer in layers.items()}
    for name, group in groups.items():
        layers[name].gate.assign(group)
    return groups


def _groups(
    name: str, layer: GatedLayer, seed: int, moments: Mapping[str, Tensor] | None
) -> Tensor:
    """The group of every filter; filters of one structural group have only each other."""
    energies = energies_of(name, layer, moments)
    generator = np.random.default_rng(seed)
    count = len(layer.gate.logits)
    blocks = np.split(energies, structural_groups(layer))
    return torch.from_numpy(np.concatenate([_cluster(b, count, generator) for b in blocks]))


def _cluster(energies: FloatArray, count: int, generator: np.random.Generator) -> IntArray:
    """The cluster, less than `count`, of every row of `energies`, `[n, C]`."""
    starts = (generator.permutation(np.arange(len(energies)) % count) for _ in range(STARTS))
    found = (_improved(energies, start, count) for start in starts)
    return max(found, key=lambda f: f[0])[1]


def _improved(energies: FloatArray, group: IntArray, count: int) -> tuple[float, IntArray]:
    """The energy kept by, and the clusters that `group`, `[n]`, leads to."""
    kept = -np.inf
    for _ in range(ITERATIONS):
        by_group = np.eye(count)[group].T @ energies  # [G, C]
        rank = np.argsort(np.argsort(-by_group, axis=1, kind="stable"), axis=1)
        scores = energies @ (1 - rank / energies.shape[1]).T  # [n, G]
        group = scores.argmax(1)
        before, kept = kept, float(scores.max(1).sum())
        if kept <= before:
            break
    return kept, group
