"""`Origin`: how a module came to be prepared, as far as its graph does not show it."""

from dataclasses import dataclass

import torch

from dspfx.passes.sandbox.calls import Call


@dataclass(frozen=True)
class Origin:
    """What has to be known to prepare another module of the same architecture alike.

    Attributes:
        call: the arguments that it was traced for.
        opaque: names of the modules that were not to be traced into.
        gate_first: whether layers that read the inputs directly were gated too.
        dtype: of its parameters then.
    """

    call: Call
    opaque: frozenset[str]
    gate_first: bool
    dtype: torch.dtype
