"""The images that `--quantize` and `--precision int8` are calibrated on."""

from collections.abc import Iterator

from dspfx.commands.prune_options import CALIBRATION
from dspfx.recipe.images.sources import Batch, Source, in_batches

BATCH = 64  # images at a time


def calibration(source: Source) -> Iterator[Batch]:
    """Training images and labels in batches, as they are: not augmented."""
    some = source.numbers["train"][:CALIBRATION]
    return source.batches("train", in_batches(some, BATCH))
