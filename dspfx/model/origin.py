"""`Origin`: how a module came to be prepared, as far as its graph does not show it."""

from dataclasses import dataclass

import torch

from dspfx.passes.sandbox.calls import Call

TRACING = 1  # how graphs are made now


@dataclass(frozen=True)
class Origin:
    """What has to be known to prepare another module of the same architecture alike.

    Attributes:
        call: the arguments that it was traced for.
        opaque: names of the modules that were not to be traced into.
        gate_first: whether layers that read the inputs directly were gated too.
        dtype: of its parameters then.
        tracing: how its graph was made: 0 by versions that took types and devices of parameters for
            constants, and left whole numbers among its inputs unchecked; files have such graphs.
    """

    call: Call
    opaque: frozenset[str]
    gate_first: bool
    dtype: torch.dtype
    tracing: int = TRACING
