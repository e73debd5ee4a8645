"""Calibration: a model runs on batches, and observers see what its compact parts compute."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn

from dspfx.errors import QuantizeError
from dspfx.model.batches import call_with
from dspfx.model.module import CompactModule
from dspfx.passes.sandbox.calls import fresh
from dspfx.utils.pytree import leaves

Observers = Mapping[str, nn.Module]
"""By the name of a node that computes what each observes."""


def calibrate(
    model: nn.Module,
    parts: Mapping[CompactModule, tuple[fx.GraphModule, Observers]],
    batches: Iterable[Any],
    call: Callable[[Any], object] | None,
) -> None:
    """Run `model` on `batches`, and with every part a module with observers on the same inputs.

    Raises:
        QuantizeError: there is no batch, one does not run, holds or leads to values that are not
            finite, all hold a single value, or some part is never called.
    """
    ranges = {part: _Range() for part in parts}
    with ExitStack() as hooks:
        for part, (root, observers) in parts.items():
            follow = _follower(root, ranges[part])
            hooks.enter_context(part.register_forward_pre_hook(follow, with_kwargs=True))
            for name, observer in observers.items():
                hooks.enter_context(observer.register_forward_pre_hook(_only_finite(name)))
        count = 0
        for batch in batches:
            _run(model, batch, call, count)
            count += 1
    if count == 0:
        raise QuantizeError("there is no batch to calibrate with; give some, of 512 images in all")
    if any(not seen.calls for seen in ranges.values()):
        raise QuantizeError(
            "the batches do not reach all compact parts of the model; let call=... call the model "
            "that quantize is given"
        )
    if all(seen.is_constant() for seen in ranges.values()):
        raise QuantizeError(
            f"all batches hold one value alone, {next(iter(ranges.values())).low:g}, and show "
            "nothing of what the model computes; calibrate with images such as it was trained with"
        )


def _run(model: nn.Module, batch: Any, call: Callable[[Any], object] | None, number: int) -> None:
    try:
        with torch.no_grad():
            call(batch) if call is not None else call_with(model, batch)
    except QuantizeError as error:
        raise QuantizeError(f"batch {number} {error}; look for bad ones") from error
    except Exception as error:
        shapes = [f"{tuple(x.shape)} {x.dtype}" for x in leaves(batch) if isinstance(x, Tensor)]
        raise QuantizeError(
            f"the model does not accept batch {number} ({', '.join(shapes) or type(batch)}): "
            f"{error}; give batches as the model takes them, or call=..., which calls the model"
        ) from error


class _Range:
    """The least and the largest number in the inputs of a part."""

    def __init__(self) -> None:
        self.calls, self.low, self.high = 0, float("inf"), float("-inf")

    def see(self, inputs: Any) -> None:
        self.calls += 1
        for x in leaves(inputs):
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
                low, high = (float(bound) for bound in torch.aminmax(x.detach()))
                if not -float("inf") < low <= high < float("inf"):
                    raise QuantizeError("holds values that are not finite")
                self.low, self.high = min(self.low, low), max(self.high, high)

    def is_constant(self) -> bool:
        return self.low == self.high


def _follower(root: fx.GraphModule, seen: _Range) -> Callable[..., None]:
    def follow(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.see((args, kwargs))
        root(*fresh(args), **fresh(kwargs))

    return follow


def _only_finite(name: str) -> Callable[..., None]:
    def check(_: nn.Module, args: tuple[Tensor]) -> None:
        if not torch.isfinite(args[0]).all():
            raise QuantizeError(f"leads to values that are not finite, first in '{name}'")

    return check
