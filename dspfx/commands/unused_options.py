"""Options that would have no effect are refused: who gives one expects something of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from dspfx.errors import RecipeError
from dspfx.recipe.settings import Recipe


def refuse(given: Mapping[str, Any], names: Sequence[str], why: str) -> None:
    """Raise RecipeError if any of the options `names` is `given`, that is, not None."""
    found = [name for name in names if given.get(name) is not None]
    if found:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in found)
        raise RecipeError(f"{options} would have no effect {why}; leave it out")


def check_effects(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Whether all options `given` to `dspfx train`, which made `recipe`, count for something.

    Raises:
        RecipeError: one does not.
    """
    if recipe.method != "learned":
        refuse(given, ("strength", "logits_every"), "without --method learned")
    if recipe.method == "channels":
        refuse(given, ("groups",), "with --method channels")
    if recipe.gradual:
        refuse(given, ("prune_more",), f"with --method {recipe.method}, which has pruned by then")
    if not recipe.distill:
        refuse(given, ("temperature", "distill_weight"), "without --distill")
    if not recipe.tune.epochs:
        refuse(given, ("cycles", "prune_more", "distill"), "without epochs of fine-tuning")
    for phase in ("dense", "learn", "tune"):
        if not getattr(recipe, phase).epochs:
            refuse(given, (f"lr_{phase}",), "where this phase has no epochs")
