"""The images that networks are quantised with."""

from collections.abc import Iterator

from dspfx.recipe.images.sources import Batch, Source, in_batches

CALIBRATION = 512  # images
BATCH = 64  # of them at a time


def calibration(source: Source) -> Iterator[Batch]:
    """Training images and labels in batches, as they are: not augmented."""
    some = source.numbers["train"][:CALIBRATION]
    return source.batches("train", in_batches(some, BATCH))
