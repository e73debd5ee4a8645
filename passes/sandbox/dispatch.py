"""Dispatch modes that do not import torch's compiler, which takes longer than to prepare a model.

torch keeps its compiler from what a mode calls, and imports it to do so. No code can have been
compiled before it is imported, so that there is nothing to keep it from until then.
"""

import sys
from typing import Any

from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import TorchDispatchMode


class Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Calls `_dispatched` instead of every operator, while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]
        cls._uncompiled = _disable_dynamo(cls._dispatched)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = type(self)._uncompiled if "torch._dynamo" in sys.modules else type(self)._dispatched
        return call(self, func, args, kwargs or {})

    def _dispatched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func` returns, or something else in its place."""
        return func(*args, **kwargs)

    _uncompiled = _dispatched
