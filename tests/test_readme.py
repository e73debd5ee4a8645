"""The README's Python runs, and the public names are what they are said to be."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import dspfx

ROOT = Path(__file__).resolve().parents[1]


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # they write files
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "README.md", "exec"), {})
        assert "whole model, MACs" in printed.getvalue()


def test_public_names() -> None:
    verbs = [
        "channel_graph",
        "cluster_groups",
        "compile",
        "convert",
        "distillation_loss",
        "export",
        "get_masks",
        "load",
        "load_checkpoint",
        "plot",
        "prepare",
        "prune",
        "prune_channels",
        "input_moments",
        "narrow",
        "recalibrate",
        "report",
        "save",
        "save_checkpoint",
        "set_masks",
        "widen",
    ]
    values = ["Budget", "CompactModule", "GroupLearner", "NarrowModule", "PrepareConfig"]
    values += ["CostModel", "CyclicFinetune", "DspfxWarning", "FEWEST_WEIGHTS", "GradualPruning"]
    values += ["PreparedModule"]
    reports = ["PruneReport", "Report"]
    errors = [name for name in dir(dspfx.errors) if name.endswith("Error")]
    assert sorted(dspfx.__all__) == sorted(verbs + values + reports + errors)
    for name in dspfx.__all__:
        assert getattr(dspfx, name).__doc__
    for name in errors:
        assert issubclass(getattr(dspfx, name), dspfx.DspfxError)
