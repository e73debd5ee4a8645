"""Timing one case."""

import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import nn

import dspfx
from benchmarks.latency.variants import DENSE, macs_of, variants
from benchmarks.latency.zoo import Network
from dspfx.utils.cache import processor
from dspfx.utils.timing import in_blocks

CALIBRATION = 4  # batches


@dataclass(frozen=True)
class Case:
    """What is timed together."""

    network: Network
    batch: int
    precision: str
    keep: float
    engines: tuple[str, ...] | None = None

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from others in the results."""
        return {
            "network": self.network.name,
            "batch": self.batch,
            "precision": self.precision,
            "keep": self.keep,
            "threads": torch.get_num_threads(),
            "processor": processor(),
        }


def measure(case: Case) -> dict[str, Any]:
    """The line of results of a case: its key, and of every variant what was found.

    The variants are timed against each other in the end, each in its fastest engine.
    """
    torch.compiler.reset()  # or torch would compile for all batch sizes at once
    size = case.network.size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, 3, size, size, generator=generator)
    batches = [torch.randn(x.shape, generator=generator) for _ in range(CALIBRATION)]
    more = {} if case.precision == "fp32" else {"batches": batches}
    found: dict[str, dict[str, Any]] = {}
    calls = {}
    for name, make in variants(case.network, case.keep).items():
        try:
            model = _quantisable(make(), x) if case.precision == "int8" else make()
            started = time.perf_counter()
            fast = dspfx.compile(
                model,
                x,
                engines=case.engines,
                precision=case.precision,  # type: ignore[arg-type]
                **more,
            )
        except Exception as error:  # of anybody's: a table shows what does not work, too
            found[name] = {"error": str(error).splitlines()[0][:200]}
            continue
        calls[name] = partial(fast, x)
        found[name] = {
            "compile_seconds": time.perf_counter() - started,
            "macs": macs_of(model, x[:1]),
            "engine": fast.report.chosen.engine,
            "form": fast.report.chosen.form,
            "agreement": fast.report.chosen.agreement,
            "candidates": [[str(c), None if c.seconds is None else 1e3 * c.seconds, c.note]
                           for c in fast.report.candidates],
        }  # fmt: skip
    for name, seconds in in_blocks(calls, rounds=5).items():
        found[name]["ms"] = 1e3 * seconds
    dense = found[DENSE].get("macs")
    for own in found.values():
        if dense and own.get("macs"):
            own["share"] = own["macs"] / dense
    packages = ("torch", "onnxruntime", "openvino", "torch_pruning")
    versions = {name: metadata.version(name) for name in packages}
    return {**case.key, "engines": case.engines, "variants": found, "versions": versions}


def _quantisable(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """`model` as dspfx has converted it, nothing pruned, unless it is compact."""
    if isinstance(model, dspfx.CompactModule):
        return model
    return dspfx.convert(dspfx.prepare(model, x))
