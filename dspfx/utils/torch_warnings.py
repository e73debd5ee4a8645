"""Warnings of torch that say nothing about the user's model or machine."""

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CPP_EXTENSION = "torch.utils.cpp_extension"


def without_cuda_home() -> Any:
    """Import what builds code in C++ before torch does, but for its word on `CUDA_HOME`.

    It warns of a `CUDA_HOME` where there is no GPU to use, whatever the code is built for. All else
    that it logs is shown.
    """
    if _CPP_EXTENSION in sys.modules:
        return sys.modules[_CPP_EXTENSION]
    with not_logged(_CPP_EXTENSION, "No CUDA runtime is found"):
        return importlib.import_module(_CPP_EXTENSION)


@contextmanager
def not_logged(name: str, text: str) -> Iterator[None]:
    """Meanwhile the logger `name` shows no message with `text` in it."""

    def says_else(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger = logging.getLogger(name)
    logger.addFilter(says_else)
    try:
        yield
    finally:
        logger.removeFilter(says_else)
