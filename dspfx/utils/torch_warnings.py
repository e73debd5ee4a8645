"""Warnings of torch that say nothing about the user's model or machine."""

import importlib
import logging
import sys
from typing import Any

_CPP_EXTENSION = "torch.utils.cpp_extension"


def without_cuda_home() -> Any:
    """Import what builds code in C++ before torch does, but for its word on `CUDA_HOME`.

    It warns of a `CUDA_HOME` where there is no GPU to use, whatever the code is built for. All else
    that it logs is shown.
    """
    if _CPP_EXTENSION in sys.modules:
        return sys.modules[_CPP_EXTENSION]
    logger = logging.getLogger(_CPP_EXTENSION)
    logger.addFilter(_says_more)
    try:
        return importlib.import_module(_CPP_EXTENSION)
    finally:
        logger.removeFilter(_says_more)


def _says_more(record: logging.LogRecord) -> bool:
    return "No CUDA runtime is found" not in record.getMessage()
