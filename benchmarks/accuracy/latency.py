"""What the networks of the accuracy benchmark take, each in its fastest runtime.

One seed's networks are built again from their shapes, compiled, and timed in one process, in blocks
in turns. All are converted and compiled by dspfx; those without groups run in ONNX Runtime and
OpenVINO, too.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dspfx
from benchmarks.accuracy import results
from benchmarks.accuracy.runs import DENSE
from benchmarks.accuracy.scenarios import SCENARIOS
from benchmarks.accuracy.shapes import rebuilt
from dspfx.engines.engines import engines_named
from dspfx.engines.form import AS_CONVERTED, Form
from dspfx.utils.timing import in_blocks

LATENCY = Path(results.RESULTS).with_name("accuracy_latency.json")


def measure(scenario: str, seed: int, batch: int, methods: list[str] | None, command: str) -> None:
    """Time one seed's networks of `methods`, or those widely tried; write it to `LATENCY`.

    Each runtime has blocks of its own: threads of some go on spinning when others are timed.
    """
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    every = [r for r in results.read().values() if r.scenario == scenario]
    timed = {DENSE, *(methods or results.widely_tried(every))}
    found = [r for r in every if r.seed == seed and r.method in timed]
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for result in tqdm(found, "compiling"):
        torch.compiler.reset()
        model = rebuilt(SCENARIOS[scenario], result.shape)
        name = f"{result.method}/{result.pruned}"
        whole = "masks" not in result.shape
        compact = dspfx.convert(dspfx.prepare(model, x)) if whole else model
        calls[name, "dspfx"] = partial(dspfx.compile(compact, x, engines=["own", "inductor"]), x)
        if whole:
            form = Form(AS_CONVERTED, lambda compact=compact: compact, (x,))
            for engine in engines_named(["onnxruntime", "openvino"]):
                calls[name, engine.name] = partial(engine.load(form, "fp32"), x)
    times = in_blocks(calls)
    rows = [
        {
            "scenario": scenario,
            "seed": seed,
            "batch": batch,
            "method": result.method,
            "pruned": result.pruned,
            "milliseconds": {
                runtime: round(1e3 * seconds, 4)
                for (name, runtime), seconds in times.items()
                if name == f"{result.method}/{result.pruned}"
            },
        }
        for result in found
    ]
    LATENCY.write_text(json.dumps({"made": results.made_by(command), "rows": rows}, indent=1))
