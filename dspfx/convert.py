"""`convert`: from a masked model to a compact one that computes the same function."""

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from dspfx.gating import fitting_inputs
from dspfx.masks import present_liveness
from dspfx.module import CompactModule, PreparedModule
from dspfx.parts import compact_parts_of, parts_of
from dspfx.passes.compact import compact
from dspfx.passes.cost_model import CPU, CostModel
from dspfx.passes.plan import plan
from dspfx.passes.summary import count_gathers, summarise
from dspfx.passes.verify import verify as verify_equal


def convert(prepared: nn.Module, *, verify: bool = True, cost_model: CostModel = CPU) -> nn.Module:
    """Emit the compact form of a masked model; `prepared` is left as it is.

    Dead channels leave the graph, residual streams included; channels are ordered so that what a
    group reads lies side by side; every layer becomes one convolution or several, whichever is
    likely to be the fastest; batch norms are folded into them.

    Args:
        prepared: from `dspfx.prepare`, pruned or not. A compact model is returned as a copy.
        cost_model: decides in which form each layer is emitted. `dspfx.compile` decides anew, by
            measuring; a model that goes elsewhere keeps these forms.
        verify: run both models on random inputs, in float64 where they allow it, and compare.

    Returns:
        A `CompactModule`, an evaluation-mode `GraphModule` of standard operators that shares
        nothing with `prepared`. From a model prepared in parts, a copy of it whose parts are
        `CompactModule`s.

    Raises:
        ConvertError: `prepared` does not come from `dspfx.prepare`.
        EquivalenceError: the two differ; the message names the first node that does.
    """
    if compact_parts_of(prepared):
        return copy.deepcopy(prepared)
    # a copy of the whole in which every part is taken for its compact form
    copies: dict[int, Any] = {
        id(part.module): _convert(part.module, verify, cost_model) for part in parts_of(prepared)
    }
    return copy.deepcopy(prepared, copies).eval()


def _convert(prepared: PreparedModule, verify: bool, cost_model: CostModel) -> CompactModule:
    inputs = fitting_inputs(prepared)
    analysis, live = present_liveness(prepared)
    with prepared.evaluation_view() as view:
        planned = plan(view, analysis, live, cost_model)
        difference = verify_equal(view, analysis, live, planned, inputs) if verify else None
        compacted = compact(view, analysis, planned)
    graphs = dict.fromkeys((False, True), compacted.graph)
    module = CompactModule(compacted.root, graphs, type(prepared).__name__)
    module.example_inputs, module.difference = inputs, difference
    module.stands_for = copy.deepcopy(prepared.stands_for)
    summary = summarise(analysis, live, planned, prepared.left_alone, prepared.lines)
    module.summary = replace(summary, gathers=count_gathers(module))
    return module
