"""A whole run, from a dense network to a compact one, in a folder; it can be resumed.

from dspfx.recipe import preset
from dspfx.recipe import run
outcome = run(preset("digits"), Path("runs/digits"), say=print)

`dspfx train` is the same from the command line.
"""

from dspfx.recipe.epochs import Epoch, loggers
from dspfx.recipe.networks.architectures import Architecture
from dspfx.recipe.outcome import Outcome
from dspfx.recipe.presets import PRESETS, preset
from dspfx.recipe.run import Machine, run
from dspfx.recipe.settings import Recipe, Schedule
from dspfx.recipe.speed import Speed, speed

__all__ = [
    "PRESETS",
    "Architecture",
    "Epoch",
    "Machine",
    "Outcome",
    "Recipe",
    "Schedule",
    "Speed",
    "loggers",
    "preset",
    "run",
    "speed",
]
