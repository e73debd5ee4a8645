"""The README: its Python runs, its figures are measured, its links lead somewhere, it is short.

And the public names are what they are said to be.
"""

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


def test_it_is_read_in_a_minute() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8192


def test_what_it_points_to_is_there() -> None:
    """Files and, of pages, sections: `docs/page.md#section`."""
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    own = [target for target in targets if not target.startswith("https://")]
    assert len(own) > 10
    for target in own:
        path, _, section = target.partition("#")
        assert (ROOT / path).exists(), target
        if section:
            assert section in sections(ROOT / path), target


def sections(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^##+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def measured_rows() -> list[tuple[list[str], Path]]:
    """The figures of every row of the first table, and the page that they are from."""
    text = (ROOT / "README.md").read_text()
    table = re.search(r"^\| network.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table
    rows = []
    for row in table[1].splitlines():
        cells, link = row.rsplit("|", 2)[0], re.search(r"\((docs/\w+\.md)\)", row)
        assert link, row
        rows.append((re.findall(r"\d+\.\d+", cells), ROOT / link[1]))
    return rows


def test_figures_of_the_table_are_in_the_pages_that_benchmarks_write() -> None:
    rows = measured_rows()
    assert len(rows) >= 3
    for figures, page in rows:
        text = page.read_text()
        assert re.search(r"^Written by `python -m benchmarks\.", text, re.MULTILINE), page
        assert len(figures) >= 2, figures  # the times of both networks
        for figure in figures:
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", text), (figure, page.name)


def test_public_names() -> None:
    verbs = [
        "channel_graph",
        "cluster_groups",
        "compile",
        "compress",
        "convert",
        "distillation_loss",
        "export",
        "fake_quantize",
        "get_masks",
        "load",
        "load_checkpoint",
        "plot",
        "prepare",
        "prune",
        "prune_channels",
        "quantize",
        "input_moments",
        "narrow",
        "recalibrate",
        "compensate",
        "report",
        "save",
        "save_checkpoint",
        "set_masks",
        "widen",
    ]
    values = ["Budget", "CompactModule", "GroupLearner", "NarrowModule", "PrepareConfig"]
    values += ["CostModel", "CyclicFinetune", "DspfxWarning", "FEWEST_WEIGHTS", "GradualPruning"]
    values += ["PreparedModule"]
    reports = ["Compensation", "Compressed", "PruneReport", "Report"]
    errors = [name for name in dir(dspfx.errors) if name.endswith("Error")]
    assert sorted(dspfx.__all__) == sorted(verbs + values + reports + errors)
    for name in dspfx.__all__:
        assert getattr(dspfx, name).__doc__
    for name in errors:
        assert issubclass(getattr(dspfx, name), dspfx.DspfxError)
