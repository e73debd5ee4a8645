"""A pruned network in ONNX Runtime: exported once, it serves batches of any size.

    python onnxruntime_serving.py

Requests of one or several images wait in a queue; whatever waits is answered together, up to a
largest batch. Three networks do the same work: the dense one, and two that were pruned with one
and with four groups to a layer. What groups save, a runtime may lose again in gathering their
channels: measure with the runtime that you deploy.
"""

import queue
import random
import time
from typing import Annotated

import numpy as np
import onnxruntime
import torch
import torchvision
import typer
from tabulate import tabulate

import dspfx

SHAPE = (3, 64, 64)
Image = np.ndarray  # float32 [3, 64, 64]


class Server:
    """Answers requests from a queue, several in one batch."""

    def __init__(self, path: str, most: int = 8) -> None:
        self.session = onnxruntime.InferenceSession(path)
        self.input = self.session.get_inputs()[0].name
        self.most = most
        self.waiting: queue.Queue[list[Image]] = queue.Queue()
        self.batches: list[int] = []

    def answer(self) -> list[np.ndarray]:
        """The logits `[n, classes]` of every request that waits, in their order."""
        answers: list[np.ndarray] = []
        while not self.waiting.empty():
            requests = [self.waiting.get()]
            while not self.waiting.empty() and sum(map(len, requests)) < self.most:
                requests.append(self.waiting.get())
            batch = np.stack([image for request in requests for image in request])
            (logits,) = self.session.run(None, {self.input: batch})
            self.batches.append(len(batch))
            ends = np.cumsum([len(request) for request in requests])
            answers += np.split(logits, ends[:-1])
        return answers


def main(
    keep: Annotated[float, typer.Option(help="fraction of the MACs to keep")] = 0.3,
    requests: Annotated[int, typer.Option(min=1, help="how many come in")] = 40,
) -> None:
    """Export ResNet-18 dense and pruned, and let all answer the same requests."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    example = torch.randn(2, *SHAPE)
    networks = {"dense": model}
    for groups in (1, 4):
        prepared = dspfx.prepare(model, example, config=dspfx.PrepareConfig(groups=groups))
        dspfx.cluster_groups(prepared)
        print(dspfx.prune(prepared, dspfx.Budget(macs=keep)))
        networks[f"groups_{groups}"] = dspfx.convert(prepared)

    draw = random.Random(0)
    sizes = [draw.choice((1, 1, 1, 2, 3)) for _ in range(requests)]
    images = torch.randn(sum(sizes), *SHAPE)
    asked = [list(part.numpy()) for part in images.split(sizes)]
    rows = []
    for name, network in networks.items():
        dspfx.export(network, example, f"{name}.onnx")
        server = Server(f"{name}.onnx")
        for request in asked:
            server.waiting.put(request)
        start = time.perf_counter()
        answers = server.answer()
        seconds = time.perf_counter() - start
        with torch.no_grad():
            expected = network(images).numpy()
        given = np.concatenate(answers)
        difference = np.abs(given - expected).max() / np.abs(expected).max()
        if [len(answer) for answer in answers] != sizes or difference > 1e-3:
            raise SystemExit(f"the {name} network's answers differ by {difference:.1e}")
        batches = f"{min(server.batches)} to {max(server.batches)}"
        rate = f"{len(images) / seconds:.0f}"
        rows.append((name, len(server.batches), batches, rate, f"{difference:.0e}"))
    print()
    header = ("network", "batches", "of images", "images/s", "difference from torch")
    print(tabulate(rows, header, disable_numparse=True))


if __name__ == "__main__":
    typer.run(main)
