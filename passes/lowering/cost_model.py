"""Cost model: how long a form of a layer is likely to take, where nothing can be measured.

    seconds = call * layers + mac * multiply-accumulates + copy * copied + gather * gathered

1. Multiply-accumulates count whole vectors: the filters and inputs of a group are rounded up.
2. A branch that reads neighbouring channels copies them, any other branch gathers them.
3. Outputs of several branches are copied together; outputs out of order are gathered.

The coefficients are fitted to measurements by `python -m benchmarks.cost_model`.
"""

from dataclasses import dataclass

import numpy as np

from dspfx.passes.lowering.forms import Lowering, written
from dspfx.utils.arrays import is_run


@dataclass(frozen=True)
class Geometry:
    """The sizes of a layer and of the tensors around it.

    Attributes:
        channels: of the tensor that it reads.
        read: elements of one of them, for one sample.
        written: elements of one channel of the output.
        steps: how often each weight is used for one sample, taps not counted.
        taps: elements of the kernel.
    """

    channels: int
    read: int
    written: int
    steps: int
    taps: int


@dataclass(frozen=True)
class CostModel:
    """Seconds for each unit of work, for one sample, on one device.

    Attributes:
        call: of a layer.
        mac: of a multiply-accumulate.
        copy: of an element that is copied among neighbours.
        gather: of an element that is copied from anywhere.
        vector: channels that are computed together.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> report = dspfx.prune(prepared, dspfx.Budget(macs=0.5, count="masks"))
        >>> gathers_cost_nothing = dspfx.CostModel(call=0, mac=1, copy=0, gather=0, vector=1)
        >>> compact = dspfx.convert(prepared, cost_model=gathers_cost_nothing)
        >>> dspfx.report(compact).emitted.macs <= dspfx.report(compact).before.macs
        True
    """

    call: float
    mac: float
    copy: float
    gather: float
    vector: int

    def seconds(self, lowering: Lowering, geometry: Geometry) -> float:
        """The likely time of `lowering`; its filters and inputs are positions of channels."""
        macs = copied = gathered = 0
        for branch in lowering:
            (groups, filters), reads = branch.filters.shape, branch.inputs.shape[1]
            macs += groups * self._whole(filters) * self._whole(reads)
            moved = groups * reads * geometry.read
            if not is_run(branch.inputs.reshape(-1)):
                gathered += moved
            elif groups * reads < geometry.channels:
                copied += moved
        outputs = written(lowering)
        if not np.array_equal(outputs, np.arange(len(outputs))):
            gathered += len(outputs) * geometry.written
        elif len(lowering) > 1:
            copied += len(outputs) * geometry.written
        return (
            self.call * len(lowering)
            + self.mac * macs * geometry.steps * geometry.taps
            + self.copy * copied
            + self.gather * gathered
        )

    def _whole(self, channels: int) -> int:
        return -(-channels // self.vector) * self.vector


# oneDNN on 2 cores with AVX-512; what counts is the ratios
CPU = CostModel(call=2.7e-5, mac=3.9e-12, copy=1.7e-10, gather=1.1e-9, vector=8)
# no more weights than the masks leave, at any cost in time
FEWEST_WEIGHTS = CostModel(call=1e-15, mac=1.0, copy=1e-12, gather=1e-12, vector=1)
