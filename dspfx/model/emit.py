"""From a prepared module and a plan to a compact module."""

from torch import Tensor, nn

from dspfx.layers.gates import ChannelGate, FilterGate
from dspfx.model.analysed import fitting_inputs
from dspfx.model.liveness import arranged_masks
from dspfx.model.module import CompactModule, PreparedModule
from dspfx.model.parts import full_name
from dspfx.passes.analysis.channel_ops import ChannelAnalysis
from dspfx.passes.transforms.compact import compact
from dspfx.passes.transforms.emitted import kept_ties
from dspfx.passes.transforms.plan import CompactionPlan


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
    module.copy_forwarding_from(prepared)
    return module


def _share(root: nn.Module, owner: str, name: str) -> None:
    """Tie the parameter `name` to the one called `owner`, where both still exist."""
    parameters = dict(root.named_parameters())
    if owner in parameters and name in parameters:
        path, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(path), leaf, parameters[owner])


def indices(prepared: PreparedModule) -> dict[str, Tensor]:
    """The user's buffers of integers and flags, which may hold indices of channels."""
    gates = (FilterGate, ChannelGate)
    return {
        full_name(path, name): buffer
        for path, module in prepared.named_modules()
        if not isinstance(module, gates)
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.dim() and not buffer.is_floating_point()
    }
