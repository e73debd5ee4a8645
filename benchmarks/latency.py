"""How fast pruned networks are, against everything that a user could run instead.

    python -m benchmarks.latency [--only PATTERN] [--batch 1 --batch 8] [--output docs/latency.md]

All contenders of a case are timed in one process, in turns, in float32:

- dense: the network before pruning, in inductor with frozen weights, ONNX Runtime and OpenVINO;
- compact: what `dspfx.convert` makes of the masks, by `dspfx.compile`, and in the other runtimes;
- packed: gather by index, one convolution for each group, scatter, as the method's authors do it;
- channel-pruned: by Torch-Pruning's magnitude pruner, to the same MACs, in the same runtimes.

With `--only` and `--batch`, what the output holds of other cases stays.

The reference networks have the authors' masks, the others random ones of two groups.
"""

import copy
import fnmatch
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import openvino
import torch
import torch_pruning
import torchvision
import typer
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import dspfx
from benchmarks.reference import DEFAULT_FOLDER, find, load
from dspfx.engines.report import CompileReport
from dspfx.utils.timing import medians

ROUNDS = 15
SETTLE = 0.03
OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "latency.md"
RANDOM = (("resnet18", 0.5), ("resnet18", 0.3), ("resnet50", 0.5), ("resnet50", 0.3))
NARROW = (("mobilenet_v2", 0.5),)


@dataclass(frozen=True, eq=False)
class Case:
    """A network before and after pruning.

    Attributes:
        name: with the share of MACs that is kept.
        dense: the network of full width.
        prepared: the pruned one, its masks set.
        packed: the pruned one in the authors' form, where the masks are theirs.
        size: of the images.
    """

    name: str
    dense: nn.Module
    prepared: nn.Module
    packed: nn.Module | None
    size: int


def main(
    only: Annotated[str, typer.Option(help="pattern of the cases' names")] = "*",
    batch: Annotated[list[int], typer.Option(help="batch sizes; default: all")] = [],  # noqa: B006
    reference: Annotated[Path, typer.Option(help="folder of the networks")] = DEFAULT_FOLDER,
    threads: Annotated[int, typer.Option(min=1, help="threads of every runtime")] = 2,
    output: Annotated[Path, typer.Option(help="where the table is written")] = OUTPUT,
) -> None:
    """Print and write the milliseconds of every contender."""
    torch.set_num_threads(threads)
    sections = sections_of(output)
    for make, name, batches in cases(reference):
        if fnmatch.fnmatchcase(name, only):
            case = make()
            for size in batch or batches:
                section = examine(case, size, threads)
                print(section, flush=True)
                sections[section.partition("\n")[0]] = section
                output.write_text("\n\n".join([heading(threads), *sections.values()]) + "\n")


def heading(threads: int) -> str:
    """What all sections have in common."""
    return (
        f"# Latency\n\nWritten by `python -m benchmarks.latency`; {threads} threads, float32, "
        f"medians of {ROUNDS} rounds in turns, {1e3 * SETTLE:.0f} ms of untimed calls before "
        f"each; torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}, OpenVINO "
        f"{openvino.__version__.split('-')[0]}, Torch-Pruning {torch_pruning.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}."
    )


def sections_of(output: Path) -> dict[str, str]:
    """The sections of an earlier run, by their titles."""
    text = output.read_text() if output.is_file() else ""
    found = [f"## {section.strip()}" for section in text.split("\n## ")[1:]]
    return {section.partition("\n")[0]: section for section in found}


def cases(reference: Path) -> list[tuple[Callable[[], Case], str, tuple[int, ...]]]:
    """How to make every case, its name, and its batch sizes."""
    small = [(partial(_reference, path), path.stem, (1, 8, 64)) for path in find(reference)]
    large = [
        (partial(_random, name, keep), f"{name} at {keep:.0%}", (1, 8))
        for name, keep in (*RANDOM, *NARROW)
    ]
    return [*small, *large]


def _reference(path: Path) -> Case:
    network = load(path)
    packed = network.model()
    for name, mask in network.masks.items():
        layer = packed.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        packed.set_submodule(name, Packed(layer, mask))
    return Case(network.name, network.dense(), network.prepared(), packed, 32)


def _random(name: str, keep: float) -> Case:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    prepared = dspfx.prepare(model, torch.randn(2, 3, 224, 224), config=_TWO_GROUPS)
    mask_at_random(prepared, keep)
    return Case(f"{name} at {keep:.0%}", model, prepared.eval(), None, 224)


_TWO_GROUPS = dspfx.PrepareConfig(groups=2)


def mask_at_random(prepared: nn.Module, keep: float) -> None:
    """Every layer: two groups of random filters that read random channels, to a share of MACs."""
    low, high = 0.0, 1.0
    shapes = {name: mask.shape for name, mask in dspfx.get_masks(prepared).items()}
    for _ in range(12):
        share = (low + high) / 2
        generator = torch.Generator().manual_seed(0)
        masks = {}
        for name, (filters, channels) in shapes.items():
            reads = torch.rand(2, channels, generator=generator).argsort(1) < channels * share
            masks[name] = reads[torch.randint(2, (filters,), generator=generator)]
        dspfx.set_masks(prepared, masks)
        report = dspfx.report(prepared)
        if report.after.macs > keep * report.before.macs:
            high = share
        else:
            low = share


class Packed(nn.Module):
    """A masked convolution as the method's authors' program runs it."""

    def __init__(self, conv: nn.Conv2d, mask: Tensor) -> None:
        super().__init__()
        self.filters = len(mask)
        lists, group = mask.unique(dim=0, return_inverse=True)
        self.count = 0
        for number, reads in enumerate(lists):
            if not reads.any():
                continue
            members = (group == number).nonzero().flatten()
            own = nn.Conv2d(
                *(int(reads.sum()), len(members), conv.kernel_size, conv.stride, conv.padding),
                bias=False,
            )
            own.weight.data = conv.weight.detach()[members][:, reads].clone()
            self.add_module(f"conv_{self.count}", own)
            self.register_buffer(f"inputs_{self.count}", reads.nonzero().flatten())
            self.register_buffer(f"filters_{self.count}", members)
            self.count += 1

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` to `[N, O, H', W']`."""
        outputs = [
            getattr(self, f"conv_{i}")(x.index_select(1, getattr(self, f"inputs_{i}")))
            for i in range(self.count)
        ]
        together = torch.cat(outputs, 1)
        result = together.new_zeros(len(x), self.filters, *together.shape[2:])
        where = torch.cat([getattr(self, f"filters_{i}") for i in range(self.count)])
        return result.index_add(1, where, together)


def channel_pruned(dense: nn.Module, x: Tensor, macs: int) -> nn.Module:
    """`dense` with whole channels pruned by Torch-Pruning until it has at most `macs`."""
    low, high = 0.0, 1.0
    best: nn.Module | None = None
    for _ in range(8):
        ratio = (low + high) / 2
        model = copy.deepcopy(dense)
        heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
        torch_pruning.pruner.MagnitudePruner(
            model,
            x[:1],
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=heads,
        ).step()
        if macs_of(model, x[:1]) > macs:
            low = ratio
        else:
            high, best = ratio, model
    assert best is not None
    return best.eval()


def macs_of(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates for `x`, counted by torch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops()) // 2


def examine(case: Case, batch: int, threads: int) -> str:
    """The table of one case and batch size."""
    torch.compiler.reset()  # or torch would compile for all batch sizes at once
    x = torch.randn(batch, 3, case.size, case.size, generator=torch.Generator().manual_seed(0))
    compact = dspfx.convert(case.prepared)
    report = dspfx.report(compact)
    pruned = channel_pruned(case.dense, x, report.after.macs)
    started = time.perf_counter()
    fast = dspfx.compile(compact, x, engines=["own", "inductor"])
    seconds = time.perf_counter() - started
    plain = {"dense": case.dense, "channel-pruned": pruned}
    if case.packed is not None:
        plain["packed"] = case.packed
    calls: dict[tuple[str, str], Callable[[], Any]] = {("compact", "inductor"): partial(fast, x)}
    for name, model in tqdm(plain.items(), "compiling", disable=None, leave=False):
        calls[name, "inductor"] = partial(dspfx.compile(model, x, engines=["inductor"]), x)
    calls["packed", "eager"] = partial(_without_gradients, case.packed, x)
    if case.packed is None:
        del calls["packed", "eager"]
    for name, model in (("dense", case.dense), ("channel-pruned", pruned), ("compact", compact)):
        onnx = onnx_bytes(model, x)
        calls[name, "ONNX Runtime"] = onnx_runtime(onnx, x, threads)
        calls[name, "OpenVINO"] = openvino_runtime(onnx, x, threads)
    times = {key: 1e3 * value for key, value in medians(calls, ROUNDS, settle=SETTLE).items()}
    kept = report.after.macs / macs_of(case.dense, x[:1])
    return _section(case.name, batch, kept, times, fast.report, seconds)


def _section(
    name: str,
    batch: int,
    kept: float,
    times: dict[tuple[str, str], float],
    report: CompileReport,
    seconds: float,
) -> str:
    fastest = {
        network: min(ms for (of, _), ms in times.items() if of == network)
        for network in dict.fromkeys(of for of, _ in times)
    }
    runtimes = list(dict.fromkeys(runtime for _, runtime in times))
    rows = [
        (
            network,
            *(f"{times[network, r]:.2f}" if (network, r) in times else "" for r in runtimes),
            f"{fastest['dense'] / fastest[network]:.2f}",
        )
        for network in fastest
    ]
    table = tabulate(rows, ("ms", *runtimes, "speed-up"), "github", disable_numparse=True)
    best = 1e3 * sum(layer.seconds[layer.chosen] for layer in report.layers)
    timed = f" The {len(report.layers)} layers whose forms were timed take {best:.2f} ms together."
    networks = ", ".join(f"{form} {1e3 * value:.2f}" for form, value in report.timed)
    return (
        f"## {name}, batch {batch}\n\n{kept:.1%} of the MACs kept, ideal speed-up "
        f"{1 / kept:.2f}; *speed-up*: fastest over fastest dense.\n\n{table}\n\n"
        f"Compiled in {seconds:.0f} s. Whole network (ms): {networks}; chosen: {report.chosen}."
        + (timed if report.layers else "")
    )


def _without_gradients(model: nn.Module, x: Tensor) -> Any:
    with torch.no_grad():
        return model(x)


def onnx_bytes(model: nn.Module, x: Tensor) -> bytes:
    """The ONNX program of `model`."""
    file = io.BytesIO()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(file)
    return file.getvalue()


def onnx_runtime(onnx: bytes, x: Tensor, threads: int) -> Callable[[], Any]:
    """A call of `onnx` in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return partial(session.run, None, feed)


def openvino_runtime(onnx: bytes, x: Tensor, threads: int) -> Callable[[], Any]:
    """A call of `onnx` in OpenVINO, in float32."""
    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(io.BytesIO(onnx)), "CPU", settings)
    request = compiled.create_infer_request()
    return partial(request.infer, [np.ascontiguousarray(x.numpy())])


if __name__ == "__main__":
    typer.run(main)
