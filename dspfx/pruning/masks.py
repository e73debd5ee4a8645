"""`get_masks` and `set_masks`: what a prepared model is pruned to, as plain tensors."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from dspfx.errors import MaskError
from dspfx.layers.gated import gated_layers
from dspfx.layers.weights import structural_groups
from dspfx.model.analysed import analyse_prepared
from dspfx.model.liveness import apply_reads, current_reads
from dspfx.model.parts import parts_of
from dspfx.passes.analysis.liveness import liveness
from dspfx.utils.arrays import any_along, equal_rows
from dspfx.utils.wrappers import unwrapped


def get_masks(prepared: nn.Module) -> dict[str, Tensor]:
    """The masks of all gated layers: name -> bool `[O, C/groups]`, copies.

    Raises:
        ConvertError: `prepared` does not come from `dspfx.prepare`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> {name: mask.shape for name, mask in dspfx.get_masks(prepared).items()}
        {'1': torch.Size([8, 8]), '2': torch.Size([4, 8])}
    """
    prepared = unwrapped(prepared)
    parts_of(prepared)
    return {name: layer.gate.mask.clone() for name, layer in gated_layers(prepared).items()}


def set_masks(prepared: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Prune `prepared` to `masks`; layers that are not named keep the mask they have.

    Dead means zero: a filter whose inputs are all masked or dead is dead itself, its output
    exactly zero after the norm that follows, and so on through the graph. `get_masks` returns
    the masks with these consequences drawn.

    Args:
        prepared: changed in place: masks, channel gates, and the groups of the named layers.
        masks: name of a gated layer -> bool `[O, C/groups]`, with at most G different rows that
            are not all False, G being the groups the model was prepared with, in each of the
            layer's own groups; as many as it likes if they close more of what is pruned already.

    Raises:
        MaskError: an unknown layer, a wrong shape or type, or more than G groups; nothing is
            changed then.
        ConvertError: `prepared` does not come from `dspfx.prepare`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> mask = torch.ones(8, 8, dtype=torch.bool)
        >>> mask[:, 4:] = False  # no filter of this layer reads the last four channels
        >>> dspfx.set_masks(prepared, {"1": mask})
        >>> dspfx.convert(prepared).get_submodule("0").out_channels
        4
    """
    prepared = unwrapped(prepared)
    parts = parts_of(prepared)
    groups = _validated(prepared, masks)
    for part in parts:
        analysis = analyse_prepared(part.module)
        names = {part.full_name(name): name for name in gated_layers(part.module)}
        own = {names[name]: mask for name, mask in masks.items() if name in names}
        reads = current_reads(part.module, analysis, own)
        apply_reads(part.module, analysis, liveness(analysis, reads))
    layers = gated_layers(prepared)
    for name, group in groups.items():
        layers[name].gate.assign(group)


def _validated(prepared: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The group of every filter, int `[O]`, that each of `masks` implies."""
    if not isinstance(masks, Mapping):
        raise MaskError("masks must be a dict of the names of layers, as get_masks gives it")
    layers = gated_layers(prepared)
    groups: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if name not in layers:
            raise MaskError(
                f"'{name}' is no gated layer; gated are {', '.join(list(layers)[:8])}"
                + (" ..." if len(layers) > 8 else "")
            )
        gate = layers[name].gate
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise MaskError(f"the mask of '{name}' must be a bool tensor")
        if mask.shape != gate.mask.shape:
            raise MaskError(
                f"the mask of '{name}' has shape {tuple(mask.shape)}; filters x input channels of "
                f"the layer are {tuple(gate.mask.shape)}"
            )
        found = _groups(mask, structural_groups(layers[name]))
        if (count := int(found.max()) + 1) <= len(gate.logits):
            groups[name] = found
        elif gate.open or bool((mask & ~gate.mask).any()):  # else groups were found several times
            raise MaskError(
                f"the mask of '{name}' has {count} groups of filters with different inputs, the "
                f"model was prepared for {len(gate.logits)}; prepare it with "
                f"PrepareConfig(groups={count})"
            )
    return groups


def _groups(mask: Tensor, structural_groups: int) -> Tensor:
    """A number for every filter, int `[O]`: equal in a structural group where rows are equal."""
    found = []
    for own in mask.chunk(structural_groups):
        group, rows = equal_rows(own.cpu().numpy())
        read = any_along(rows, 1)
        found.append(np.where(read, np.cumsum(read) - 1, 0)[group])
    return torch.from_numpy(np.concatenate(found)).to(mask.device)
