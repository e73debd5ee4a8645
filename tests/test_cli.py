"""The command line, as a user meets it."""

import re
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from dspfx.cli import app


def invoke(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, words, env={"COLUMNS": "100", "NO_COLOR": "1"})
    return result.exit_code, result.output


def test_help() -> None:
    code, text = invoke("--help")
    assert code == 0
    assert "demo" in text
    code, text = invoke("demo", "--help")
    assert code == 0
    assert "--keep-macs" in text


def test_errors_are_one_line(tmp_path: Path) -> None:
    for words in (
        ("--data", "imagenet"),
        ("--data", "fashion-mnist", "--folder", str(tmp_path)),
        ("--depth", "9"),
        ("--keep-macs", "0"),
    ):
        code, text = invoke("demo", "--images", "64", "--epochs-dense", "1", *words)
        assert code == 1
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert text.rstrip().endswith(errors[0])


def test_the_whole_demo_in_small() -> None:
    """In a process of its own, as users run it."""
    words = "demo --images 256 --epochs-dense 2 --epochs-learn 2 --epochs-tune 1 --keep-macs 0.5"
    run = subprocess.run(
        [sys.executable, "-m", "dspfx", *words.split()],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "360 of 360 predictions equal" in run.stdout
    tuned = re.search(r"masked, fine-tuned +(\S+%)", run.stdout)[1]
    assert re.search(r"compact +(\S+%)", run.stdout)[1] == tuned
    kept = float(re.search(r"whole model, MACs.* (\S+)%", run.stdout)[1])
    assert 49 < kept <= 50
    assert "stage_3.0.conv_b" in run.stdout
    assert re.search(r"compact is \d+\.\d+ times as fast", run.stdout)
    difference = float(re.search(r"outputs differ by at most (\S+)", run.stdout)[1])
    assert difference < 1e-3
