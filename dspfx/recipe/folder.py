"""The folder of a run: what was asked for, how it went, where it is, what came out.

    config.json          the recipe, the versions that began the run, and a digest of its images
    metrics.jsonl        a line of JSON for every epoch and every event
    dense.pt             the dense network, when it is trained
    pruned.pt            the prepared network, when it was pruned while it trained
    checkpoint.pt        all that is needed to go on; replaced in one step
    model.safetensors    the compact network (`dspfx.save`); how to construct it is in
                         model.safetensors.json; rounded to 8 bits, if that was asked for
    float32.safetensors  then the same network before that
    report.json, .txt    what came out
    report.html          the same network as a page with a picture, where matplotlib is installed

A line of metrics is written before the checkpoint that knows of it, which says how long the file
was. A run that is resumed cuts off what its checkpoint does not know, and writes it again.
"""

import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dspfx.errors import RecipeError
from dspfx.recipe.settings import Recipe
from dspfx.utils.atomic_write import replacing
from dspfx.utils.typed_json import to_json


class RunFolder:
    """The files of one run.

    Attributes:
        path: of the folder.
        writes: whether this process writes files, as the first one does.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.dense = path / "dense.pt"
        self.pruned = path / "pruned.pt"
        self.checkpoint = path / "checkpoint.pt"
        self.model = path / "model.safetensors"
        self.float32 = path / "float32.safetensors"
        self.report = path / "report.json"
        self.text = path / "report.txt"
        self.page = path / "report.html"

    def check_free(self) -> None:
        """Raise RecipeError if there is a run in the folder."""
        if self.config.exists() or self.checkpoint.exists():
            raise RecipeError(
                f"there is a run in {self.path}: go on with it (--resume), or take another folder"
            )

    def begin(self, recipe: Recipe, images: str) -> None:
        """Make the folder, with `recipe` in it, and the fingerprint of the `images`.

        Raises:
            RecipeError: it cannot be made.
        """
        versions = {"dspfx": version("dspfx"), "torch": torch.__version__}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            content = {"recipe": to_json(recipe), "versions": versions, "images": images}
            self.write(self.config, content)
        except OSError as error:
            raise RecipeError(f"{self.path} cannot be written: {error}") from error

    def recipe(self) -> Recipe:
        """What the run in this folder was asked for.

        Raises:
            RecipeError: there is no run in it, or one of another version.
        """
        return Recipe.of_json(self._config()["recipe"], self.config)

    def check_images(self, images: str) -> None:
        """Raise RecipeError if the run began with others than those of this fingerprint."""
        if self._config().get("images", images) != images:
            raise RecipeError(
                f"the images are not those that the run in {self.path} began with: some are gone, "
                "new, or of another class; put them back, or begin another run"
            )

    def _config(self) -> dict[str, Any]:
        try:
            found = json.loads(self.config.read_text())
            return {**found, "recipe": found["recipe"]}
        except FileNotFoundError as error:
            raise RecipeError(f"there is no run in {self.path} to go on with") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{self.config} is damaged: {error}") from error

    def log(self, **record: Any) -> None:
        """Write one more line of metrics."""
        if self.writes:
            with self.metrics.open("a") as file:
                file.write(f"{json.dumps(record)}\n")
                file.flush()
                os.fsync(file.fileno())

    def logged(self) -> int:
        """How many bytes of metrics there are."""
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Leave only the first `size` bytes of metrics."""
        if self.writes and self.logged() > size:
            os.truncate(self.metrics, size)

    def write(self, path: Path, content: Any) -> None:
        """Replace a file of the folder in one step: a text as it is, all else as JSON."""
        if self.writes:
            text = content if isinstance(content, str) else json.dumps(content, indent=2)
            with replacing(path, RecipeError) as temporary:
                temporary.write_text(f"{text}\n")
