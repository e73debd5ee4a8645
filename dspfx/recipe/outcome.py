"""What came out of a run."""

import math
from dataclasses import dataclass, fields
from typing import Any

from tabulate import tabulate

from dspfx.recipe.speed import Speed
from dspfx.reporting.report import Report
from dspfx.utils.typed_json import to_json


@dataclass(frozen=True)
class Outcome:
    """The result of a run; `str` is a text of tables.

    Attributes:
        dense, pruned, masked, compact: accuracies, fractions of the test images: of the dense
            network; when it was pruned; fine-tuned; and converted.
        validation: accuracy in the end, masked, on the validation images; None without any.
        equal_predictions: how many test images the masked and the compact network say the same of.
        test_images: how many there are.
        largest_difference: between the outputs of the two.
        report: of the compact network.
        model: the file that it is in.
        warnings: of pruning.
        tuned: it was fine-tuned; otherwise batch norms were recalibrated.
        quantized: accuracy of the compact network rounded to 8 bits; None if it was not.
        speed: how long the dense and the compact network take; None where it was not measured.
    """

    dense: float
    pruned: float
    masked: float
    compact: float
    validation: float | None
    equal_predictions: int
    test_images: int
    largest_difference: float
    report: Report
    model: str
    warnings: tuple[str, ...]
    tuned: bool = True
    quantized: float | None = None
    speed: Speed | None = None

    def __str__(self) -> str:
        done, was_done = (
            ("fine-tuning", "fine-tuned") if self.tuned else ("recalibration", "recalibrated")
        )
        accuracies = [
            ("dense", f"{self.dense:.2%}"),
            (f"masked, before {done}", f"{self.pruned:.2%}"),
            (f"masked, {was_done}", f"{self.masked:.2%}"),
            ("compact", f"{self.compact:.2%}"),
        ]
        if self.quantized is not None:
            accuracies.append(("compact, quantised to 8 bits", f"{self.quantized:.2%}"))
        parts = [
            str(self.report),
            tabulate(accuracies, ("network", "test accuracy"), disable_numparse=True),
            f"An accuracy on {self.test_images:,} images is uncertain by ±{self._uncertainty:.1f} "
            "points (one standard error).",
            f"masked and compact: {self.equal_predictions} of {self.test_images} predictions "
            f"equal, outputs differ by at most {self.largest_difference:.1e}",
            *(f"warning: {warning}" for warning in self.warnings),
            *([] if self.speed is None else [str(self.speed)]),
        ]
        return "\n\n".join(parts)

    @property
    def _uncertainty(self) -> float:
        """The standard error of the last accuracy in points, from the number of test images.

        The share is Laplace's `(k + 1) / (n + 2)`: all of a few being right is no certainty.
        """
        share = (self.compact * self.test_images + 1) / (self.test_images + 2)
        return 100 * math.sqrt(share * (1 - share) / self.test_images)

    def to_dict(self) -> dict[str, Any]:
        """This outcome as plain values."""
        plain = {field.name: to_json(getattr(self, field.name)) for field in fields(self)}
        return {**plain, "report": self.report.to_dict()}
