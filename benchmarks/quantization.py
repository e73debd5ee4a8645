"""What integers of 8 bits cost in accuracy.

    python -m benchmarks.quantization run [--scenario vit] [--seed 0]
    python -m benchmarks.quantization page    # docs/quantization.md

Networks of `benchmarks.accuracy` on Fashion-MNIST-20k, in float32, quantised after training with
512 images, and fine-tuned with rounding; and how often ONNX Runtime and OpenVINO, given the
exported file, decide as the quantised module does. One line of JSON for each network; those that
have one already are left out.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import openvino
import torch
import typer
from onnxruntime import InferenceSession
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import dspfx
from benchmarks.accuracy.protocol import Data, Schedule, accuracy, fashion_mnist, generator, train
from benchmarks.accuracy.results import made_by
from benchmarks.accuracy.runs import DENSE, Job, network
from benchmarks.accuracy.scenarios import IMAGE, SCENARIOS

RESULTS = Path(__file__).parent / "results" / "quantization.jsonl"
TRAINED = Path("runs") / "quantization"  # compact networks, trained again where they are missing
METHOD = "whole channels, gradually"
PRUNED = {"resnet20": (0, 65), "mobile": (0, 65), "vit": (0,)}  # percent
PAGE = Path(__file__).resolve().parents[1] / "docs" / "quantization.md"
CALIBRATION, AGREEMENT = 512, 1000  # images
TUNED = Schedule((3,), lr=0.003, weight_decay=1e-4)
HEAD = f"""# Accuracy in 8 bits

Written by `python -m benchmarks.quantization page`, from what its `run` measured: top-1 in percent
on the 10,000 test images of Fashion-MNIST; 20,000 were trained on.

- *float32*: the compact network; pruned ones by `dspfx.GradualPruning`, whole channels;
- *quantised*: by `dspfx.quantize` with {CALIBRATION} training images, without training;
- *fine-tuned*: by `dspfx.fake_quantize`, {TUNED.epochs} epochs at a learning rate of {TUNED.lr},
  then `dspfx.quantize`;
- *agrees*: on what share of {AGREEMENT:,} test images the runtime, given the exported file, decides
  as the quantised module does in PyTorch."""
app = typer.Typer(add_completion=False, no_args_is_help=True)


@dataclass(frozen=True)
class Outcome:
    """One network.

    Attributes:
        scenario, method, seed, pruned: as in `benchmarks.accuracy`.
        float32, after_training, fine_tuned: top-1 on the test images, percent.
        agree: by runtime, the share of test images for which it decides as the quantised module.
        kept: the layers that stay in float32, and why.
        made: command, versions and date.
    """

    scenario: str
    method: str
    seed: int
    pruned: int
    float32: float
    after_training: float
    fine_tuned: float
    agree: dict[str, float]
    kept: dict[str, str]
    made: dict[str, str]

    @property
    def key(self) -> tuple[str, str, int, int]:
        """That of its `Job`."""
        return self.scenario, self.method, self.seed, self.pruned


def compact_network(job: Job) -> nn.Module:
    """The compact network of `job`, in evaluation mode; it is trained if it has not been."""
    file = TRAINED / f"{'-'.join(map(str, job.key))}.dspfx"
    if not file.is_file():
        model = network(job)
        if not isinstance(model, dspfx.PreparedModule):
            model = dspfx.prepare(model, IMAGE.expand(2, -1, -1, -1))
        TRAINED.mkdir(parents=True, exist_ok=True)
        dspfx.save(dspfx.convert(model), file)
    return dspfx.load(file, SCENARIOS[job.scenario].build())


def measured(job: Job, compact: nn.Module, data: Data, tuned: Schedule = TUNED) -> Outcome:
    """What the compact network of `job` loses when its numbers are rounded."""
    images = data.train_x[:CALIBRATION].cpu().split(64)
    quantized = dspfx.quantize(compact, images)
    trainable = dspfx.fake_quantize(compact, images)
    train(trainable, data, tuned, generator(*job.key, "rounded"))
    parts = [m for m in quantized.modules() if isinstance(m, dspfx.CompactModule)]
    return Outcome(
        job.scenario,
        job.method,
        job.seed,
        job.pruned,
        float32=accuracy(compact, data),
        after_training=accuracy(quantized, data),
        fine_tuned=accuracy(dspfx.quantize(trainable.eval()), data),
        agree=agreement(quantized, data.test_x[:AGREEMENT].cpu()),
        kept={name: why for part in parts for name, why in part.quantization.places.kept.items()},
        made=made_by("python -m benchmarks.quantization run"),
    )


def agreement(quantized: nn.Module, images: Tensor) -> dict[str, float]:
    """For what share of `images` the runtimes decide as `quantized` does."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "quantized.onnx"
        dspfx.export(quantized, images[:2], file)
        session = InferenceSession(file, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        calls: dict[str, Callable[[Any], Any]] = {
            "onnxruntime": lambda x: session.run(None, {name: x})[0],
            "openvino": lambda x: compiled({name: x})[0],
        }
        right: dict[str, int] = dict.fromkeys(calls, 0)
        for x in images.contiguous().split(100):
            expected = quantized(x).argmax(1)
            for runtime, call in calls.items():
                found = torch.from_numpy(call(x.numpy())).argmax(1)
                right[runtime] += int((found == expected).sum())
    return {runtime: count / len(images) for runtime, count in right.items()}


def read() -> list[Outcome]:
    """What was measured so far."""
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return [Outcome(**json.loads(line)) for line in lines]


@app.command()
def run(
    scenario: Annotated[list[str] | None, typer.Option(help=", ".join(SCENARIOS))] = None,
    method: Annotated[str, typer.Option(help="of benchmarks.accuracy")] = METHOD,
    pruned: Annotated[
        list[int] | None, typer.Option(help="percent of the gated MACs, 0: dense")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="only these")] = None,
) -> None:
    """Measure what has no line yet; a second call goes on where the first was stopped."""
    done = {outcome.key for outcome in read()}
    jobs = [
        Job(name, method if percent else DENSE, number, percent)
        for name in scenario or ("resnet20", "mobile", "vit")
        for number in seed or (0, 1, 2)
        for percent in pruned or PRUNED[name]
    ]
    for job in tqdm([job for job in jobs if job.key not in done]):
        outcome = measured(job, compact_network(job), fashion_mnist(SCENARIOS[job.scenario].images))
        with RESULTS.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        tqdm.write(
            f"{job.scenario}, seed {job.seed}, {job.pruned} %: float32 {outcome.float32:.2f}, "
            f"quantised {outcome.after_training:.2f}, fine-tuned {outcome.fine_tuned:.2f}, "
            f"{outcome.agree}"
        )


@app.command()
def page() -> None:
    """Write the page."""
    lines = sorted(read(), key=lambda line: (list(SCENARIOS).index(line.scenario), line.pruned))
    rows = [
        (
            SCENARIOS[line.scenario].title.split(",")[0],
            f"{line.pruned}%" if line.pruned else "dense",
            line.seed,
            f"{line.float32:.2f}",
            f"{line.after_training:.2f}",
            f"{line.fine_tuned:.2f}",
            *(f"{100 * line.agree[runtime]:.1f}%" for runtime in ("onnxruntime", "openvino")),
        )
        for line in lines
    ]
    header = (
        "network",
        "pruned",
        "seed",
        "float32",
        "quantised",
        "fine-tuned",
        "ONNX Runtime agrees",
        "OpenVINO agrees",
    )
    text = tabulate(rows, header, "github", disable_numparse=True)
    PAGE.write_text(f"{HEAD}\n\n{text}\n")


if __name__ == "__main__":
    app()
