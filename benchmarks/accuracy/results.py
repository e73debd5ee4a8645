"""The results file: one JSON object a line, in the order in which the runs ended."""

import fcntl
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.protocol import device, precision

RESULTS = Path(__file__).resolve().parents[1] / "results" / "accuracy.jsonl"
PACKAGES = ("dspfx", "torch", "torchvision", "torch-pruning")


@dataclass(frozen=True)
class Result:
    """One network, trained and tested.

    Attributes:
        scenario, method, seed: what was run; `dense` and `dense, longer` are methods, too.
        pruned: the percentage of the MACs of gated layers that was to go; 0 for dense networks.
        accuracy: top-1 on the test images after the last epoch, percent.
        untuned: the same before fine-tuning.
        macs, dense_macs: of the whole network for one image, afterwards and before.
        parameters: of the whole network, afterwards.
        shape: what is needed to build the same network for timing, see `shapes.py`.
        made: command, versions, processor, precision of the training, and date.
    """

    scenario: str
    method: str
    seed: int
    pruned: int
    accuracy: float
    untuned: float
    macs: int
    dense_macs: int
    parameters: int
    shape: Mapping[str, Any] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What makes two results the same run."""
        return self.scenario, self.method, self.seed, self.pruned


def made_by(command: str) -> dict[str, str]:
    """How a result of `command`, made now, came about."""
    cuda = device().type == "cuda"
    return {
        "command": command,
        **{package: version(package) for package in PACKAGES},
        "processor": torch.cuda.get_device_name() if cuda else platform.machine(),
        "precision": str(precision()).removeprefix("torch."),
        "date": datetime.now(UTC).date().isoformat(),
    }


def read(path: Path = RESULTS) -> dict[tuple[str, str, int, int], Result]:
    """All results so far, by their keys; of the same run the last."""
    if not path.is_file():
        return {}
    results = [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    return {result.key: result for result in results}


def widely_tried(found: Iterable[Result]) -> set[str]:
    """The methods with results at three budgets or more: enough for a line, and to be timed."""
    budgets: dict[str, set[int]] = {}
    for result in found:
        budgets.setdefault(result.method, set()).add(result.pruned)
    return {method for method, tried in budgets.items() if len(tried) >= 3}


def append(result: Result, path: Path = RESULTS) -> None:
    """Add a result; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(asdict(result)) + "\n")
        file.flush()
