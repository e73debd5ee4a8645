"""What is exported can be quantised: ONNX Runtime's static int8 on real digits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import Small
from torch import Tensor, nn

import dspfx


def digits() -> tuple[Tensor, Tensor]:
    """1,797 grey images of handwritten digits, `[N, 3, 8, 8]`, and what they show."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 16
    return images.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(data.target)


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def test_static_int8_keeps_the_accuracy(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    pytest.importorskip("onnxscript")
    x, y = digits()
    torch.manual_seed(0)
    model = Small(width=24)
    model.head = nn.Linear(24, 10)
    prepared = dspfx.prepare(model, x[:2])
    train(prepared, x[:1200], y[:1200], 4)
    dspfx.prune(prepared, dspfx.Budget(macs=0.6))
    train(prepared, x[:1200], y[:1200], 4)
    compact = dspfx.convert(prepared)
    dspfx.export(compact, x[:2], tmp_path / "m.onnx")

    class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.batches: Iterator[Any] = iter(x[:256].split(64))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    quantization.quantize_static(tmp_path / "m.onnx", tmp_path / "q.onnx", Calibration())

    def accuracy(name: str) -> float:
        session = runtime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"])
        (scores,) = session.run(None, {"x": x[1200:].numpy()})
        return float(np.mean(scores.argmax(1) == y[1200:].numpy()))

    with torch.no_grad():
        expected = float((compact(x[1200:]).argmax(1) == y[1200:]).float().mean())
    assert expected > 0.85
    assert accuracy("m.onnx") == pytest.approx(expected)
    assert accuracy("q.onnx") > expected - 0.03
    assert (tmp_path / "q.onnx").stat().st_size < 0.6 * (tmp_path / "m.onnx").stat().st_size
