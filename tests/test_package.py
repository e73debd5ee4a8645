"""What is shipped: the sdist and the wheel, and a stranger's way from the wheel to an ONNX file."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {".ci/run", ".gitignore"}
GENERATED = {"PKG-INFO", "setup.cfg"}

USE = """
import sys, torch, dspfx
assert dspfx.__file__.startswith(sys.prefix), dspfx.__file__
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)
)
prepared = dspfx.prepare(model, torch.randn(2, 3, 16, 16))
print(dspfx.prune(prepared, dspfx.Budget(macs=0.5)))
compact = dspfx.convert(prepared)
dspfx.save(compact, "pruned.safetensors")
dspfx.load("pruned.safetensors", model)
"""

# what somebody writes who has read the README and wants one of timm's models
STRANGER = """
import numpy, onnxruntime, timm, torch, dspfx

model = timm.create_model("resnet10t", num_classes=5).eval()
x = torch.randn(2, 3, 64, 64)
prepared = dspfx.prepare(model, x)
dspfx.cluster_groups(prepared)
print(dspfx.prune(prepared, dspfx.Budget(macs=0.5)))
compact = dspfx.convert(prepared)
dspfx.export(compact, x, "resnet10t.onnx")
session = onnxruntime.InferenceSession("resnet10t.onnx")
images = torch.randn(3, 3, 64, 64)
(outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
numpy.testing.assert_allclose(outputs, prepared.eval()(images).detach(), rtol=1e-3, atol=1e-4)
report = dspfx.report(compact)
report.to_html("report.html")
"""


def sources() -> set[str]:
    """The files of the project: what git tracks; outside a checkout, all that is not hidden."""
    git = shutil.which("git")
    if git is not None:
        listed = subprocess.run(
            [git, "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.splitlines()
        if listed:
            return {name for name in listed if (ROOT / name).exists()}
    made = re.compile(
        r"(build|data|dist|runs|site)/|.*(\.egg-info|__pycache__)/|\.(?!ci/|gitignore)"
    )
    names = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()}
    return {name for name in names - GENERATED if not made.match(name)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and the wheel that was built from that, of a copy of the sources."""
    copy = tmp_path_factory.mktemp("sources")
    for name in sources():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return copy / "dist"


@pytest.fixture(scope="module")
def python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with the wheel in it.

    It finds what dspfx depends on where this Python has it, but no project installed there to be
    worked on: `.pth` files count only in an environment's own folder.
    """
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    here = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(here))
    return python


def run_alone(python: Path, code: str, folder: Path) -> str:
    """What `code` prints in `folder`, with nothing of this project on its path."""
    (folder / "script.py").write_text(code)
    run = subprocess.run(
        [python, "-I", "script.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_wheel_holds_the_package_alone(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        notes = {Path(name).name for name in archive.namelist() if ".dist-info/" in name}
        licence = next(name for name in archive.namelist() if name.endswith("/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert notes == {
        *("LICENSE", "METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")
    }
    kernel = r"dspfx/layers/native/.*\.(cpp|h)"
    package = re.compile(rf"(dspfx|passes)/.*\.(py|html)|{kernel}|dspfx/py\.typed")
    expected = {name for name in sources() if package.fullmatch(name)}
    assert names == {re.sub("^passes/", "dspfx/passes/", name) for name in expected}
    assert {"dspfx/layers/native/group_conv.cpp", "dspfx/py.typed"} <= names
    assert "dspfx/passes/analysis/channels.py" in names


def test_the_sdist_holds_all_sources(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    names = {name for name in names if not name.startswith("dspfx.egg-info/")}
    assert names == sources() - LEFT_OUT | GENERATED


def test_the_wheel_works_alone(python: Path, tmp_path: Path) -> None:
    assert "budget 50.00%" in run_alone(python, USE, tmp_path)


def test_the_command_is_installed(python: Path) -> None:
    command = [python.with_name("dspfx"), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "demo" in run.stdout


def test_a_stranger_reads_the_readme(python: Path, tmp_path: Path) -> None:
    """The first example as it stands, then a model of timm by name, to a verified ONNX file."""
    first = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    printed = run_alone(python, first[1] + STRANGER, tmp_path)
    assert "whole model, MACs" in printed
    assert re.findall(r"kept .*budget (\d+)", printed) == ["35", "50"]
    assert (tmp_path / "resnet10t.onnx").stat().st_size > 1e5
    assert "<html" in (tmp_path / "report.html").read_text()
