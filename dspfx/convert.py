"""`convert`: from a masked model to a compact one that computes the same function."""

import copy
from dataclasses import replace

import torch
from torch import nn

from dspfx.model.analysed import fitting_inputs
from dspfx.model.emit import emit_compact
from dspfx.model.liveness import present_liveness
from dspfx.model.modes import put_all
from dspfx.model.module import CompactModule, PreparedModule
from dspfx.model.parts import compact_parts_of, exchanged, parts_of
from dspfx.model.unfinished import warn_if_unfinished
from dspfx.model.whole import check_whole
from dspfx.passes.lowering.cost_model import CPU, CostModel
from dspfx.passes.transforms.plan import plan
from dspfx.passes.transforms.summary import count_gathers, summarise
from dspfx.passes.transforms.verify import verify as verify_equal
from dspfx.storage.blueprint import blueprint
from dspfx.storage.fingerprint import structure
from dspfx.storage.plan_record import compaction
from dspfx.utils.wrappers import unwrapped


def convert(prepared: nn.Module, *, verify: bool = True, cost_model: CostModel = CPU) -> nn.Module:
    """Emit the compact form of a masked model; `prepared` is left as it is.

    Dead channels leave the graph, residual streams included; channels are ordered so that what a
    group reads lies side by side; every layer becomes one convolution or several, whichever is
    likely to be the fastest; batch norms are folded into them.

    Args:
        prepared: from `dspfx.prepare`, pruned or not. A compact model is returned as a copy.
        cost_model: decides in which form each layer is emitted. `dspfx.compile` decides again, by
            measuring; a model that goes elsewhere keeps these forms.
        verify: run both models on random inputs, in float64 where they allow it, and compare; at
            the size of the example and, where the masked model takes them, at two more.

    Returns:
        A `CompactModule`, an evaluation-mode `GraphModule` of standard operators that shares
        nothing with `prepared`. Its parameters take no gradients; what is to be trained is
        `prepared`. From a model prepared in parts, a copy of it whose parts are
        `CompactModule`s.

    Warns:
        DspfxWarning: `GradualPruning` or `GroupLearner` has begun with it and is not done.

    Raises:
        ConvertError: `prepared` does not come from `dspfx.prepare`.
        EquivalenceError: the two differ; the message names the first node that does.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> report = dspfx.prune_channels(prepared, dspfx.Budget(macs=0.5))
        >>> compact = dspfx.convert(prepared)
        >>> bool(torch.allclose(compact(x), prepared.eval()(x), atol=1e-5))
        True
        >>> compact.get_submodule("1").in_channels < 8
        True
    """
    prepared = unwrapped(prepared)
    if compact_parts_of(prepared):
        return copy.deepcopy(prepared)
    with torch.inference_mode(mode=False):  # or nothing could be changed of it apart from it
        parts = parts_of(prepared)
        warn_if_unfinished(part.module for part in parts)
        compact = {part.module: _convert(part.module, verify, cost_model) for part in parts}
        whole = exchanged(prepared, compact)
        put_all(whole, mode=False)
        if verify:
            check_whole(prepared, whole, parts)
    return whole


def _convert(prepared: PreparedModule, verify: bool, cost_model: CostModel) -> CompactModule:
    analysis, live = present_liveness(prepared)
    with prepared.evaluation_view() as view:
        planned = plan(view, analysis, live, cost_model)
        inputs = fitting_inputs(prepared)
        found = view, analysis, live, planned, inputs, prepared.other_sizes
        difference = verify_equal(*found) if verify else None
    module = emit_compact(prepared, analysis, planned)
    summary = summarise(analysis, live, planned, prepared.left_alone, prepared.lines)
    module.summary = replace(summary, gathers=count_gathers(module))
    module.difference = difference
    stored = compaction(planned, module.summary, difference, structure(module))
    module.blueprint = replace(blueprint(prepared), compaction=stored)
    return module
