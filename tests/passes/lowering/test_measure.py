"""Measured times: remembered between processes, never trusted blindly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dspfx.passes.lowering import measure
from dspfx.passes.lowering.measure import Measured, signature

X = torch.randn(1, 4, 6, 6)
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSPFX_CACHE_DIR", str(tmp_path / "times"))
    return tmp_path / "times"


def layers() -> dict[str, nn.Module]:
    return {"wide": nn.Conv2d(4, 8, 3).eval(), "narrow": nn.Conv2d(4, 2, 3).eval()}


def test_times_are_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Measured(CPU)
    times = first(layers(), X)
    assert set(times) == {"wide", "narrow"}
    assert all(t > 0 for t in times.values())
    first.save()

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it is known")

    monkeypatch.setattr(measure, "medians", never)
    assert Measured(CPU)(layers(), X) == times
    with pytest.raises(AssertionError, match="it is known"):
        Measured(CPU)(layers(), torch.randn(2, 4, 6, 6))


def test_what_others_save_meanwhile_is_kept(folder: Path) -> None:
    stores = Measured(CPU), Measured(CPU)
    for (name, layer), store in zip(layers().items(), stores, strict=True):
        store({name: layer}, X)
        store.save()
    assert len(Measured(CPU).known) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": "b", "c": -1.0, "d": null}', "\0\xff"])
def test_a_damaged_file_counts_as_empty(folder: Path, text: str) -> None:
    store = Measured(CPU)
    store(layers(), X)
    store.save()
    store.path.write_text(text)
    assert Measured(CPU).known == {}


def test_bytes_that_are_no_text_count_as_empty(folder: Path) -> None:
    path = Measured(CPU).path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xfe\x00{")
    assert Measured(CPU).known == {}


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSPFX_CACHE_DIR", str(tmp_path / "file" / "below"))
    store = Measured(CPU)
    store(layers(), X)
    store.save()
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_threads_shapes_types_and_layouts_are_told_apart(folder: Path) -> None:
    conv = nn.Conv2d(4, 8, 3)
    last = X.expand(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    keys = {signature(conv, x) for x in (X, X.double(), X[:, :, :5], last, last.contiguous())}
    assert len(keys) == 5
    path, threads = Measured(CPU).path, torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert Measured(CPU).path != path
    finally:
        torch.set_num_threads(threads)
