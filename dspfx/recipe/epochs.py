"""What a run reports of every epoch while it trains, and the loggers that receive it.

A logger is any function that takes an `Epoch`. Those here write files beside `metrics.jsonl`, with
the packages that are made for it; a run that is resumed writes over what it does again.
"""

import csv
import importlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspfx.errors import RecipeError
from dspfx.utils.atomic_write import replacing
from dspfx.utils.formatting import duration

SCALARS = ("loss", "accuracy", "macs", "learning_rate")


@dataclass(frozen=True)
class Epoch:
    """One epoch that is done; `str` is a line.

    Attributes:
        phase: `dense`, `learn` or `tune`.
        number: of the epoch in its phase, from 1.
        epochs: of this phase.
        done: epochs of the whole run that are done, this one included.
        loss: the mean over the training images.
        accuracy: the fraction of the validation images that is classified right; None without any.
        macs: the fraction of the dense network's multiply-accumulates that is left.
        learning_rate: of the last step.
        seconds: that the epoch took.
        remaining: seconds that all epochs still to do would take if each took as long.
    """

    phase: str
    number: int
    epochs: int
    done: int
    loss: float
    accuracy: float | None
    macs: float
    learning_rate: float
    seconds: float
    remaining: float

    def __str__(self) -> str:
        known = [] if self.accuracy is None else [f"validation accuracy {self.accuracy:.2%}"]
        parts = [
            f"loss {self.loss:.4f}",
            *known,
            f"{self.macs:.1%} of the MACs",
            duration(self.seconds),
            *([f"about {duration(self.remaining)} left"] if self.remaining else []),
        ]
        return f"{self.phase} {self.number}/{self.epochs}: {', '.join(parts)}"


Logger = Callable[[Epoch], object]


def csv_logger(path: Path) -> Logger:
    """Appends a row for every epoch to the file at `path`, whose first row names the columns."""

    def log(epoch: Epoch) -> None:
        row = {name: "" if value is None else value for name, value in asdict(epoch).items()}
        rows = [*_rows_before(path, epoch.done), row]
        with replacing(path, RecipeError) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(rows)

    return log


def tensorboard_logger(path: Path) -> Logger:
    """Writes scalars for TensorBoard into the folder `path`; their step is `Epoch.done`.

    Raises:
        RecipeError: the package is not installed.
    """
    try:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise RecipeError("TensorBoard is not installed: pip install tensorboard") from error
    opened: list[Any] = []

    def log(epoch: Epoch) -> None:
        if not opened:  # what a run that is resumed had written from here on is hidden
            opened.append(tensorboard.SummaryWriter(str(path), purge_step=epoch.done))
        for name in SCALARS:
            value = getattr(epoch, name)
            if value is not None:
                opened[0].add_scalar(name, value, epoch.done)
        opened[0].flush()

    return log


LOGGERS: dict[str, tuple[Callable[[Path], Logger], str]] = {
    "csv": (csv_logger, "metrics.csv"),
    "tensorboard": (tensorboard_logger, "tensorboard"),
}


def loggers(names: Iterable[str], folder: Path) -> list[Logger]:
    """The loggers called `names`, which write into the `folder` of a run.

    Raises:
        RecipeError: there is none of this name, or its package is missing.
    """
    found = []
    for name in names:
        if name not in LOGGERS:
            raise RecipeError(f"there is no log '{name}'; choose from {', '.join(LOGGERS)}")
        make, file = LOGGERS[name]
        found.append(make(folder / file))
    return found


def _rows_before(path: Path, done: int) -> list[dict[str, str]]:
    """The rows of the file at `path` of epochs before number `done`; none without a file.

    Raises:
        RecipeError: it is something else.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if int(row["done"]) < done]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RecipeError(f"{path} is no log of a run; move it away ({error})") from error
