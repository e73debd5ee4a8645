"""The file: safetensors, with a plan as JSON in its metadata, and a digest of everything.

No part of it is code. It is written under another name in the same folder, forced to the disk, and
then given its name, so that there is either the whole file or none. Reading allocates no more than
the file has, and nothing for a file that is larger than it could be.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspfx.errors import LoadError, SaveError
from dspfx.utils.atomic_write import replacing

KEY = "dspfx"  # one key of metadata alone: several would be written in any order
FORMAT = 3
MOST_HEADER = 2**25  # bytes


@dataclass(frozen=True)
class Archive:
    """What is in a file.

    Attributes:
        plan: JSON, its `format` the number of the format.
        tensors: by name; they may lie in the file until they are read.
    """

    plan: dict[str, Any]
    tensors: dict[str, Tensor]


def write(path: Path, archive: Archive) -> None:
    """Write `archive` to `path`, whole or not at all.

    Raises:
        SaveError: there is a type of tensor that cannot be stored, or no space.
    """
    tensors = _storable(archive.tensors)
    text = _text({"sha256": _digest(archive.plan, tensors), "plan": archive.plan})
    if len(text) > MOST_HEADER // 2:
        raise SaveError(f"the plan of the model takes {len(text):,} characters, too many")
    try:
        with replacing(path, SaveError) as temporary:
            save_file(tensors, temporary, {KEY: text})
    except (SafetensorError, KeyError, ValueError) as error:
        raise SaveError(f"{path} cannot be written: {error}") from error


def read(path: Path, most_bytes: int) -> Archive:
    """What is in the file at `path`; whether it makes sense is not checked.

    Args:
        path: of a regular file.
        most_bytes: a larger file is refused.

    Raises:
        LoadError: it is no file of dspfx, a damaged one, or of a format that is not known.
    """
    if not path.exists():
        raise LoadError(f"there is no file {path}")
    try:
        _check_size(path, most_bytes)
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY, "null")
            found = json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
            plan, digest = _of_known_format(path, found)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoadError(f"{path} is no file of dspfx.save, or a damaged one: {error}") from error
    if digest != _digest(plan, tensors):
        raise LoadError(f"{path} is damaged: it does not hold what was written; get it again")
    return Archive(plan, tensors)


def _check_size(path: Path, most_bytes: int) -> None:
    """Check, before anything is read, that the file and its header are not too large."""
    status = path.stat()
    if not S_ISREG(status.st_mode):
        raise LoadError(f"{path} is no regular file")
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > min(MOST_HEADER, status.st_size - 8):
        raise LoadError(f"{path} is damaged, or no file of dspfx.save: its header is too long")
    if status.st_size > most_bytes:
        raise LoadError(
            f"{path} has {status.st_size:,} bytes, more than this model could be saved in; it was "
            "saved of another one"
        )


def _of_known_format(path: Path, found: Any) -> tuple[dict[str, Any], str]:
    """The plan and the digest in the metadata."""
    match found:
        case {"sha256": str(digest), "plan": {"format": int(number)}} if number > 0:
            plan: dict[str, Any] = found["plan"]
        case _:
            raise LoadError(f"{path} holds no plan of dspfx.save; it was written by something else")
    if number > FORMAT:
        raise LoadError(
            f"{path} has format {number}, this dspfx reads formats up to {FORMAT}; it was written "
            f"by dspfx {str(plan.get('dspfx'))[:20]}: update dspfx to that version"
        )
    return plan, digest


def _text(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and sharing nothing with each other."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
            raise SaveError(f"'{name}' is no ordinary tensor that holds values, and is not stored")
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        found[name] = own.clone() if storage in storages else own
        storages.add(storage)
    return found


def _digest(plan: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The digest of the plan, and of the names, types, shapes and bytes of the tensors."""
    sha = hashlib.sha256(_text(plan).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(_text([name, str(tensor.dtype), list(tensor.shape)]).encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found
