"""Compact parts of a model, and copies of them with observers."""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node

from dspfx.errors import QuantizeError
from dspfx.model.analysed import fitting_inputs
from dspfx.model.deployable import check_deployable
from dspfx.model.module import CompactModule
from dspfx.model.parts import compact_parts_of
from dspfx.passes.sandbox.calls import fresh
from dspfx.quantization.inline import inlined
from dspfx.quantization.places import Places, places


def checked_parts(compact: nn.Module) -> list[CompactModule]:
    """The compact modules in `compact`.

    Raises:
        QuantizeError: there are none, or it is in training mode.
    """
    check_deployable(compact, "quantize", QuantizeError)
    parts = [part for _, part in compact_parts_of(compact)]
    if not parts:
        raise QuantizeError(
            f"{type(compact).__name__} is not compact; quantize what dspfx.convert returns. So it "
            "is of a model that is not pruned: dspfx.convert(dspfx.prepare(model, x))"
        )
    return parts


def watched(
    part: CompactModule, pt2e: Any, *, training: bool = False, weight_bits: int = 8
) -> tuple[Places, Any]:
    """Where `part` is quantised, and a copy of it with observers there, see `pt2e.observed`.

    Raises:
        QuantizeError: `weight_bits` is neither 7 nor 8; or `part` is quantised already, not in
            float32, or has nothing to be quantised.
    """
    if weight_bits not in (7, 8):
        raise QuantizeError(f"weights are of 8 bits, or of 7, not of {weight_bits!r}")
    if part.quantization is not None:
        raise QuantizeError("the model is quantised already; quantize what dspfx.convert returned")
    others = {p.dtype for p in part.parameters() if p.is_floating_point()} - {torch.float32}
    if others:
        raise QuantizeError(
            f"the model is of type {next(iter(others))}; quantize it in float32: model.float()"
        )
    root = inlined(part)
    recorder = _Recorder(root)
    with torch.no_grad():
        recorder.run(*fresh(fitting_inputs(part)))
    where = places(root, recorder.floats)
    if not where.layers:
        raise QuantizeError(
            "the model has no layer that could compute with integers: "
            + "; ".join(f"'{name}': {why}" for name, why in where.kept.items())
        )
    return where, pt2e.observed(root, where, training=training, weight_bits=weight_bits)


class _Recorder(fx.Interpreter):
    """Which nodes compute tensors of float32."""

    def __init__(self, root: fx.GraphModule) -> None:
        super().__init__(root)
        self.floats: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.floats.add(n)
        return result
