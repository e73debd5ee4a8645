"""Every public name has an example in its docstring, and all of them run."""

import doctest
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dspfx

ROOT = Path(__file__).resolve().parents[1]
# public, by what they are returned by
OF_A_MODULE = ("compile.Compiled", "engines.report.CompileReport")

NEEDED = {
    "quantize": "torchao",
    "fake_quantize": "torchao",
}  # packages that an example needs, and the tests do not


def public() -> dict[str, Any]:
    """All that a user may call or make, by name; errors are raised, not made."""
    named = {name: getattr(dspfx, name) for name in dspfx.__all__}
    for path in OF_A_MODULE:
        module, _, name = path.rpartition(".")
        named[name] = getattr(importlib.import_module(f"dspfx.{module}"), name)
    errors = (Exception, Warning)
    return {
        name: found
        for name, found in named.items()
        if callable(found) and not (inspect.isclass(found) and issubclass(found, errors))
    }


@pytest.mark.parametrize("name", public())
def test_examples_run(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = {"torch": torch, "nn": nn, "dspfx": dspfx, "Path": Path, "folder": tmp_path}
    text = inspect.getdoc(inspect.unwrap(public()[name]))
    assert text is not None
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    example = doctest.DocTestParser().get_doctest(text, own, name, None, None)
    assert example.examples, f"{name} has no example"
    printed: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(example, out=printed.append)
    assert not result.failed, "".join(printed)


def test_only_public_names_are_listed() -> None:
    assert {n for n in dir(dspfx) if not n.startswith("__")} == set(dspfx.__all__)
    page = (ROOT / "docs" / "api.md").read_text()
    for name in dspfx.__all__:
        assert f".{name}\n" in page or page.endswith(f".{name}"), name


def test_rooms_are_imported_as_ever() -> None:
    for name in ("dspfx.layers", "dspfx.passes.analysis.liveness", "dspfx.errors"):
        assert importlib.import_module(name).__name__ == name
    assert dspfx.errors.DspfxError is dspfx.DspfxError
