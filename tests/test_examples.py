"""The scripts of docs/examples run as they are, in a folder of their own, with fewer steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


def run_example(name: str, folder: Path, *options: str) -> str:
    """What an example prints, run in `folder`."""
    run = subprocess.run(
        [sys.executable, EXAMPLES / name, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("name", ["segmentation_unet.py", "detector.py"])
def test_examples_that_train(name: str, tmp_path: Path) -> None:
    printed = run_example(name, tmp_path, "--steps", "12", "--keep", "0.5")
    assert "masked and compact are equal" in printed
    kept = float(re.search(r"whole model, MACs .* (\S+)%", printed)[1])
    assert 40 < kept <= 50
    qualities = re.findall(r"(?:dense|compact) ([\d.]+)%?$", printed, re.MULTILINE)
    assert len(qualities) == 2


def test_a_model_of_timm(tmp_path: Path) -> None:
    printed = run_example("timm_model.py", tmp_path, "--size", "64", "--output", "small.onnx")
    assert "equal to the masked model" in printed
    assert (tmp_path / "small.onnx").is_file()


def test_serving_with_onnx_runtime(tmp_path: Path) -> None:
    printed = run_example("onnxruntime_serving.py", tmp_path, "--requests", "12")
    rows = re.findall(r"^(dense|groups_1|groups_4) +\d", printed, re.MULTILINE)
    assert rows == ["dense", "groups_1", "groups_4"]
