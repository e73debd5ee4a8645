"""What the loss says about channels and groups, gathered from the gradients of training.

Let a factor of 1 stand before what filter o reads of channel c. The loss's derivative by it is
`S[o,c] = sum_k W[o,c,k] dL/dW[o,c,k]`, known after every backward pass; that of a factor which
several of them have in common is their sum. Its mean square over batches, the Fisher information
of the factor, says how much the loss grows, to second order, when the factor becomes zero:

1. A coupling class, the channel c of all that reads it: the sum of S over all filters of all
   layers that read a channel of the class.
2. A channel of a group of filters: the sum of S over the group's filters.
3. Nothing is known of what layers read that are frozen, that have not been reached yet, or whose
   weight is computed from others. One that a batch does not reach would not miss anything there.
4. Layers that share a weight have its gradient in common, and so one S, of all of them together.

Theis, Korshunova, Tejani, Huszar, "Faster gaze prediction with dense networks and Fisher pruning",
2018, arXiv 1801.05787; over coupled channels: Liu et al., "Group Fisher Pruning for Practical
Network Compression", ICML 2021, arXiv 2108.00708.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.layers.computed_weight import is_weighted
from dspfx.layers.gated import GatedLayer
from dspfx.layers.weights import filters_first, structural_groups
from dspfx.model.analysed import analyse_prepared
from dspfx.model.module import PreparedModule
from dspfx.passes.analysis.channel_ops import Mix
from dspfx.utils.arrays import IntArray


@dataclass(frozen=True)
class _ReadingLayer:
    """A layer, the channels that any of its calls reads, and the coupling classes of these."""

    layer: nn.Module
    channels: Tensor
    classes: Tensor

    @staticmethod
    def of(layer: nn.Module, calls: list[IntArray], device: torch.device) -> "_ReadingLayer":
        """The reader of a layer, from the coupling classes `[C]` that each of its calls reads."""
        pairs = {pair for classes in calls for pair in enumerate(classes.tolist())}
        both = torch.tensor(sorted(pairs), dtype=torch.int64, device=device).reshape(-1, 2)
        return _ReadingLayer(layer, both[:, 0], both[:, 1])

    def learns(self) -> bool:
        """Whether the layer's weight is one that is trained."""
        weight = self.layer._parameters.get("weight")
        trained = weight is not None and weight.requires_grad
        return trained and not is_weighted(self.layer)

    def gradient(self) -> Tensor | None:
        """The gradient of the weight, if it is trained and was reached."""
        layer: Any = self.layer
        return layer.weight.grad if self.learns() else None


class Sensitivity:
    """The summed squares of one prepared module.

    Attributes:
        classes: float64 `[classes]`.
        groups: name of a gated layer -> float64 `[S, G, C/S]`.
        reached: float64 `[layers]`, how many gradients of each have been added.
    """

    def __init__(self, module: PreparedModule) -> None:
        analysis = analyse_prepared(module)
        device = next(module.parameters()).device
        count = analysis.class_count
        self.classes = torch.zeros(count, dtype=torch.float64, device=device)
        self.groups: dict[str, Tensor] = {}
        read: dict[str, list[IntArray]] = {}
        for op in analysis.ops.values():
            if isinstance(op, Mix):
                calls = read.setdefault(op.layer, [])
                if not op.full_width:
                    calls.append(analysis.class_of(op.operands[0]))
        self._readers: dict[str, _ReadingLayer] = {}
        for name, calls in read.items():
            layer = module.get_submodule(name)
            self._readers[name] = _ReadingLayer.of(layer, calls, device)
            if isinstance(layer, GatedLayer):
                shape = (
                    structural_groups(layer),
                    len(layer.gate.logits),
                    filters_first(layer).shape[1],
                )
                self.groups[name] = torch.zeros(shape, dtype=torch.float64, device=device)
        self.reached = torch.zeros(len(read), dtype=torch.float64, device=device)
        self._members: dict[str, Tensor] = {}
        self.take_groups()

    def take_groups(self) -> None:
        """Take over the groups that the filters are in now."""
        for name in self.groups:
            layer = self._readers[name].layer
            assert isinstance(layer, GatedLayer)
            self._members[name] = _members(layer)

    def groups_changed(self) -> bool:
        """Whether filters are in other groups than at the last `take_groups`."""
        gated = {name: self._readers[name].layer for name in self.groups}
        return any(
            isinstance(layer, GatedLayer) and not torch.equal(_members(layer), self._members[name])
            for name, layer in gated.items()
        )

    def has_gradients(self) -> bool:
        """Whether any layer has one at present."""
        return any(reader.gradient() is not None for reader in self._readers.values())

    def unknown(self) -> tuple[Tensor, frozenset[str]]:
        """Bool `[classes]` and names of layers: of what these read nothing is known, see above.

        Before any gradient, all layers that learn are taken for known.
        """
        known = (self.reached > 0) | (self.reached.sum() == 0)
        classes = torch.zeros(len(self.classes), dtype=torch.bool, device=self.classes.device)
        names = set()
        for (name, reader), reached in zip(self._readers.items(), known.tolist(), strict=True):
            if not (reached and reader.learns()):
                classes[reader.classes] = True
                names.add(name)
        return classes, frozenset(names)

    @torch.no_grad()
    def update(self) -> None:
        """Add what the present gradients say; nothing if they are not finite."""
        by_class, by_group = torch.zeros_like(self.classes), {}
        reached = torch.zeros_like(self.reached)
        for number, (name, reader) in enumerate(self._readers.items()):
            slopes = _slopes(reader)
            if slopes is None:
                continue
            reached[number] = 1
            by_channel = slopes.sum(1).reshape(-1).to(reader.channels.device)
            by_class.index_add_(0, reader.classes, by_channel[reader.channels])
            if name in self.groups:
                by_group[name] = torch.einsum("sgo,soc->sgc", self._members[name], slopes)
        found = by_class, *by_group.values()
        finite = [values.isfinite().all().to(self.classes.device) for values in found]
        if not bool(torch.stack(finite).all()):  # a GPU is waited for here, and only once
            return
        self.reached += reached
        self.classes += by_class.square()
        for name, values in by_group.items():
            self.groups[name] += values.square()

    def decay(self, factor: float) -> None:
        """Multiply all sums by `factor`: what was seen before counts less, also as known."""
        for values in self.values():
            values.mul_(factor)

    def values(self) -> list[Tensor]:
        """All sums, to be read and written in place."""
        return [self.classes, self.reached, *self.groups.values()]


def _members(layer: GatedLayer) -> Tensor:
    """Float64 `[S, G, O/S]`, one where a filter is in a group."""
    groups, _ = layer.gate.logits.shape
    one_hot = nn.functional.one_hot(layer.gate.assignment, groups).double()  # [O, G]
    return one_hot.reshape(structural_groups(layer), -1, groups).transpose(1, 2)


def _slopes(reader: _ReadingLayer) -> Tensor | None:
    """`[S, O/S, C/S]`; None where the weight is computed from others, frozen or not reached."""
    layer: Any = reader.layer
    gradient = reader.gradient()
    if gradient is None:
        return None
    slopes = filters_first(layer, layer.weight * gradient)  # large: in double precision when summed
    slopes = slopes.reshape(*slopes.shape[:2], -1).sum(2, dtype=torch.float64)
    return slopes.reshape(structural_groups(layer), -1, slopes.shape[1])
