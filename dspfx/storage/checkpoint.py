"""`save_checkpoint` and `load_checkpoint`: a whole training run in one file, or none of it."""

import contextlib
import copy
import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dspfx.errors import CheckpointError
from dspfx.utils.wrappers import unwrapped


def save_checkpoint(path: str | os.PathLike[str], /, **objects: Any) -> None:
    """Write the states of `objects`, and of the global random number generators, to a file.

    Whenever the process or the machine stops, the file is there as it was before, or as it is
    afterwards: a temporary file beside it is written, flushed to the disk and then renamed.

    Where several processes train one model, let the first one save, and all load: models are saved
    without what is wrapped around them. Only the process of the same rank takes over the random
    number generators, or all would draw the same numbers; one file for each process resumes all of
    them bit for bit.

    Args:
        path: of the file; folders that are missing are made.
        objects: by names of your choice: whatever has a `state_dict` (models, optimizers,
            schedulers, scalers, group learners), `torch.Generator`s, and plain values (numbers,
            strings, tensors, and lists, tuples and dicts of such).

    Raises:
        CheckpointError: a state is not made of plain values, so that `load_checkpoint` would
            refuse it, or the file cannot be written. An earlier file is then left as it was.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
        >>> path = Path(folder) / "last.ckpt"
        >>> dspfx.save_checkpoint(path, model=prepared, optimizer=optimizer, epoch=3)
        >>> dspfx.load_checkpoint(path, model=prepared, optimizer=optimizer)
        {'epoch': 3}
    """
    path = Path(path)
    states = {name: _state(value) for name, value in objects.items() if _has_state(value)}
    values = {name: value for name, value in objects.items() if not _has_state(value)}
    rank = _rank()
    temporary = path.with_name(f"{path.name}.{rank}.tmp" if rank else f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            parts = {"states": states, "values": values, "random": _random_state(), "rank": rank}
            torch.save(parts, file)
            file.flush()
            os.fsync(file.fileno())
        _check_plain(temporary)
        temporary.replace(path)
        _flush_folder(path.parent)
    except (OSError, pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if _was_interrupted(error):
            raise KeyboardInterrupt from error
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused it: the writer of torch ends with an error of its own then."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def load_checkpoint(path: str | os.PathLike[str], /, **objects: Any) -> dict[str, Any]:
    """Put `objects`, and the global random number generators, into the states of a checkpoint.

    The generators are left alone if the process that saved was of another rank.

    No code is run that the file might hold.

    Args:
        path: of a file that `save_checkpoint` wrote.
        objects: by the names they were saved with; some may be left out.

    Returns:
        The plain values that were saved; tensors are on the CPU.

    Raises:
        CheckpointError: there is no such file, it is damaged, it does not hold one of `objects`,
            or a state does not fit. All objects are then what they were.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
        >>> path = Path(folder) / "last.ckpt"
        >>> dspfx.save_checkpoint(path, model=prepared, optimizer=optimizer, epoch=3)
        >>> dspfx.load_checkpoint(path, model=prepared, optimizer=optimizer)
        {'epoch': 3}
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        states, values, generators = saved["states"], saved["values"], saved["random"]
    except Exception as error:  # a damaged file can fail in any way
        raise CheckpointError(f"{path} is damaged or no checkpoint of dspfx: {error}") from error
    for name in objects:
        if name not in states:
            raise CheckpointError(f"{path} holds no state of '{name}', only of {', '.join(states)}")
    before: dict[str, Any] = {}
    try:
        for name, value in objects.items():
            before[name] = copy.deepcopy(_state(value))
            _set_state(value, states[name])
        name = "the random number generators"
        if saved.get("rank", 0) == _rank():
            _set_random_state(generators)
    except Exception as error:  # whatever the objects raise on states of others
        for key, state in before.items():
            _set_state(objects[key], state)
        raise CheckpointError(f"the state of '{name}' in {path} does not fit: {error}") from error
    plain: dict[str, Any] = values
    return plain


def _has_state(value: Any) -> bool:
    return isinstance(value, torch.Generator) or hasattr(value, "state_dict")


def _state(value: Any) -> Any:
    value = unwrapped(value) if isinstance(value, nn.Module) else value
    return value.get_state() if isinstance(value, torch.Generator) else value.state_dict()


def _set_state(value: Any, state: Any) -> None:
    value = unwrapped(value) if isinstance(value, nn.Module) else value
    if isinstance(value, torch.Generator):
        value.set_state(state)
    else:
        value.load_state_dict(state)


def _rank() -> int:
    """The rank of this process among those that train together."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _random_state() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy_state = state["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _check_plain(path: Path) -> None:
    found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if found:
        raise TypeError(
            f"a state holds {', '.join(found)}; give plain numbers, strings, tensors, lists and "
            "dicts, such as float(x) for a NumPy scalar"
        )


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` last; where folders cannot be opened there is no need to."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
