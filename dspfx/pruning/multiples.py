"""Multiples of channels that a layer should keep, where the engine that runs it likes such."""

FEWEST_STEPS = 4  # that the width of a layer has


def multiple_of(liked: int, width: int) -> int:
    """What `width` should be pruned in multiples of: of `liked`, a power of two, or less.

    A narrow layer would be left whole otherwise.
    """
    while liked > 1 and width < FEWEST_STEPS * liked:
        liked //= 2
    return liked
