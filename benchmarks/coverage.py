"""Which models of torchvision and timm go through, whether they stay equal, and how long it takes.

    python -m benchmarks.coverage [--only PATTERN] [--output docs/coverage.md]

Every model of torchvision, and the smallest of every module of timm, is prepared, masked at random
(every gated layer: 3 groups, half of each group's inputs dropped, and a fifth of the filters where
they may be dropped), converted with verification, and the two are compared.
"""

import fnmatch
import math
import resource
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import torchvision
import typer
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import dspfx
from benchmarks.examination import examined, relative_difference
from benchmarks.zoo import Case, build, example_inputs, timm_cases, torchvision_cases
from dspfx.layers.gated import gated_layers
from dspfx.model.analysed import analyse_prepared
from dspfx.model.parts import compact_parts_of, parts_of
from dspfx.passes.analysis.removable import droppable_layers

GROUPS, KEEP, DROP = 3, 0.5, 0.2
CONVOLUTION = torch.ops.aten.convolution
SECONDS_AT_MOST = 600
OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
WIDEST_REASON = 200
# more than 200 million parameters: examined alone
LARGE = (
    *("regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32", "deepseek_vit_412m"),
    *("gemma4_vit_150m", "convnext_large", "regnet_y_32gf"),
)


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
        memory: GiB that the process held at most, torch itself included.
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
    memory: float = float("nan")


def main(
    only: Annotated[str, typer.Option(help="pattern of model names, or a library")] = "*",
    output: Annotated[Path, typer.Option(help="where the table is written")] = OUTPUT,
    workers: Annotated[int, typer.Option(min=1, help="models examined at a time")] = 2,
) -> None:
    """Examine the models, print a table and write it as Markdown."""
    cases = [
        case
        for case in torchvision_cases() + timm_cases()
        if fnmatch.fnmatchcase(case.name, only) or fnmatch.fnmatchcase(case.library, only)
    ]
    if not cases:
        typer.echo(f"error: no model is called {only!r}", err=True)
        raise typer.Exit(1)
    started = time.perf_counter()
    outcomes = examine_all(cases, workers)
    minutes = (time.perf_counter() - started) / 60
    text = document(outcomes, minutes, workers)
    print(text)
    if only == "*" or output != OUTPUT:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)


def examine_all(cases: list[Case], workers: int) -> list[Outcome]:
    """The outcomes in the order of `cases`, each found in a process of its own."""
    outcomes: dict[Case, Outcome] = {}
    with tqdm(total=len(cases), unit="model", disable=None) as bar:
        for large in (False, True):
            now = [c for c in cases if (c.name in LARGE) == large]
            settings: Any = {"workers": 1 if large else workers, "seconds": SECONDS_AT_MOST}
            for outcome in examined(now, examine, _failed, **settings):
                outcomes[outcome.case] = outcome
                bar.update()
                bar.write(f"{outcome.case.name}: {outcome.status} {outcome.why[:120]}".strip())
    return [outcomes[case] for case in cases]


def examine(case: Case) -> Outcome:
    """Prepare, mask, convert and compare one model."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = outcome_of(case)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return replace(outcome, memory=used)


def _failed(case: Case, why: str) -> Outcome:
    return Outcome(case, "failed", why=why[:300])


def outcome_of(case: Case, inputs: tuple[Any, ...] | None = None) -> Outcome:
    """What becomes of one model, with inputs other than the usual; raises what goes wrong."""
    model = build(case)
    parameters = sum(p.numel() for p in model.parameters())
    inputs = inputs or example_inputs(case, model)
    started = time.perf_counter()
    prepared = dspfx.prepare(model, inputs, config=dspfx.PrepareConfig(groups=GROUPS))
    seconds = time.perf_counter() - started
    del model
    report = dspfx.report(prepared)
    share = prunable_share(prepared, report, inputs)
    dspfx.set_masks(prepared, random_masks(prepared))
    started = time.perf_counter()
    compact = dspfx.convert(prepared)
    converted = time.perf_counter() - started
    macs = dspfx.report(compact)
    return Outcome(
        case,
        "partly frozen" if report.declined or _opaque(report) else "ok",
        parameters,
        share,
        macs.after.macs / macs.before.macs,
        seconds,
        converted,
        worst_verified(compact),
        worst_difference(prepared.eval(), compact),
        "; ".join(dict.fromkeys([d.reason for d in report.declined] + _opaque(report))),
    )


def random_masks(prepared: nn.Module) -> dict[str, Tensor]:
    """Random groups of every gated layer, each with a share of the inputs; some filters dropped."""
    generator = torch.Generator().manual_seed(0)
    droppable = {
        part.full_name(name)
        for part in parts_of(prepared)
        for name in droppable_layers(analyse_prepared(part.module))
    }
    masks = {}
    for name, layer in gated_layers(prepared).items():
        (filters, channels), groups = layer.gate.mask.shape, len(layer.gate.logits)
        order = torch.rand(groups, channels, generator=generator).argsort(1)
        keep = order < max(1, int(channels * KEEP))
        mask = keep[torch.randint(groups, (filters,), generator=generator)]
        if name in droppable:
            mask[torch.rand(filters, generator=generator) < DROP] = False
        masks[name] = mask
    return masks


def prunable_share(prepared: nn.Module, report: dspfx.Report, inputs: tuple[Any, ...]) -> float:
    """Of the MACs of all convolutions that torch counts: those in layers that can be pruned.

    These have a gate, or filters that can leave the network.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        prepared.eval()(*inputs)
    counts = counter.get_flop_counts()
    root = type(prepared).__name__
    names = {f"{root}.{layer.name}" for layer in report.layers if layer.gated or layer.free}
    total = counts.get("Global", {}).get(CONVOLUTION, 0)
    prunable = sum(counts.get(name, {}).get(CONVOLUTION, 0) for name in names)
    return prunable / total if total else float("nan")


def worst_verified(compact: nn.Module) -> float:
    """The largest difference that verification found in float64; NaN where it took another type."""
    found = [module.difference for _, module in compact_parts_of(compact)]
    if any(d is None or d[1] != torch.float64 for d in found):
        return float("nan")
    return max(d[0] for d in found if d is not None)


def worst_difference(prepared: nn.Module, compact: nn.Module) -> float:
    """The largest difference on the example inputs; what follows the parts may sort and select."""
    worst = []
    for part, module in zip(parts_of(prepared), compact_parts_of(compact), strict=True):
        inputs = part.module.example_inputs
        with torch.no_grad():
            worst.append(relative_difference(part.module(*inputs), module[1](*inputs)))
    return max(worst)


def _opaque(report: dspfx.Report) -> list[str]:
    return [note for note in report.notes if note.startswith(("opaque", "prepared in parts"))]


def _largest(values: Iterable[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=float("nan"))


def document(outcomes: list[Outcome], minutes: float, workers: int) -> str:
    """The outcomes as a page of Markdown."""
    count = {s: sum(o.status == s for o in outcomes) for s in ("ok", "partly frozen", "failed")}
    shares = sorted(o.prunable for o in outcomes if o.prunable == o.prunable)
    median = shares[len(shares) // 2] if shares else float("nan")
    rows = [
        (
            *(o.case.library, o.case.family, o.case.name, o.status),
            *(f"{o.parameters / 1e6:.1f}", f"{o.prunable:.0%}", f"{o.kept:.0%}"),
            *(f"{o.prepare:.1f}", f"{o.convert:.1f}", f"{o.memory:.1f}"),
            *(f"{o.double:.0e}", f"{o.single:.0e}"),
            o.why[:WIDEST_REASON].replace("|", "\\|"),
        )
        for o in outcomes
    ]
    header = (
        *("library", "family", "model", "status", "million parameters", "prunable", "kept"),
        *("prepare s", "convert s", "memory GiB", "float64", "float32", "why not whole"),
    )
    return "\n".join(
        [
            "# Coverage",
            "",
            f"{len(outcomes)} models: {count['ok']} ok, {count['partly frozen']} partly frozen, "
            f"{count['failed']} failed. In the median model {median:.1%} of the MACs of "
            "convolutions are prunable. The largest difference is "
            f"{_largest(o.double for o in outcomes):.0e} in float64, and "
            f"{_largest(o.single for o in outcomes):.0e} in float32.",
            "",
            "Written by `python -m benchmarks.coverage` "
            f"in {minutes:.0f} minutes, {workers} models at a time with one thread each; torch "
            f"{torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}.",
            "",
            "- *partly frozen*: some operator is given all its channels; the rest is pruned.",
            "- *prunable*: share of the MACs of all convolutions, in layers that have a gate or "
            "filters that can leave.",
            f"- *kept*: share of all MACs left when every gated layer has {GROUPS} random groups, "
            f"each with {KEEP:.0%} of the inputs, and {DROP:.0%} of the filters are dropped where "
            "they may be.",
            "- *convert* includes verification.",
            "- *float64*, *float32*: largest difference between masked and compact model, relative "
            "to the largest output; nan where the model does not run in float64.",
            "",
            tabulate(rows, header, tablefmt="github", disable_numparse=True),
            "",
        ]
    )


if __name__ == "__main__":
    typer.run(main)
