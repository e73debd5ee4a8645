"""`convert`: from a masked model to a compact one that computes the same function."""

import copy

from torch import nn

from dspfx.masks import present_liveness, require_prepared
from dspfx.module import CompactModule, PreparedModule
from dspfx.passes.compact import compact
from dspfx.passes.plan import plan
from dspfx.passes.summary import summarise
from dspfx.passes.verify import verify as verify_equal
from dspfx.prepare import fitting_inputs


def convert(prepared: nn.Module, *, verify: bool = True) -> CompactModule:
    """Emit the compact form of a masked model; `prepared` is left as it is.

    Dead channels leave the graph, residual streams included; the filters of a layer are ordered
    by group and become grouped convolutions; batch norms are folded into them.

    Args:
        prepared: from `dspfx.prepare`, pruned or not. A compact module is returned as a copy.
        verify: run both models on random inputs, in float64 where they allow it, and compare.

    Returns:
        An evaluation-mode `GraphModule` of standard operators that shares nothing with `prepared`.

    Raises:
        ConvertError: `prepared` does not come from `dspfx.prepare`.
        EquivalenceError: the two differ; the message names the first node that does.
    """
    if isinstance(prepared, CompactModule):
        return copy.deepcopy(prepared)
    require_prepared(prepared)
    assert isinstance(prepared, PreparedModule)
    inputs = fitting_inputs(prepared)
    analysis, live = present_liveness(prepared)
    with prepared.evaluation_view() as view:
        layout = plan(view, analysis, live)
        if verify:
            verify_equal(view, analysis, live, layout, inputs)
        compacted = compact(view, analysis, layout)
    graphs = dict.fromkeys((False, True), compacted.graph)
    module = CompactModule(compacted.root, graphs, type(prepared).__name__)
    module.example_inputs = inputs
    module.summary = summarise(analysis, live, layout)
    return module
