"""Random numbers that depend on where a run is, not on how it came there.

What is drawn for a batch follows from the seed of the run, the phase, the epoch and the number of
the batch alone. A run that is resumed in the middle of an epoch draws what it would have drawn.
"""

import hashlib

import torch


def seed_of(*place: int | str) -> int:
    """A seed of 63 bits for `place`, any numbers and names."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], "big") >> 1


def generator_of(*place: int | str) -> torch.Generator:
    """A new generator, on the CPU, with the seed of `place`."""
    return torch.Generator().manual_seed(seed_of(*place))
