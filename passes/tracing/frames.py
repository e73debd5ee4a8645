"""Inspect the stack: whose code is running, the user's or torch's and the tracer's."""

import dis
import linecache
import os
import sys
from pathlib import Path
from types import CodeType, FrameType

import torch

_MACHINERY = tuple(
    f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1])
)


def is_machinery(frame: FrameType) -> bool:
    """Whether the code that runs in `frame` is torch's or the tracer's."""
    return frame.f_code.co_filename.startswith(_MACHINERY)


def unpacks(frame: FrameType) -> bool:
    """Whether the instruction under way in `frame` is `a, b = ...`."""
    return dis.opname[frame.f_code.co_code[frame.f_lasti]] == "UNPACK_SEQUENCE"


def line_under_way(outermost: CodeType) -> str:
    """The innermost line of the user's code, called by `outermost`: "file.py:12: code"."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_machinery(frame):
        if frame.f_code is outermost:
            return ""
        frame = frame.f_back
    if frame is None:
        return ""
    file, number = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(file).name}:{number}: {linecache.getline(file, number).strip()}"
