"""What integers of 8 bits cost in accuracy: `python -m benchmarks.quantization`.

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
from torch import Tensor, nn
from tqdm import tqdm

import dspfx
from benchmarks.accuracy.protocol import Data, Schedule, accuracy, fashion_mnist, generator, train
from benchmarks.accuracy.results import made_by
from benchmarks.accuracy.runs import DENSE, Job, network
from benchmarks.accuracy.scenarios import SCENARIOS

RESULTS = Path(__file__).parent / "results" / "quantization.jsonl"
METHOD = "whole channels, gradually"
CALIBRATION, AGREEMENT = 512, 1000  # images
TUNED = Schedule((3,), lr=0.003, weight_decay=1e-4)


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


def measured(job: Job, model: nn.Module, data: Data, tuned: Schedule = TUNED) -> Outcome:
    """What the network of `job` loses when its numbers are rounded."""
    if not isinstance(model, dspfx.PreparedModule):
        model = dspfx.prepare(model, data.test_x[:2].cpu())
    compact = dspfx.convert(model)
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
        made=made_by("python -m benchmarks.quantization"),
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


def main(
    scenario: Annotated[list[str] | None, typer.Option(help=", ".join(SCENARIOS))] = None,
    method: Annotated[str, typer.Option(help="of benchmarks.accuracy")] = METHOD,
    pruned: Annotated[list[int] | None, typer.Option(help="percent of the gated MACs")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="only these")] = None,
) -> None:
    """Measure what has no line yet; a second call goes on where the first was stopped."""
    done = {outcome.key for outcome in read()}
    jobs = [
        job
        for name in scenario or ("resnet20", "mobile")
        for number in seed or (0, 1, 2)
        for job in (
            Job(name, DENSE, number, 0),
            *(Job(name, method, number, percent) for percent in pruned or (65,)),
        )
    ]
    for job in tqdm([job for job in jobs if job.key not in done]):
        outcome = measured(job, network(job), fashion_mnist(SCENARIOS[job.scenario].images))
        with RESULTS.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        tqdm.write(
            f"{job.scenario}, seed {job.seed}, {job.pruned} %: float32 {outcome.float32:.2f}, "
            f"quantised {outcome.after_training:.2f}, fine-tuned {outcome.fine_tuned:.2f}, "
            f"{outcome.agree}"
        )


if __name__ == "__main__":
    typer.run(main)
