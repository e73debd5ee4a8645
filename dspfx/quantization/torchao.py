"""The module that uses torchao, imported when it is needed."""

import importlib
import warnings
from typing import Any

from dspfx.errors import QuantizeError
from dspfx.utils.torch_warnings import not_logged


def imported() -> Any:
    """`dspfx.quantization.pt2e`.

    Raises:
        QuantizeError: torchao is missing or cannot be imported.
    """
    try:
        # torchao tells of its own future
        with warnings.catch_warnings(), not_logged("torch.utils._pytree", "register_constant"):
            warnings.simplefilter("ignore")
            return importlib.import_module("dspfx.quantization.pt2e")
    except ImportError as error:
        raise QuantizeError(
            f"quantisation needs torchao: pip install 'dspfx[deploy]' ({error})"
        ) from error
