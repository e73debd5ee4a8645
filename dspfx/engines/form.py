"""A network in one of the forms that compute the same function."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from dspfx.engines.onnx_network import OnnxNetwork

AS_CONVERTED, DENSE = "as converted", "dense"
NATIVE, NATIVE_ALONE = "native", "native, without inductor"
MIXED = "the fastest form of each layer"


@dataclass(frozen=True)
class Form:
    """One form of a network; what is made of it is made once, when it is first needed.

    Attributes:
        name: of the form.
        make: makes the module, in evaluation mode.
        inputs: positional example inputs.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]

    @property
    def native(self) -> bool:
        """Whether it is made for the own kernel, which no other engine has."""
        return self.name in (NATIVE, NATIVE_ALONE)

    @cached_property
    def model(self) -> nn.Module:
        """The module."""
        return self.make()

    @cached_property
    def onnx(self) -> OnnxNetwork:
        """As an ONNX file in memory.

        Raises:
            ExportError: it cannot be exported.
        """
        return OnnxNetwork.of(self.model, self.inputs)
