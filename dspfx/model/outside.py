"""What the code around the parts of a model multiplies: it stays, whatever is pruned."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from dspfx.model.parts import Part
from dspfx.passes.analysis.products import Products
from dspfx.passes.sandbox.calls import Call, evaluate, samples_of


def macs_outside(root: nn.Module, inputs: Call, parts: Sequence[Part]) -> tuple[int, str]:
    """The multiply-accumulates of `root` outside its `parts` for one sample, and a note on them.

    They are counted in one run for `inputs`; none, and nothing to note, if that fails.
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
            return 0, ""
    outside = (counter.macs - inside) // samples_of(inputs)
    if outside <= 0:
        return 0, ""
    share = (counter.macs - inside) / counter.macs
    return outside, (
        f"outside of the parts are {outside:,} multiply-accumulates for a sample, {share:.1%} of "
        "all: they stay, and count in budgets and reports"
    )
