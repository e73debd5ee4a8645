"""How many multiply-accumulates a second every layer reaches on the project's own kernel.

    python -m benchmarks.layers [--only PATTERN] [--output docs/layers.md]

Each layer is timed where it stands, in the run of its network, and compared with the dense layer
(all filters and channels that are alive) in oneDNN, its weight packed, channels last. Only the
MACs that are kept are counted.
"""

import fnmatch
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate
from torch import Tensor, fx, nn

import dspfx
from benchmarks.grouped import cases
from benchmarks.reference import DEFAULT_FOLDER
from dspfx.layers import native
from dspfx.layers.group_conv import GroupConv2d
from dspfx.layers.group_conv_run import GroupConvRun
from dspfx.passes.lowering.forms import dense
from dspfx.passes.lowering.fuse import fuse
from dspfx.passes.lowering.measure import Measured
from dspfx.passes.lowering.runs import join_runs
from dspfx.passes.lowering.sites import Site, relowered, sites
from dspfx.passes.lowering.winograd import choose, measured_choice

BATCH = 8
ROUNDS = 31
WARM_UP = 10
OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "layers.md"
NETWORKS = ("resnet20_g2", "resnet20_g4", "resnet56_g2", "resnet18 at 30%", "resnet50 at 30%")


def main(
    only: Annotated[str, typer.Option(help="pattern of the networks' names")] = "*",
    reference: Annotated[Path, typer.Option(help="folder of the networks")] = DEFAULT_FOLDER,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    output: Annotated[Path, typer.Option(help="where the tables are written")] = OUTPUT,
) -> None:
    """Print and write a table for every network."""
    torch.set_num_threads(threads)
    sections = [_heading(threads)]
    for make, name in cases(reference):
        if name in NETWORKS and fnmatch.fnmatchcase(name, only):
            case = make()
            x = torch.randn(BATCH, 3, case.size, case.size)
            sections.append(_section(name, dspfx.convert(case.prepared), x))
            print(sections[-1], flush=True)
            output.write_text("\n\n".join(sections) + "\n")


def _heading(threads: int) -> str:
    return (
        f"# Layers\n\nWritten by `python -m benchmarks.layers`; batch {BATCH}, {threads} threads, "
        f"float32, medians of {ROUNDS}; torch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}. All in GMAC/s, what is kept counted; "
        "*direct*: without Winograd's algorithm; *chosen*: with it where it is faster; *dense*: "
        "the layer over all live filters and channels in oneDNN; *share*: of its GMAC/s. Layers "
        "that are alike are one row."
    )


def _section(name: str, compact: nn.Module, x: Tensor) -> str:
    found = sites(compact, (x,))
    own = {site: module for site in found if (module := site.emit_native()) is not None}
    network: Any = relowered(compact, own)
    fuse(network, (x,))
    direct = _seconds(network, x)
    choose(network, measured_choice(network, (x,)))
    seconds = _seconds(network, x)
    dense_seconds = _dense_seconds(own)
    rows: dict[tuple[object, ...], tuple[object, ...]] = {}
    below = 0
    for site in own:
        macs, whole = _macs(site)
        rate, plain = (macs / found[site.name] / 1e9 for found in (seconds, direct))
        dense_rate = whole / dense_seconds[site] / 1e9
        layer: Any = site.layer
        kernel, stride = layer.kernel_size[0], layer.stride[0]
        kind = f"{kernel}x{kernel}" + (f" /{stride}" if stride > 1 else "")
        size = f"{site.output[2]}x{site.output[3]}"
        channels = f"{site.weight.shape[1]}->{len(site.weight)}"
        below += kernel == 3 and rate < 0.75 * dense_rate
        key = (kind, size, channels, macs)
        rows[key] = (
            *(site.name, kind, channels, size, f"{macs / whole:.0%}"),
            *(f"{plain:.0f}", f"{rate:.0f}", f"{dense_rate:.0f}", f"{rate / dense_rate:.0%}"),
        )
    header = (
        *("layer", "kernel", "channels", "output", "MACs kept"),
        *("direct", "chosen", "dense", "share"),
    )
    table = tabulate(list(rows.values()), header, "github", disable_numparse=True)
    return f"## {name}\n\n{below} of the 3x3 layers are below 75 % of dense.\n\n{table}"


def _seconds(network: fx.GraphModule, x: Tensor) -> dict[str, float]:
    """Seconds of every layer in its run, for all images, by its name."""
    join_runs(network)
    inputs: dict[str, tuple[Tensor, ...]] = {}
    runs = {n: m for n, m in network.named_modules() if isinstance(m, GroupConvRun)}
    for name, run in runs.items():
        run.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args}))
    with torch.no_grad():
        network(x)
        found = {}
        for name, run in runs.items():
            times = [run.seconds(*inputs[name]) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
            for number, layer in enumerate(run.names):
                found[layer] = median(float(t[number]) for t in times)
    return found


def _dense_seconds(own: dict[Site, GroupConv2d]) -> dict[Site, float]:
    measured = Measured(torch.device("cpu"))
    return {
        site: measured({"dense": site.emit(dense(site.groups))}, site.example())["dense"]
        for site in own
    }


def _macs(site: Site) -> tuple[int, int]:
    """Multiply-accumulates of all images: of the groups, and of the dense layer."""
    pixels = site.output.numel() // len(site.weight)
    taps = site.weight.shape[2:].numel()
    kept = sum(len(group.filters) * len(group.inputs) for group in site.groups)
    return kept * taps * pixels, site.weight.numel() * pixels


if __name__ == "__main__":
    assert native.built()
    typer.run(main)
