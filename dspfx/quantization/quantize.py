"""`quantize`: from a compact model to one whose layers compute with integers of 8 bits."""

import importlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node

from dspfx.errors import QuantizeError
from dspfx.model.analysed import fitting_inputs
from dspfx.model.deployable import check_deployable
from dspfx.model.module import CompactModule
from dspfx.model.parts import compact_parts_of, exchanged
from dspfx.passes.sandbox.calls import fresh
from dspfx.quantization.calibrate import calibrate
from dspfx.quantization.inline import inlined
from dspfx.quantization.places import Places, places
from dspfx.quantization.record import Quantization
from dspfx.utils.torch_warnings import not_logged
from dspfx.utils.wrappers import unwrapped


def quantize(
    compact: nn.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[Any], object] | None = None,
) -> nn.Module:
    """Round the weights and activations of a compact model to 8 bits, after training.

    Weights become signed integers with one scale for each filter, activations unsigned ones with
    one scale and zero point for each tensor, which is chosen by what `batches` lead to (static
    post-training quantisation; Jacob et al., 2018). Convolutions, linear layers and the additions
    of residual streams compute with such numbers; `dspfx.report` says which do not, and why.

    The result computes in float32 what integers of 8 bits would give, so that it tells what they
    cost in accuracy. It is not fast itself: `dspfx.export` writes it as ONNX with pairs of
    QuantizeLinear and DequantizeLinear, which ONNX Runtime, OpenVINO and others run with integers.

    Args:
        compact: from `dspfx.convert`, in float32; it is left as it is.
        batches: about 512 samples such as the model was trained with, without augmentation. A
            tensor for each batch, a tuple or list of positional inputs, or a dict of inputs by
            name. Of a tuple that is longer than the model has inputs, such as `(images, labels)`,
            the first ones are taken.
        call: what to do with a batch instead, such as `lambda b: compact(b["image"])`.

    Returns:
        A module like `compact` that shares nothing with it, for batches of any size. The weights
        take a quarter of the memory.

    Raises:
        QuantizeError: torchao is missing; `compact` is not compact, is quantised already, or is not
            in float32; or the batches are no good: there is none, one does not run, holds NaN or
            infinity, or all hold a single value.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(8, 3, 12, 12)
        >>> compact = dspfx.convert(dspfx.prepare(model, x))
        >>> quantized = dspfx.quantize(compact, x.split(4))
        >>> bool((quantized(x) - compact(x)).abs().max() < 0.1)
        True
        >>> quantized.get_buffer("0.weight_int8").dtype
        torch.int8
    """
    pt2e = _pt2e()
    compact = unwrapped(compact)
    check_deployable(compact, "quantize", QuantizeError)
    parts = [part for _, part in compact_parts_of(compact)]
    if not parts:
        raise QuantizeError(
            f"{type(compact).__name__} is not compact; quantize what dspfx.convert returns. So it "
            "is of a model that is not pruned: dspfx.convert(dspfx.prepare(model, x))"
        )
    with torch.inference_mode(mode=False):
        found = {part: _observed(part, pt2e) for part in parts}
        seen = {part: (own.root, dict(own.observers())) for part, (_, own) in found.items()}
        calibrate(compact, seen, batches, call)
        forms = {}
        for part, (where, own) in found.items():
            module, scales = pt2e.rounded(own)
            forms[part] = quantized(part, module, Quantization(where, scales))
        return exchanged(compact, forms)


def quantized(compact: CompactModule, module: fx.GraphModule, how: Quantization) -> CompactModule:
    """`module` as the quantised form of `compact`."""
    graphs = dict.fromkeys((False, True), module.graph)
    new = CompactModule(module.eval(), graphs, type(compact).__name__)
    for name in CompactModule.carried:
        setattr(new, name, getattr(compact, name))
    new.quantization = how
    new.copy_forwarding_from(compact)
    return new


def rebuilt(compact: CompactModule, how: Quantization) -> CompactModule:
    """`compact`, quantised as `how` says, but for the numbers that its weights are rounded to.

    Raises:
        QuantizeError: torchao is missing.
        ValueError: `how` is of another graph.
    """
    pt2e = _pt2e()
    found = pt2e.observed(inlined(compact), how.places, how.scales)
    with torch.no_grad():
        found.root(*fresh(fitting_inputs(compact)))  # so that there is a scale for each filter
    module, _ = pt2e.rounded(found)
    return quantized(compact, module, how)


def _pt2e() -> Any:
    """The module that uses torchao.

    Raises:
        QuantizeError: it is missing or cannot be imported.
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


def _observed(part: CompactModule, pt2e: Any) -> tuple[Places, Any]:
    """Where `part` is quantised, and a module with observers there."""
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
    return where, pt2e.observed(root, where)


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
