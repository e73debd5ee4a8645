"""What becomes of models of other libraries: pruned, converted, trained, exported, compared.

    make coverage-users [ARGS="--only PATTERN"]

which makes an environment with these libraries, from `benchmarks/coverage_users.txt`, and runs

    python -m benchmarks.coverage_users [--only PATTERN] [--output docs/coverage_users.md] [--renew]

Every model of `benchmarks/users_zoo.py` is prepared, pruned by whole channels to half of its MACs,
or to the least that it can give, and converted.
"""

import copy
import fnmatch
import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import dspfx
from benchmarks.examination import examined
from benchmarks.users_page import (
    ASKED,
    POINT,
    STATUSES,
    WIDEST_REASON,
    Outcome,
    document,
    read_page,
)
from benchmarks.users_steps import (
    WrongError,
    compare_compact,
    compare_prepared,
    exported,
    pruned,
    runs_in_float64,
    shares,
    total,
    trained,
)
from benchmarks.users_zoo import build, inputs_of, users_cases
from benchmarks.zoo import Case

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "coverage_users.md"


def main(
    only: Annotated[str, typer.Option(help="pattern of model names, or a library")] = "*",
    output: Annotated[Path, typer.Option(help="where the table is written")] = OUTPUT,
    workers: Annotated[int, typer.Option(min=1, help="models examined at a time")] = 1,
    seconds: Annotated[float, typer.Option(min=1, help="that each may take")] = 120,
    renew: Annotated[
        bool, typer.Option("--renew", help="write the others as the page has them")
    ] = False,
    details: Annotated[
        Path | None,
        typer.Option(help="a file of all that was found, which a later run goes on from"),
    ] = None,
) -> None:
    """Examine the models, print a table and write it as Markdown."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    cases = [
        case
        for case in users_cases()
        if any(fnmatch.fnmatchcase(name, only) for name in (case.name, case.library, case.family))
    ]
    if not cases:
        typer.echo(f"error: no model is called {only!r}", err=True)
        raise typer.Exit(1)
    outcomes = _read(details)
    left = [case for case in cases if case not in outcomes]
    for found in examined(left, examine, _unfinished, workers=workers, seconds=seconds):
        outcomes[found.case] = found
        print(f"{found.case.name}: {found.status} {found.troubles or ''}", flush=True)
        if details is not None:
            details.write_text(json.dumps([asdict(outcome) for outcome in outcomes.values()]))
    arguments = "" if only == "*" else f" --only {only}"
    listed = users_cases()
    if renew:
        outcomes = read_page(output.read_text()) | {case: outcomes[case] for case in cases}
        cases, arguments = [case for case in listed if case in outcomes], ""
    ordered = [outcomes[case] for case in cases]
    text = document(ordered, f"python -m benchmarks.coverage_users{arguments}", len(listed))
    print(text)
    if only == "*" or renew or output != OUTPUT:
        output.write_text(text)


def _read(details: Path | None) -> dict[Case, Outcome]:
    """What an earlier run found, which is not examined again."""
    if details is None or not details.exists():
        return {}
    found = [Outcome(**{**o, "case": Case(**o["case"])}) for o in json.loads(details.read_text())]
    return {outcome.case: outcome for outcome in found}


def _unfinished(case: Case, why: str) -> Outcome:
    return Outcome(case, "raw error", {"process": why})


def examine(case: Case) -> Outcome:
    """Take one model through all steps; one that fails does not keep others from being tried."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    outcome = Outcome(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _take_through(outcome)
    outcome.status = _status(outcome)
    outcome.seconds = time.perf_counter() - started
    return outcome


def _take_through(outcome: Outcome) -> None:
    model = build(outcome.case)
    inputs = [inputs_of(outcome.case, size) for size in (0, 1)]
    outcome.parameters = sum(p.numel() for p in model.parameters())
    prepared: Any = None
    with _trouble(outcome, "prepare"):
        prepared = dspfx.prepare(model, inputs[0])
    if prepared is None:
        return
    for size in (0, 1):
        with _trouble(outcome, f"prepared, size {size + 1}"):
            compare_prepared(outcome, model, prepared, inputs[size])
    dense = total(model, inputs[0])
    with _trouble(outcome, "report"):
        shares(outcome, model, prepared, inputs[0], dense)
    compact: Any = None
    with _trouble(outcome, "prune"):
        outcome.asked = pruned(prepared)
    with _trouble(outcome, "convert"):
        compact = dspfx.convert(prepared)
    with _trouble(outcome, "train"):
        outcome.trained = trained(model, prepared, inputs[0])
    if compact is None:
        return
    wide: Any = None
    with _trouble(outcome, "float64"):
        if runs_in_float64(model, inputs[0]) and runs_in_float64(prepared, inputs[0]):
            wide = dspfx.convert(copy.deepcopy(prepared).double(), verify=False)
    for size in (0, 1):
        with _trouble(outcome, f"compact, size {size + 1}"):
            compare_compact(outcome, prepared, compact, wide, inputs[size])
    with _trouble(outcome, "count"):
        outcome.left = total(compact, inputs[0]) / dense
    with _trouble(outcome, "onnx"):
        outcome.onnx = exported(outcome, compact, model, inputs[0])


@contextmanager
def _trouble(outcome: Outcome, step: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        kind = _kind(error)
        outcome.troubles[step] = f"[{kind}] {text[:WIDEST_REASON]}"


def _kind(error: Exception) -> str:
    if isinstance(error, WrongError):
        return "quietly wrong"
    guard = isinstance(error, AssertionError) and "the model was prepared" in str(error)
    return "refused" if guard or isinstance(error, dspfx.DspfxError) else "raw error"


def _status(outcome: Outcome) -> str:
    kinds = [trouble[1:].partition("]")[0] for trouble in outcome.troubles.values()]
    if kinds:
        return max(kinds, key=STATUSES.index)
    if "prepared in parts" in outcome.frozen:
        return "in parts"
    too_much = outcome.asked > ASKED or outcome.left > outcome.asked + POINT
    return "partly frozen" if too_much else "all the way"


if __name__ == "__main__":
    typer.run(main)
