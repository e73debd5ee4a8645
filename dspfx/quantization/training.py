"""`fake_quantize`: a compact model that trains with the rounding that it will be used with."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, Self

import torch
from torch import nn

from dspfx.model.analysed import fitting_inputs
from dspfx.model.module import CompactModule
from dspfx.model.parts import exchanged
from dspfx.passes.sandbox.calls import fresh
from dspfx.quantization.calibrate import calibrate
from dspfx.quantization.norms import add_norms, begin_norms, fold_norms, norms_of
from dspfx.quantization.places import Places
from dspfx.quantization.torchao import imported
from dspfx.quantization.watched import checked_parts, watched
from dspfx.utils.wrappers import unwrapped


class FakeQuantized(nn.Module):
    """A compact module whose weights and activations are rounded, and which can be trained.

    In training mode the ranges of activations are moving averages of what the batches lead to; in
    evaluation mode they stay. Convolutions have batch norms, see `dspfx.quantization.norms`, and
    there is no dropout.
    """

    def __init__(self, compact: CompactModule, places: Places, observed: Any) -> None:
        super().__init__()
        self.root: nn.Module = observed.root
        self.of = compact, places, observed  # no submodules
        for parameter in self.root.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the compact module computes, with rounding; in float32, also under autocast.

        In half precision it would be rounded twice.
        """
        device = next(self.root.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return self.root(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Let the ranges of activations follow the batches, or stay."""
        self.training = mode
        for _, observer in self.of[2].observers():
            observer.enable_observer(mode)
        for _, norm in norms_of(self.of[2].root):
            norm.train(mode)
        return self

    def finish(self) -> None:
        """Fold batch norms; the scales of filters are those of the weights as they are now."""
        fold_norms(self.of[2].root)
        with torch.no_grad():
            self.root(*fresh(fitting_inputs(self.of[0])))


def fake_quantize(
    compact: nn.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[Any], object] | None = None,
    weight_bits: Literal[7, 8] = 8,
) -> nn.Module:
    """A copy of a compact model to be trained as it will be rounded (Jacob et al., 2018).

    Fine-tune it in your own loop, at a small learning rate, then call `dspfx.quantize` on it, which
    keeps the scales that it has come to. Gradients pass through the rounding as if there were none;
    the range of every activation is a moving average of what the batches of training mode lead to.

    A compact model has no batch norms after convolutions. Here these have some again, so that it
    trains like the model that it was made of: they change nothing at first, train in training mode
    on batches of several values a channel, and are gone from what `dspfx.quantize` returns. Dropout
    has been removed.

    Args:
        compact: from `dspfx.convert`, in float32; it is left as it is.
        batches: a few to begin with, see `dspfx.quantize`.
        call, weight_bits: see `dspfx.quantize`.

    Returns:
        A module with the inputs and outputs of `compact`, in evaluation mode, whose parameters take
        gradients. Its state dict is its own.

    Raises:
        QuantizeError: see `dspfx.quantize`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(8, 3, 12, 12)
        >>> compact = dspfx.convert(dspfx.prepare(model, x))
        >>> trainable = dspfx.fake_quantize(compact, [x]).train()
        >>> optimizer = torch.optim.SGD(trainable.parameters(), lr=0.01)
        >>> trainable(x).square().mean().backward()
        >>> optimizer.step()
        >>> quantized = dspfx.quantize(trainable.eval())
        >>> bool((quantized(x) - trainable(x)).abs().max() < 0.05)
        True
    """
    pt2e = imported()
    compact = unwrapped(compact)
    with torch.inference_mode(mode=False):
        found = {
            part: watched(part, pt2e, training=True, weight_bits=weight_bits)
            for part in checked_parts(compact)
        }
        for where, own in found.values():
            add_norms(own.root, [layer for _, layer in where.weights])
            own.root.apply(pt2e.disable_fake_quant)
        seen = {part: (own.root, dict(own.observers())) for part, (_, own) in found.items()}
        calibrate(compact, seen, batches, call)
        for _, own in found.values():
            own.root.apply(pt2e.enable_fake_quant)
            begin_norms(own.root)
        forms = {part: FakeQuantized(part, *own).eval() for part, own in found.items()}
        return exchanged(compact, forms)
