"""A network whose layers are emitted as branches."""

from small import X
from torch import nn

import dspfx
from helpers import randomise


def grouped(model: nn.Module) -> nn.Module:
    """Compact, half pruned in two groups, each of which is computed by a layer of its own."""
    config = dspfx.PrepareConfig(groups=2)
    prepared = dspfx.prepare(randomise(model).eval(), X, config=config)
    dspfx.cluster_groups(prepared)
    dspfx.prune(prepared, dspfx.Budget(macs=0.5))
    return dspfx.convert(prepared, cost_model=dspfx.FEWEST_WEIGHTS)
