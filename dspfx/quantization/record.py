"""`Quantization`: what a quantised compact module carries, as plain data."""

import math
from dataclasses import dataclass

from dspfx.quantization.places import Places

LARGEST = 255


@dataclass(frozen=True)
class Scale:
    """An integer `q` stands for `scale * (q - zero_point)`."""

    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"{self.scale} is no scale")
        if not 0 <= self.zero_point <= LARGEST:
            raise ValueError(f"{self.zero_point} is no zero point of unsigned integers of 8 bits")


@dataclass(frozen=True)
class Quantization:
    """Where a compact module is quantised, and how.

    Attributes:
        places: what is rounded.
        scales: of each tuple of activations.
    """

    places: Places
    scales: tuple[Scale, ...]

    def __post_init__(self) -> None:
        if len(self.scales) != len(self.places.activations):
            raise ValueError("there are other scales than activations that they are of")
