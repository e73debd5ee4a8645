"""The masked network and the compact one, image by image."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspfx.recipe.networks.outputs import evaluating, logits_of


@dataclass
class Comparison:
    """What two networks say of the same images.

    Attributes:
        right_masked, right_compact: how many labels each finds.
        equal: how many images they say the same of.
        largest_difference: between their logits.
    """

    right_masked: int = 0
    right_compact: int = 0
    equal: int = 0
    largest_difference: float = 0.0


def compare(
    masked: nn.Module, compact: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> Comparison:
    """Run both networks in evaluation mode on labelled images; `masked` gets its mode back."""
    found = Comparison()
    with evaluating(masked), torch.no_grad():
        for x, y in batches:
            one, other = logits_of(masked(x)), logits_of(compact(x))
            found.right_masked += int((one.argmax(1) == y).sum())
            found.right_compact += int((other.argmax(1) == y).sum())
            found.equal += int((one.argmax(1) == other.argmax(1)).sum())
            largest = (one - other).abs().max()  # not a number if anything is not
            found.largest_difference = float(
                largest.maximum(torch.tensor(found.largest_difference))
            )
    return found
