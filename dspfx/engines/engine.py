"""What an engine is: a runtime that executes a network at some precision."""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

from dspfx.engines.form import Form

Precision = Literal["fp32", "bf16", "int8"]
Executable = Callable[..., Any]


class Engine(Protocol):
    """A runtime.

    Attributes:
        name: by which it is asked for.
        slow_to_load: loading a network takes it tens of seconds, not some.
        multiple: of channels, what it computes as fast as fewer; a power of two.
    """

    name: str
    slow_to_load: bool

    @property
    def multiple(self) -> int:
        """See above."""

    def missing(self, device: torch.device) -> str:
        """Why it cannot run networks on `device` here; empty if it can."""

    def precisions(self, device: torch.device) -> tuple[Precision, ...]:
        """Those that it can compute in here; it has to be available."""

    def takes(self, form: Form) -> bool:
        """Whether it is worth running `form` in it."""

    def load(self, form: Form, precision: Precision) -> Executable:
        """What computes `form` with as many threads as torch has now.

        The callable takes and returns what the module does, at any batch size that the module
        takes, without gradients, from any thread.

        Raises:
            CompileError: the engine cannot compute it. Whatever else is raised means the same.
        """
