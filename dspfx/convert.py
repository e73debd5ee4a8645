"""`convert`: from a masked model to a compact one that computes the same function."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.blueprint import blueprint
from dspfx.compaction import compaction
from dspfx.gates import ChannelGate, FilterGate
from dspfx.gating import fitting_inputs
from dspfx.listing import structure
from dspfx.masks import arranged_masks, present_liveness
from dspfx.modes import put_all
from dspfx.module import CompactModule, PreparedModule, TwoModeModule
from dspfx.parts import compact_parts_of, full_name, parts_of
from dspfx.passes.compact import compact
from dspfx.passes.cost_model import CPU, CostModel
from dspfx.passes.emitted import kept_ties
from dspfx.passes.plan import CompactionPlan, plan
from dspfx.passes.summary import count_gathers, summarise
from dspfx.passes.values import ChannelAnalysis
from dspfx.passes.verify import verify as verify_equal
from dspfx.whole import check_whole
from dspfx.wrappers import unwrapped


def convert(prepared: nn.Module, *, verify: bool = True, cost_model: CostModel = CPU) -> nn.Module:
    """Emit the compact form of a masked model; `prepared` is left as it is.

    Dead channels leave the graph, residual streams included; channels are ordered so that what a
    group reads lies side by side; every layer becomes one convolution or several, whichever is
    likely to be the fastest; batch norms are folded into them.

    Args:
        prepared: from `dspfx.prepare`, pruned or not. A compact model is returned as a copy.
        cost_model: decides in which form each layer is emitted. `dspfx.compile` decides anew, by
            measuring; a model that goes elsewhere keeps these forms.
        verify: run both models on random inputs, in float64 where they allow it, and compare; at
            the size of the example and, where the masked model takes them, at two more.

    Returns:
        A `CompactModule`, an evaluation-mode `GraphModule` of standard operators that shares
        nothing with `prepared`. Its parameters take no gradients; what is to be trained is
        `prepared`. From a model prepared in parts, a copy of it whose parts are
        `CompactModule`s.

    Raises:
        ConvertError: `prepared` does not come from `dspfx.prepare`.
        EquivalenceError: the two differ; the message names the first node that does.
    """
    prepared = unwrapped(prepared)
    if compact_parts_of(prepared):
        return copy.deepcopy(prepared)
    with torch.inference_mode(mode=False):  # or nothing could be changed of it apart from it
        parts = parts_of(prepared)
        compact = {part.module: _convert(part.module, verify, cost_model) for part in parts}
        whole = exchanged(prepared, compact)
        put_all(whole, mode=False)
        if verify:
            check_whole(prepared, whole, parts)
    return whole


def exchanged(model: nn.Module, parts: Mapping[PreparedModule, TwoModeModule]) -> nn.Module:
    """A copy of `model` in which every part is taken for another form of it."""
    copies: dict[int, Any] = {id(part): form for part, form in parts.items()}
    twin: nn.Module = copy.deepcopy(model, copies)
    return twin


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


def emit_compact(
    prepared: PreparedModule, analysis: ChannelAnalysis, planned: CompactionPlan
) -> CompactModule:
    """The module that `planned` describes, without its summary and blueprint."""
    with prepared.evaluation_view() as view:
        compacted = compact(view, analysis, planned)
    for tie in kept_ties(analysis, planned):
        _share(compacted.root, tie.owner_name, tie.name)
    graphs = dict.fromkeys((False, True), compacted.graph)
    module = CompactModule(compacted.root, graphs, type(prepared).__name__)
    module.example_inputs, module.origin = fitting_inputs(prepared), prepared.origin
    module.grouped_masks = arranged_masks(prepared, analysis, planned)
    module.indices = {name: buffer.clone() for name, buffer in indices(prepared).items()}
    module.answer_like(prepared)
    return module


def _share(root: nn.Module, owner: str, name: str) -> None:
    """Let the parameter `name` be the one called `owner`, where both are there still."""
    parameters = dict(root.named_parameters())
    if owner in parameters and name in parameters:
        path, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(path), leaf, parameters[owner])


def indices(prepared: PreparedModule) -> dict[str, Tensor]:
    """The buffers of the user's that hold no floating-point numbers: where channels go, may be."""
    gates = (FilterGate, ChannelGate)
    return {
        full_name(path, name): buffer
        for path, module in prepared.named_modules()
        if not isinstance(module, gates)
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.dim() and not buffer.is_floating_point()
    }
