"""How the time of `prepare` and `convert` grows with the size of a network.

    python -m benchmarks.scaling [--output docs/scaling.md]

ResNets at 224x224, and chains of residual blocks. `convert` includes verification in float64.

And both in forward passes of the network, once by the time and once by the multiply-accumulates
that were executed, those of gradients included; in float64 one takes about twice as long.
"""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torchvision
import typer
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import dspfx
from benchmarks.coverage import GROUPS, random_masks
from benchmarks.zoo import fill
from dspfx.passes.analysis.products import Products

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
RESNETS = ("resnet18", "resnet50", "resnet152")
BLOCKS = (125, 250, 500, 1000)
VERBS, COUNTED = ("prepare", "convert"), ("time", "MACs")
PASSES = ("resnet50", "vit_b_16", "swin_t")
TIMES = 3


class Block(nn.Module):
    """Two convolutions and norms beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_a = nn.BatchNorm2d(width)
        self.conv_b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_b = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """`x` plus what the block makes of it, rectified."""
        return torch.relu(x + self.norm_b(self.conv_b(torch.relu(self.norm_a(self.conv_a(x))))))


def chain(blocks: int, width: int = 16) -> nn.Module:
    """A stem, `blocks` residual blocks and a head."""
    body = [Block(width) for _ in range(blocks)]
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *body, nn.Conv2d(width, 4, 1))


def main(
    output: Annotated[Path, typer.Option(help="where the table is written")] = OUTPUT,
    threads: Annotated[int, typer.Option(min=1, help="threads torch uses")] = 2,
) -> None:
    """Print the seconds of every network, and write them as Markdown."""
    torch.set_num_threads(threads)
    rows = []
    cases = [(name, 224) for name in RESNETS] + [(str(n), 16) for n in BLOCKS]
    for name, size in tqdm(cases, disable=None):
        model = chain(int(name)) if name.isdigit() else torchvision.models.get_model(name)
        rows.append((f"chain of {name} blocks" if name.isdigit() else name, *measure(model, size)))
    header = ("network", "nodes", "prepare s", "set_masks s", "convert s", "all three s")
    table = tabulate(rows, header, tablefmt="github", floatfmt=("", "", *[".2f"] * 4))
    in_passes = []
    for name in tqdm(PASSES, disable=None):
        for count in dict.fromkeys((1, threads)):
            torch.set_num_threads(count)
            in_passes.append((name, count, *passes(torchvision.models.get_model(name))))
    header = (
        "network",
        "threads",
        "forward s",
        *(f"{verb}, {by}" for verb in VERBS for by in COUNTED),
    )
    further = tabulate(in_passes, header, tablefmt="github", floatfmt=("", "", ".3f", *[".1f"] * 4))
    text = "\n".join(
        [
            "# Time by size",
            "",
            f"Written by `python -m benchmarks.scaling`; {threads} threads, torch "
            f"{torch.__version__}. ResNets at 224x224, chains at 16x16, two images.",
            "",
            table,
            "",
            "`prepare` and `convert` in forward passes of two images of 224x224, by time and by "
            "the multiply-accumulates that they execute; medians of three:",
            "",
            further,
            "",
        ]
    )
    print(text)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)


def measure(model: nn.Module, size: int) -> tuple[int, float, float, float, float]:
    """The nodes of the graph, and the seconds of `prepare`, `set_masks`, `convert` and all."""
    model = fill(model).eval()
    x = torch.zeros(2, 3, size, size)
    config = dspfx.PrepareConfig(groups=GROUPS)
    prepared, preparing = _timed(lambda: dspfx.prepare(model, x, config=config))
    masks = random_masks(prepared)
    _, masking = _timed(lambda: dspfx.set_masks(prepared, masks))
    _, converting = _timed(lambda: dspfx.convert(prepared))
    nodes = len(prepared.graph.nodes)
    return nodes, preparing, masking, converting, preparing + masking + converting


def passes(model: nn.Module) -> tuple[float, float, float, float, float]:
    """Seconds of a forward pass; `prepare` and `convert` in such passes, by time and by MACs."""
    model = fill(model).eval()
    x = torch.zeros(2, 3, 224, 224)
    with torch.no_grad():
        model(x)
        forward = statistics.median(_timed(lambda: model(x))[1] for _ in range(5))
        _, one = _counted(lambda: model(x))
    config = dspfx.PrepareConfig(groups=GROUPS)
    preparing = statistics.median(
        _timed(lambda: dspfx.prepare(model, x, config=config))[1] for _ in range(TIMES)
    )
    prepared, prepare_macs = _counted(lambda: dspfx.prepare(model, x, config=config))
    dspfx.set_masks(prepared, random_masks(prepared))
    twins = [copy.deepcopy(prepared) for _ in range(TIMES)]  # of which no analysis is kept
    converting = statistics.median(_timed(lambda t=t: dspfx.convert(t))[1] for t in twins)
    _, convert_macs = _counted(lambda: dspfx.convert(copy.deepcopy(prepared)))
    by_time = preparing / forward, converting / forward
    return forward, by_time[0], prepare_macs / one, by_time[1], convert_macs / one


def _counted(call: Callable[[], Any]) -> tuple[Any, int]:
    """What `call` returns, and the multiply-accumulates that it executes."""
    with Products() as products:
        result = call()
    return result, products.macs


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What `call` returns, and the seconds that it took."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
