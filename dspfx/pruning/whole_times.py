"""What fraction of its time a whole model takes once it is pruned: converted, loaded and timed."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch

from dspfx.compile import compile
from dspfx.convert import convert
from dspfx.engines.form import AS_CONVERTED, Form
from dspfx.engines.on_files import OnFiles
from dspfx.errors import BudgetError, DspfxError
from dspfx.layers.gated import gated_layers
from dspfx.model.analysed import fitting_inputs
from dspfx.model.module import PreparedModule
from dspfx.passes.transforms.widest import random_like
from dspfx.pruning.budget import Budget
from dspfx.pruning.layer_times import engine_of
from dspfx.pruning.masks import set_masks
from dspfx.quantization.quantize import quantize
from dspfx.utils.timing import in_blocks

Call = Callable[[], object]
ROUNDS = 7  # of blocks: what is measured decides what is pruned


class WholeTimes:
    """Times models in the engine and precision of a budget; the dense ones are loaded once.

    Args:
        budget: of latency.
        modules: the parts of a model.
    """

    def __init__(self, budget: Budget, modules: Sequence[PreparedModule]) -> None:
        self.budget = budget
        self._dense = [self._call(_without_masks(module)) for module in modules]

    def fraction(self, modules: Sequence[PreparedModule]) -> float:
        """The time of `modules` as they are masked now, over that without masks.

        Raises:
            BudgetError: the engine cannot load one.
        """
        calls: dict[tuple[bool, int], Call] = {}
        for number, (module, dense) in enumerate(zip(modules, self._dense, strict=True)):
            calls[False, number], calls[True, number] = dense, self._call(module)
        times = in_blocks(calls, rounds=ROUNDS)
        pruned = sum(seconds for (is_pruned, _), seconds in times.items() if is_pruned)
        return pruned / (sum(times.values()) - pruned)

    def _call(self, module: PreparedModule) -> Call:
        compact = convert(module, verify=False)
        inputs = fitting_inputs(module)
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        engines = [self.budget.engine]
        if self.budget.engine == "own":
            engines.append("inductor")  # where the kernel cannot compute something
        else:
            engine = engine_of(self.budget, device)
            if isinstance(engine, OnFiles):
                return self._in_engine(engine, compact, inputs)
        fast = compile(compact, inputs, engines=engines, precision=self.budget.precision)
        return partial(fast, *inputs)

    def _in_engine(self, engine: OnFiles, compact: Any, inputs: tuple[Any, ...]) -> Call:
        """Without a proof of its outputs, which are of random numbers and of no use."""
        try:
            if self.budget.precision == "int8":
                drawn = random_like(inputs, torch.Generator().manual_seed(0))
                compact = quantize(compact, [drawn])
            loaded = engine.load(Form(AS_CONVERTED, lambda: compact, inputs), self.budget.precision)
        except DspfxError as error:
            raise BudgetError(
                f"{engine.name} cannot run the model, so nothing can be said of its time: {error}"
            ) from error
        return partial(loaded.unproved, *inputs)


def _without_masks(module: PreparedModule) -> PreparedModule:
    whole = deepcopy(module)
    masks = {name: torch.ones_like(g.gate.mask) for name, g in gated_layers(whole).items()}
    set_masks(whole, masks)
    return whole
