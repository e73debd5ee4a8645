"""docs/latency.md, from the file of results."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.latency.results import read
from benchmarks.latency.variants import BY_GROUPS, CHANNELS, DENSE, RIVAL

PAGE = Path(__file__).resolve().parents[2] / "docs" / "latency.md"
SHORT = {"onnxruntime": "ORT", "openvino": "OV", "inductor": "ind.", "own": "own"}
HEADER = (
    *("network", "batch", "kept", "dense", "channel-pruned", "dspfx, channels", "dspfx, groups"),
    *("own kernel", "dspfx over dense", "over channel-pruned"),
)


def write(page: Path = PAGE) -> None:
    """Write the page."""
    lines = read()
    sections = []
    for processor in dict.fromkeys(line["processor"] for line in lines):
        for precision in ("fp32", "bf16", "int8"):
            own = [x for x in lines if (x["processor"], x["precision"]) == (processor, precision)]
            if own:
                sections.append(section(processor, precision, own))
    page.write_text("\n\n".join([heading(), *sections]) + "\n")


def heading() -> str:
    """What all tables have in common."""
    return """# Latency

Milliseconds of a call, each network in the engine that `dspfx.compile` finds to be its fastest:
*OV* OpenVINO, *ORT* ONNX Runtime, *ind.* inductor, *own* the project's kernel; medians of blocks,
in turns.

Written by `python -m benchmarks.latency tables` from benchmarks/results/latency.jsonl, which
`python -m benchmarks.latency run` fills.

- *kept*: the MACs that dspfx leaves by whole channels, counted by torch;
- *channel-pruned*: Torch-Pruning by magnitude, in multiples of 8, to as many MACs;
- *dspfx, groups*: two clustered groups in random weights, the worst case of groups, or, of
  `resnet20_g4` and `resnet56_g2`, the masks that the method's authors learned;
- *own kernel*: the faster of dspfx's two in it;
- *dspfx over*: how many times as fast the faster of dspfx's two is;
- *-*: nobody computes it close enough to the module, in integers perhaps due to random weights.

The engines that raced are in the data: inductor, which takes a minute a network to compile and was
the slowest wherever it was timed, did not take part in all cases."""


def section(processor: str, precision: str, lines: list[dict[str, Any]]) -> str:
    """The table of one processor and precision."""
    ordered = sorted(lines, key=lambda x: (-x["keep"], x["batch"]))
    rows = [_row(line) for line in ordered]
    means = [_mean(ordered, keep) for keep in dict.fromkeys(line["keep"] for line in ordered)]
    threads = lines[0]["threads"]
    title = f"## {precision}, {processor}, {threads} threads"
    table = tabulate(rows, HEADER, "github", disable_numparse=True)
    return "\n\n".join([title, table, *means])


def _row(line: Mapping[str, Any]) -> tuple[str, ...]:
    found = line["variants"]
    share = found[CHANNELS].get("share")
    kept = f"{line['keep']:.0%}" if share is None else f"{share:.1%}"
    ours = best(line)
    own = [ms for name in (CHANNELS, BY_GROUPS) for ms in in_own_kernel(found[name])]
    return (
        line["network"],
        str(line["batch"]),
        kept,
        *(_cell(found[name]) for name in (DENSE, RIVAL, CHANNELS, BY_GROUPS)),
        f"{min(own):.2f}" if own else "",
        _ratio(found[DENSE].get("ms"), ours),
        _ratio(found[RIVAL].get("ms"), ours),
    )


def _cell(variant: Mapping[str, Any]) -> str:
    if "ms" not in variant:
        return "-"
    return f"{variant['ms']:.2f} {SHORT[variant['engine']]}"


def best(line: Mapping[str, Any]) -> float | None:
    """The milliseconds of the faster of dspfx's variants."""
    found = [line["variants"][name].get("ms") for name in (CHANNELS, BY_GROUPS)]
    return min((ms for ms in found if ms is not None), default=None)


def in_own_kernel(variant: Mapping[str, Any]) -> Iterable[float]:
    """The milliseconds of a variant in the project's kernel."""
    for name, ms, _ in variant.get("candidates", ()):
        if ", own, " in name and ms is not None:
            yield ms


def _ratio(other: float | None, ours: float | None) -> str:
    return "" if other is None or ours is None else f"{other / ours:.2f}"


def _mean(lines: list[dict[str, Any]], keep: float) -> str:
    """The geometric mean of what dspfx gains, over the networks pruned to `keep`."""
    pairs = [(x["variants"][DENSE].get("ms"), best(x)) for x in lines if x["keep"] == keep]
    ratios = [dense / ours for dense, ours in pairs if dense and ours]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
    return (
        f"At {keep:.0%} of the MACs: {mean:.2f} times as fast as dense (geometric mean of "
        f"{len(ratios)}), at least {min(ratios, default=math.nan):.2f}."
    )
