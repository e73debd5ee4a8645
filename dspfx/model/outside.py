"""What the code around the parts of a model multiplies, which no budget or report counts."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from dspfx.model.parts import Part
from dspfx.passes.analysis.products import Products
from dspfx.passes.sandbox.calls import Call, evaluate, samples_of


def note_outside(root: nn.Module, inputs: Call, parts: Sequence[Part]) -> tuple[str, ...]:
    """A note on the multiply-accumulates of `root` outside its `parts`; none without any.

    They are counted in one run for `inputs`, and told for one sample.
    """
    counter, inside = Products(), 0
    entered: list[int] = []

    def enter(*_: Any) -> None:
        entered.append(counter.macs)

    def leave(*_: Any) -> None:
        nonlocal inside
        begun = entered.pop()
        if not entered:  # or it is counted with the part that calls this one
            inside += counter.macs - begun

    with ExitStack() as hooks:
        for part in parts:
            hooks.callback(part.module.register_forward_pre_hook(enter).remove)
            hooks.callback(part.module.register_forward_hook(leave).remove)
        try:
            with counter:
                evaluate(root, inputs)
        except Exception:  # code that does not run where it is counted; it does without
            return ()
    if (outside := counter.macs - inside) <= 0:
        return ()
    share = outside / counter.macs
    return (
        f"outside of the parts are {outside // samples_of(inputs):,} multiply-accumulates for a "
        f"sample, {share:.1%} of all: they stay, and budgets and reports do not count them",
    )
