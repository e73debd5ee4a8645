"""Damaged and hostile files: an error of dspfx or a correct model, and nothing else happens.

`DSPFX_MUTATIONS=2000` tries that many files; their seeds are their numbers.
"""

import copy
import importlib.util
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from detector import IMAGES, Detector
from small import Small, pruned
from torch import Tensor, nn

import dspfx
from dspfx.storage import container as archive
from helpers import unchanged

COUNT = int(os.environ.get("DSPFX_MUTATIONS", "200"))
MOST_MEMORY = 2**30
FORBIDDEN = (
    "pickle.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
)
CODE = "__import__('pathlib').Path('executed').touch()"
NASTY: tuple[Any, ...] = (
    *(-1, 0, 1, 2, 7, 10**6, 2**31, 2**62, 2**63, 2**70, 10**400, 0.5, 1e308, True, False, None),
    *("", "x", "../../etc/passwd", "/etc/passwd", "a.0", "__class__", "forward.__globals__"),
    *(CODE, "lambda: 0", "\0", "é" * 1000, [], {}, [[]], [0] * 10**5, {"a": 1}, [None] * 3),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, nn.Module, nn.Module]]:
    """A saved file, the model in it and one to load it on."""
    folder = tmp_path_factory.mktemp("files")
    small, parts = pruned(Small(), groups=2), pruned(Detector().double(), (IMAGES,), groups=2)
    models = {
        "prepared": (small, Small()),
        "compact": (dspfx.convert(small), Small()),
        "branches": (dspfx.convert(small, cost_model=dspfx.FEWEST_WEIGHTS), Small()),
        "parts": (dspfx.convert(parts, cost_model=dspfx.FEWEST_WEIGHTS), Detector()),
    }
    if importlib.util.find_spec("torchao"):
        images = [torch.randn(2, 3, 10, 10)]
        models["quantised"] = (dspfx.quantize(models["branches"][0], images), Small())
    for name, (model, _) in models.items():
        dspfx.save(model, folder / name)
    return [(folder / name, model, fresh) for name, (model, fresh) in models.items()]


# -- mutations of bytes, which the digest or the container has to find ---------------------------


def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 1, 8, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.choice([rng.randrange(len(data)), len(data) - 1, 8, 7, 0]) :]


def extend(data: bytearray, rng: random.Random) -> None:
    data += rng.randbytes(rng.choice([1, 8, 1000]))


def resize_header(data: bytearray, rng: random.Random) -> None:
    size = int.from_bytes(data[:8], "little")
    new = rng.choice([0, size - 1, size + 8, len(data), 2**31, 2**63, 2**64 - 1])
    data[:8] = new.to_bytes(8, "little")


def blank(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice([1, 64, 4096]))
    data[start:end] = bytes([rng.choice([0, 32, 255])]) * (end - start)


def move_blocks(data: bytearray, rng: random.Random) -> None:
    size = rng.choice([4, 64, 512])
    a, b = (rng.randrange(len(data) - size) for _ in range(2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def edit_header(data: bytearray, rng: random.Random) -> None:
    """Types, shapes and offsets of tensors."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    edit_json({name: entry for name, entry in header.items() if name != "__metadata__"}, rng)
    text = json.dumps(header).encode()
    data[: 8 + size] = len(text).to_bytes(8, "little") + text


# -- mutations of content, whose digest is right -------------------------------------------------


def edit_json(value: Any, rng: random.Random) -> None:
    """Change something in `value`, anywhere."""
    places = [(c, key) for c in containers(value) for key in keys(c)]
    holder, key = rng.choice(places)
    match rng.randrange(5):
        case 0 | 1:
            holder[key] = copy.deepcopy(rng.choice(NASTY))
        case 2:
            del holder[key]
        case 3:
            other, place = rng.choice(places)
            holder[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(holder[key])
        case 4:
            near = [7, 1, -1, 2, 1000]
            old = holder[key]
            holder[key] = old * rng.choice(near) + rng.choice(near) if type(old) is int else [old]


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item)


def keys(container: Any) -> list[Any]:
    return list(container) if isinstance(container, dict) else list(range(len(container)))


def edit_plan(plan: dict[str, Any], tensors: dict[str, Tensor], rng: random.Random) -> None:
    """Anywhere in it, or in a place that a file of this size would hardly hit."""
    part = rng.choice(plan["parts"])
    targets = [plan, {k: v for k, v in part.items() if k != "graphs"}, part["arguments"]]
    if part["compaction"] is not None:
        targets += [part["compaction"], part["compaction"]["layers"], part["compaction"]["wants"]]
    for _ in range(rng.choice([1, 1, 3])):
        edit_json(rng.choice(targets), rng)


def enlarge(plan: dict[str, Any], tensors: dict[str, Tensor], rng: random.Random) -> None:
    """Whatever says how much there is."""
    part = rng.choice(plan["parts"])
    most = rng.choice([10**4, 10**6, 2**40])
    match rng.randrange(4):
        case 0:
            shapes = [c["shape"] for c in containers(part["arguments"]) if "shape" in keys(c)]
            shape = rng.choice(shapes)
            shape[rng.randrange(len(shape))] = most
        case 1:
            part["groups"] = part["round_to"] = most
        case 2:
            part["masks"] = {
                n: {**m, "lists": m["lists"] * 10**4} for n, m in part["masks"].items()
            }
        case 3 if part["compaction"] is not None:
            for layer in part["compaction"]["layers"].values():
                layer["parts"] = [
                    {key: [row * 500 for row in rows] for key, rows in own.items()}
                    for own in layer["parts"]
                ]
        case _:
            plan["aliases"] = {f"x{i}": f"x{i + 1}" for i in range(10**4)}


def swap_tensors(plan: dict[str, Any], tensors: dict[str, Tensor], rng: random.Random) -> None:
    a, b = rng.choice(list(tensors)), rng.choice(list(tensors))
    tensors[a], tensors[b] = tensors[b], tensors[a]


def rename_tensor(plan: dict[str, Any], tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(list(tensors))
    new = rng.choice(["../../x", "a/../../b", "__class__", "forward.__globals__", "", CODE, "a.b"])
    tensors[new] = tensors[name] if rng.random() < 0.3 else tensors.pop(name)


def distort_tensor(plan: dict[str, Any], tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(list(tensors))
    old = tensors[name]
    generator = torch.Generator().manual_seed(rng.randrange(2**32))
    noise = torch.randint(-(2**62), 2**62, old.shape, generator=generator)
    changes: list[Callable[[], Tensor | None]] = [
        lambda: None,
        lambda: old.to(rng.choice([torch.float16, torch.int64, torch.bool, torch.complex64])),
        old.flatten,
        lambda: old[None],
        lambda: old[:0] if old.dim() else old,
        lambda: noise.to(old.dtype),
        lambda: torch.full_like(old, rng.choice([0, 1, 127])),
        lambda: (noise % 256).to(torch.uint8).view(torch.bool) if old.dtype == torch.bool else old,
        lambda: old.float() * float("nan"),
        lambda: torch.cat([old, old]) if old.dim() else old,
    ]
    new = rng.choice(changes)()
    del tensors[name]
    if new is not None:
        tensors[name] = new


BYTES = (flip_bits, truncate, extend, resize_header, blank, move_blocks, edit_header)
CONTENT = (edit_plan, edit_plan, enlarge, swap_tensors, rename_tensor, distort_tensor)


def mutated(file: Path, target: Path, rng: random.Random) -> bool:
    """Write a mutation of `file`; whether its digest is right."""
    if rng.random() < 0.4:
        data = bytearray(file.read_bytes())
        rng.choice(BYTES)(data, rng)
        target.write_bytes(data)
        return False
    found = archive.read(file, 2**30)
    tensors = {name: tensor.clone() for name, tensor in found.tensors.items()}
    rng.choice(CONTENT)(found.plan, tensors, rng)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    archive.write(target, archive.Archive(found.plan, tensors))
    return True


# -- what must not happen ------------------------------------------------------------------------

_events: list[str] | None = None


@pytest.fixture(scope="module", autouse=True)
def _audited() -> None:
    """Hooks stay for good: this one listens only while `_events` is a list."""

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and set("wax+") & set(arguments[1] or "")
        if _events is not None and (event.startswith(FORBIDDEN) or writes):
            _events.append(f"{event} {arguments}")

    sys.addaudithook(note)


@contextmanager
def nothing_happens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is executed or written, and no more memory taken than is bounded."""
    global _events  # noqa: PLW0603
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is taken now
    start, _events = peak(), []
    try:
        yield
        assert _events == []
    finally:
        _events = None
    assert sorted(folder.iterdir()) == before
    assert peak() - start < MOST_MEMORY


def peak() -> int:
    """The most bytes of memory taken so far."""
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are Linux's")
@pytest.mark.parametrize("first", range(0, COUNT, 50))
def test_mutated_files(
    first: int,
    files: list[tuple[Path, nn.Module, nn.Module]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = 0
    for seed in range(first, min(first + 50, COUNT)):
        file, saved, fresh = files[seed % len(files)]
        signed = mutated(file, tmp_path / "mutated", random.Random(seed))
        with unchanged(fresh), nothing_happens(tmp_path, monkeypatch):
            try:
                loaded = dspfx.load(tmp_path / "mutated", fresh)
            except dspfx.LoadError:
                refused += 1
                continue
        assert_correct(loaded, saved, tmp_path / "mutated", signed)
    assert refused > 25  # or else the mutations are none


def assert_correct(loaded: nn.Module, saved: nn.Module, file: Path, signed: bool) -> None:
    """It holds what is in the file; that is what was saved, unless the digest was made again."""
    state = loaded.state_dict()
    if not signed:
        assert all(torch.equal(state[name], own) for name, own in saved.state_dict().items())
    stored = archive.read(file, 2**30).tensors
    for name, tensor in state.items():
        if name in stored:
            assert torch.equal(tensor.nan_to_num(), stored[name].nan_to_num())
    dspfx.report(loaded)
