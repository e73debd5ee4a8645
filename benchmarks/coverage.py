"""Which models of torchvision and timm go through, whether the result is equal, and how long it takes.

    python -m benchmarks.coverage [--only PATTERN] [--output docs/coverage.md]

Every model of torchvision, and the smallest of every module of timm, is prepared, masked at random
(every gated layer: 3 groups, half of each group's inputs dropped, and a fifth of the filters where
they may be dropped), converted with verification, and the two are compared.
"""

import fnmatch
import multiprocessing
import signal
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import dspfx
from benchmarks.zoo import Case, build, example_inputs, timm_cases, torchvision_cases

GROUPS, KEEP, DROP = 3, 0.5, 0.2
SECONDS_AT_MOST = 600
LARGE = 150_000_000  # parameters; such models are examined one at a time


@dataclass(frozen=True)
class Outcome:
    """What became of one model.

    Attributes:
        status: "ok", "partly frozen" or "failed".
        prunable: share of the MACs of its convolutions whose inputs or filters can be pruned.
        kept: share of all MACs that is left under the masks.
        prepare, convert: seconds, verification included.
        double, single: largest relative difference in float64 and in float32.
        why: what failed or what stays at full width.
    """

    case: Case
    status: str
    parameters: int = 0
    prunable: float = float("nan")
    kept: float = float("nan")
    prepare: float = float("nan")
    convert: float = float("nan")
    double: float = float("nan")
    single: float = float("nan")
    why: str = ""
