"""The file of results: one line a case, the last of equal ones counts."""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "results" / "latency.jsonl"
KEY = ("network", "batch", "precision", "keep", "threads", "processor")


def read(path: Path = FILE) -> list[dict[str, Any]]:
    """All cases, in the order in which they were first measured."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return list({key_of(line): line for line in lines}.values())


def append(line: dict[str, Any], path: Path = FILE) -> None:
    """Add one case."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def key_of(line: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a case from others."""
    return tuple(line[name] for name in KEY)
