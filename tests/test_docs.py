"""The site: every Python block of its pages runs, every command exists, and it builds.

tests/test_readme.py runs the Python of the README, whose commands are looked at here.
"""

import contextlib
import importlib.util
import io
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

import dspfx
from dspfx.commands.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
SOURCES = sorted(path for room in ("dspfx", "passes") for path in (ROOT / room).rglob("*.py"))
GLOSSARY = ("README.md", "docs/index.md", "docs/start.md", "docs/training.md", "docs/your_model.md")
HARMLESS = {"apt-get", "cd", "git", "open", "pip", "torchrun"}  # first words of other commands


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace: what stands further down a page may use what stands above."""
    monkeypatch.chdir(tmp_path)  # they write files
    namespace: dict[str, Any] = {}
    for block in blocks(page, "python"):
        run_and_check(block, namespace)


@pytest.mark.parametrize("text", [*TEXTS, *SOURCES], ids=name_of)
def test_code_that_a_text_names_exists(text: Path) -> None:
    """`dspfx.prune` or `passes.lowering.forms`, wherever the modules have moved to."""
    for name in re.findall(r"`((?:dspfx|passes)(?:\.\w+)+)", text.read_text()):
        if not name.startswith("dspfx.lightning"):  # which may be missing
            pkgutil.resolve_name(re.sub(r"^passes\b", "dspfx.passes", name))


@pytest.mark.parametrize("text", GLOSSARY)
def test_the_glossary_is_linked(text: str) -> None:
    assert re.search(r"\]\((?:docs/)?glossary\.md\)", (ROOT / text).read_text())


def run_and_check(block: str, namespace: dict[str, Any]) -> None:
    """Whether budgets are kept, files written, results printed, and all weights finite."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, "a block", "exec"), namespace)
    if re.search(r"^ *print\(", block, re.MULTILINE):
        assert printed.getvalue().strip(), block
    assert not re.search(r"\b(nan|inf)\b", printed.getvalue()), printed.getvalue()
    for file in re.findall(r'"(\w+\.(?:html|onnx|png|pt|safetensors))"', block):
        assert Path(file).stat().st_size > 0, file
    budgets = re.findall(r"Budget\((macs|params)=([\d.]+)\)|keep_(macs)=([\d.]+)", block)
    if budgets:
        what, share = [{"params": "parameters"}.get(word, word) for word in budgets[-1] if word]
        report = namespace["report" if "keep_macs" in block else "prepared"]
        if isinstance(report, nn.Module):
            report = dspfx.report(dspfx.convert(report))
        left = getattr(report.emitted, what) / getattr(report.before, what)
        assert 0 < left <= float(share), (left, block)
    for name, value in namespace.items():
        if isinstance(value, nn.Module):
            for key, tensor in value.state_dict().items():
                assert tensor.isfinite().all(), (name, key, block)


def test_wrong_blocks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    prepared = dspfx.prepare(model, torch.randn(2, 3, 8, 8))
    Path("x.pt").touch()
    namespace = {"dspfx": dspfx, "torch": torch, "prepared": prepared}
    for block in (
        *("dspfx.Budget(macs=0.5)", "print()", "print(0 * float('inf'))"),
        *('"x.onnx"', '"x.pt"'),  # no file, an empty one
        "dspfx.get_masks(prepared); prepared.get_parameter('0.weight').data /= 0",
    ):
        with pytest.raises((AssertionError, FileNotFoundError)):
            run_and_check(block, namespace)


def commands(page: Path) -> list[str]:
    """The lines of the shell blocks of a page, continued ones joined."""
    text = "\n".join(block for kind in ("sh", "bash") for block in blocks(page, kind))
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_commands_exist(page: Path) -> None:
    text = page.read_text()
    for line in commands(page):
        words = shlex.split(line, comments=True)
        if words:
            check_command(words)
    for module in re.findall(r"python -m (benchmarks\.[\w.]+)", text):
        assert importlib.util.find_spec(module), module
    for target in re.findall(r"`make (\w+)[^`]*`", text):
        assert target in targets(), target
    for line in re.findall(r"`(dspfx [a-z]+(?: --[^`]*)?)`", text):
        check_command(shlex.split(line))
    for option in re.findall(r"`(--[a-z-]+)`", text):
        assert option in options(), option
    for extra in re.findall(r"dspfx\[(\w+)\]", text):
        assert extra in extras(), extra


def check_command(words: list[str]) -> None:
    """Raise if the command, its target or one of its options does not exist."""
    while "=" in words[0]:  # settings of the environment
        words = words[1:]
    match words:
        case ["dspfx", *rest]:
            check_arguments(rest)
        case ["make", target, *settings]:
            assert target in targets(), target
            for setting in settings:
                name, _, value = setting.partition("=")
                assert name in ("ARGS", "PYTHON")
                if target == "demo" and name == "ARGS":
                    check_arguments(["demo", *shlex.split(value)])
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), module
        case ["python", script, *_]:
            assert any(
                folder.joinpath(script).is_file() for folder in (ROOT, ROOT / "docs/examples")
            )
        case [first, *_]:
            assert first in HARMLESS, words


def check_arguments(words: list[str]) -> None:
    """Whether the command and its options exist: help is printed when all words are understood."""
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    assert words, "a command is missing"


def test_wrong_commands_are_found() -> None:
    for line in (
        *(
            "dspfx demos",
            "dspfx demo --nothing 3",
            "dspfx",
            "make tests",
            "make demo ARGS=--nothing",
        ),
        *("python -m benchmarks.nothing", "python nothing.py", "nothing"),
    ):
        with pytest.raises(AssertionError):
            check_command(shlex.split(line))
    check_command(shlex.split("DSPFX_EXAMPLES=3 dspfx demo --depth 8"))


def options() -> set[str]:
    """Of all commands together."""
    commands = get_command(app)
    assert isinstance(commands, TyperGroup)
    own = [commands, *commands.commands.values()]
    return {"--help"} | {name for c in own for p in c.params for name in p.opts}


def targets() -> list[str]:
    return re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def extras() -> dict[str, list[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, list[str]] = project["optional-dependencies"]
    return found


# -- the site ------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page shows, and what a browser fetches for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.add(given.get("id") or "")
        if tag in ("img", "script", "iframe"):
            self.fetched.append(given.get("src") or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.fetched.append(given.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    if importlib.util.find_spec("material") is None:
        assert os.environ.get("DSPFX_TEST_DATA") != "required", "mkdocs-material is missing"
        pytest.skip("the extra `docs` is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    run = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


def test_the_site_needs_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.glob("*.html"))
    assert len(pages) > 10
    for path in pages:
        for address in Page(path).fetched:
            assert not re.match(r"(https?:)?//", address), (path.name, address)
            assert not address or (path.parent / address.partition("?")[0].lstrip("/")).exists()
    for path in site.glob("**/*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text()), path


def test_the_site_has_all_public_names_and_examples(site: Path) -> None:
    found = Page(site / "api.html").ids
    for name in dspfx.__all__:
        hidden = (ROOT / "dspfx" / f"{name}.py").is_file()  # by a module of the same name
        assert (f"dspfx.{name}.{name}" if hidden else f"dspfx.{name}") in found
    text = (site / "examples.html").read_text()
    for script in (ROOT / "docs" / "examples").glob("*.py"):
        assert script.name in text
        assert (site / "examples" / script.name).is_file()


def test_every_page_is_reached(site: Path) -> None:
    text = (site / "index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f'href="{page.stem}.html"' in text, f"add {page.name} to nav in mkdocs.yml"
