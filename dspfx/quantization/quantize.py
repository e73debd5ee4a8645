"""`quantize`: from a compact model to one whose layers compute with integers of 8 bits."""

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import fx, nn

from dspfx.errors import QuantizeError
from dspfx.model.analysed import fitting_inputs
from dspfx.model.module import CompactModule
from dspfx.model.parts import exchanged
from dspfx.passes.sandbox.calls import fresh
from dspfx.quantization.calibrate import calibrate
from dspfx.quantization.inline import inlined
from dspfx.quantization.places import Places
from dspfx.quantization.record import Quantization
from dspfx.quantization.torchao import imported
from dspfx.quantization.training import FakeQuantized
from dspfx.quantization.watched import checked_parts, watched
from dspfx.utils.wrappers import unwrapped


def quantize(
    compact: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    call: Callable[[Any], object] | None = None,
    weight_bits: Literal[7, 8] = 8,
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
        compact: from `dspfx.convert`, in float32, or from `dspfx.fake_quantize`, trained; it is
            left as it is.
        batches: about 512 samples such as the model was trained with, without augmentation; None
            for one from `dspfx.fake_quantize`, which has its scales. A tensor for each batch, a
            tuple or list of positional inputs, or a dict of inputs by name. Of a tuple that is
            longer than the model has inputs, such as `(images, labels)`, the first ones are taken.
        call: what to do with a batch instead, such as `lambda b: compact(b["image"])`.
        weight_bits: 8, or 7 for x86 processors without VNNI, on which ONNX Runtime and OpenVINO add
            pairs of products in 16 bits: products with weights of 8 bits may exceed these.

    Returns:
        A module like `compact` that shares nothing with it, for batches of any size. The weights
        take a quarter of the memory.

    Raises:
        QuantizeError: torchao is missing; `weight_bits` is another number; `compact` is not
            compact, is quantised already, or is not in float32; or the batches are no good: there
            is none, one does not run, holds NaN or infinity, or all hold a single value.

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
    pt2e = imported()
    compact = unwrapped(compact)
    trained = [module for module in compact.modules() if isinstance(module, FakeQuantized)]
    if (batches is None) != bool(trained):
        raise QuantizeError(
            "the model has scales of its own, and needs no batches: dspfx.quantize(model)"
            if trained
            else "give batches to calibrate with, of about 512 images in all"
        )
    with torch.inference_mode(mode=False):
        if batches is None:
            return exchanged(compact, {own: _finished(own, pt2e) for own in trained})
        found = {
            part: watched(part, pt2e, weight_bits=weight_bits) for part in checked_parts(compact)
        }
        seen = {part: (own.root, dict(own.observers())) for part, (_, own) in found.items()}
        calibrate(compact, seen, batches, call)
        forms = {part: _rounded(part, *own, pt2e) for part, own in found.items()}
        return exchanged(compact, forms)


def _finished(trained: FakeQuantized, pt2e: Any) -> CompactModule:
    own = copy.deepcopy(trained).eval()
    own.finish()
    return _rounded(*own.of, pt2e)


def _rounded(part: CompactModule, where: Places, own: Any, pt2e: Any) -> CompactModule:
    module, scales = pt2e.rounded(own)
    return quantized(part, module, Quantization(where, scales))


def quantized(compact: CompactModule, module: fx.GraphModule, how: Quantization) -> CompactModule:
    """`module` as the quantised form of `compact`."""
    graphs = dict.fromkeys((False, True), module.graph)
    new = CompactModule(module.eval(), graphs, type(compact).__name__)
    new.requires_grad_(False)
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
    pt2e = imported()
    found = pt2e.observed(inlined(compact), how.places, how.scales)
    with torch.no_grad():
        found.root(*fresh(fitting_inputs(compact)))  # so that there is a scale for each filter
    module, _ = pt2e.rounded(found)
    return quantized(compact, module, how)
