"""The inputs of the groups of one layer, and its filters, in an order in which they go."""

from dataclasses import dataclass, replace

import numpy as np

from dspfx.passes.analysis.channel_ops import Mix
from dspfx.passes.analysis.liveness import ReadLists
from dspfx.utils.arrays import BoolArray, IntArray


@dataclass(frozen=True)
class PrunableLayer:
    """The sorted energies of one layer, from which any threshold gives read lists.

    Attributes:
        mix: the layer in the analysis.
        group: int `[O]`.
        lost_channels: `[S, G, C/S]`, the share of its group's energy that is lost when the
            channel and all weaker ones are dropped.
        lost_filters: `[O]`, likewise for filters; infinite where filters may not be dropped.
        alive: bool `[O]`, the filters that may be kept at most.
        mask: bool `[O, C/S]`, what they may read at most; None if that is what their groups may.
    """

    mix: Mix
    group: IntArray
    lost_channels: np.ndarray
    lost_filters: np.ndarray
    alive: BoolArray
    mask: BoolArray | None = None

    @staticmethod
    def of(mix: Mix, mask: BoolArray, *orders: np.ndarray) -> "PrunableLayer":
        """The orders of a layer that has `mask` at present, perhaps from other groups."""
        layer = PrunableLayer(mix, *orders)
        revived = layer.reads(0.0, 1).mask(mix) & ~mask
        return replace(layer, mask=mask) if revived.any() else layer

    def reads(self, beta: float, round_to: int, live: BoolArray | None = None) -> ReadLists:
        """The read lists at threshold `beta`, in multiples of `round_to`, of `live` inputs only."""
        lost = self.lost_channels
        if live is not None:
            lost = np.where(live.reshape(len(lost), 1, -1), lost, -1.0)
        keep = _above(lost, beta, round_to)
        alive = self.alive & _above(self.lost_filters, beta, round_to)
        found = ReadLists.grouped(self.mix, self.group, keep, alive)
        if self.mask is None:
            return found
        return ReadLists.masked(self.mix, found.mask(self.mix) & self.mask)


def _above(lost: np.ndarray, beta: float, round_to: int) -> BoolArray:
    """True where `lost` is at least `beta`, and for the next best that make the number a multiple.

    What has no energy at all is never among them.
    """
    keep: BoolArray = lost >= beta
    if round_to == 1:
        return keep
    count = keep.sum(-1, keepdims=True)
    wanted = np.minimum(-(-count // round_to) * round_to, (lost >= 0).sum(-1, keepdims=True))
    rank = np.argsort(np.argsort(-lost, axis=-1, kind="stable"), axis=-1)
    above: BoolArray = rank < wanted
    return above
