"""What several processes share out, and a run of two of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dspfx
from dspfx.recipe import Recipe
from dspfx.recipe.folder import RunFolder
from dspfx.recipe.networks.architectures import Architecture
from dspfx.recipe.team import Team, team
from dspfx.recipe.training import Training


def each(count: int) -> list[Team]:
    return [Team(rank, count, torch.device("cpu")) for rank in range(count)]


@pytest.mark.parametrize(("images", "count"), [(8, 1), (8, 2), (7, 2), (7, 3), (1, 4), (2, 5)])
def test_shares_are_equal_and_leave_nothing_out(images: int, count: int) -> None:
    batch = torch.arange(10, 10 + images)
    shares = [own.share(batch) for own in each(count)]
    assert len({len(share) for share in shares}) == 1
    assert set(torch.cat(shares).tolist()) == set(batch.tolist())
    parts = torch.cat([own.part(batch) for own in each(count)])
    assert sorted(parts.tolist()) == batch.tolist()  # each once: they are counted


def test_dropout_differs_between_processes(tmp_path: Path) -> None:
    drawn = []
    for own in each(3):
        torch.manual_seed(0)
        source: Any = None
        training = Training(Recipe(), RunFolder(tmp_path), source, own, checkpoint_minutes=1)
        phase: Any = SimpleNamespace(name="dense", epochs=lambda done: [])
        training.train(phase)
        drawn.append(torch.rand(3).tolist())
    torch.manual_seed(0)
    assert drawn[0] == torch.rand(3).tolist()
    assert len({tuple(numbers) for numbers in drawn}) == 3


def test_alone() -> None:
    with team("cpu") as own:
        assert (own.first, own.count, own.device) == (True, 1, torch.device("cpu"))
        model = torch.nn.Linear(2, 2)
        assert own.wrap(model) is model
        assert own.sums(1.0, 2.5) == [1.0, 2.5]
        assert own.largest(2.5) == 2.5
        assert own.one_first(lambda: 3) == 3
        own.wait()
    assert not torch.distributed.is_initialized()


def test_devices_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(dspfx.RecipeError, match="'toaster' is no device"), team("toaster"):
        pass
    with pytest.raises(dspfx.RecipeError, match="'xpu' is no device"), team("xpu"):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(dspfx.RecipeError, match="no CUDA device"), team("cuda"):
        pass
    with team("auto") as own:
        assert own.device.type == "cpu"


def test_two_processes_make_one_run(tmp_path: Path) -> None:
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2"
    words = (
        "--data digits --images 64 --epochs-dense 1 --epochs-learn 1 --epochs-tune 1 --cycles 1 "
        "--keep-macs 0.5 --threads 1 --device cpu --json --run-dir run"
    )
    done = subprocess.run(
        [sys.executable, *launch.split(), "-m", "dspfx", "train", *words.split()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["largest_difference"] < 1e-4
    assert result["equal_predictions"] == result["test_images"] == 360
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    phases = [json.loads(line).get("phase", "-") for line in lines]
    assert phases == ["dense", "-", "learn", "-", "tune"]
    assert result["masked"] == result["compact"]
    path, data = tmp_path / "run" / "model.safetensors", dspfx.recipe.images.datasets.load("digits")
    compact = dspfx.load(path, Architecture.beside(path).build())
    with torch.no_grad():  # all were asked about the network that is in the file
        right = (compact(data.test_x).argmax(1) == data.test_y).sum()
    assert int(right) == round(360 * result["compact"])
