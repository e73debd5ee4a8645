"""What the loss says about channels and groups, gathered from the gradients of training.

Let a factor of 1 stand before what filter o reads of channel c. The loss's derivative by it is
`S[o,c] = sum_k W[o,c,k] dL/dW[o,c,k]`, known after every backward pass; that of a factor which
several of them have in common is their sum. Its mean square over batches, the Fisher information
of the factor, says how much the loss grows, to second order, when the factor becomes zero:

1. A coupling class, the channel c of all that reads it: the sum of S over all filters of all
   layers that read a channel of the class.
2. A channel of a group of filters: the sum of S over the group's filters.

Theis, Korshunova, Tejani, Huszar, "Faster gaze prediction with dense networks and Fisher pruning",
2018, arXiv 1801.05787; over coupled channels: Liu et al., "Group Fisher Pruning for Practical
Network Compression", ICML 2021, arXiv 2108.00708.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspfx.filters import filters_first, structural_groups
from dspfx.gates import GatedLayer
from dspfx.gating import analyse_prepared
from dspfx.module import PreparedModule
from dspfx.passes.values import Mix
from dspfx.weighted import is_weighted


@dataclass(frozen=True)
class _Reader:
    """A layer, and the coupling classes `[C]` of what each of its calls reads."""

    layer: nn.Module
    classes: tuple[Tensor, ...]


class Sensitivity:
    """The summed squares of one prepared module.

    Attributes:
        classes: float64 `[classes]`.
        groups: name of a gated layer -> float64 `[S, G, C/S]`.
        unseen: bool `[classes]`: read by a layer whose gradient is not known.
        unseen_layers: names of the gated layers whose gradient is not known.
    """

    def __init__(self, module: PreparedModule) -> None:
        analysis = analyse_prepared(module)
        device = next(module.parameters()).device
        count = int(analysis.classes.max(initial=-1)) + 1
        self.classes = torch.zeros(count, dtype=torch.float64, device=device)
        self.unseen = torch.zeros(count, dtype=torch.bool, device=device)
        self.groups: dict[str, Tensor] = {}
        self.unseen_layers: set[str] = set()
        read: dict[str, list[Tensor]] = {}
        for op in analysis.ops.values():
            if isinstance(op, Mix):
                calls = read.setdefault(op.layer, [])
                if not op.restored:
                    inputs = analysis.class_of(op.operands[0])
                    calls.append(torch.from_numpy(inputs).to(device))
        self._readers: dict[str, _Reader] = {}
        for name, classes in read.items():
            layer = module.get_submodule(name)
            self._readers[name] = _Reader(layer, tuple(classes))
            if isinstance(layer, GatedLayer):
                shape = (
                    structural_groups(layer),
                    len(layer.gate.logits),
                    filters_first(layer).shape[1],
                )
                self.groups[name] = torch.zeros(shape, dtype=torch.float64, device=device)
        self._members: dict[str, Tensor] = {}
        self.take_groups()

    def take_groups(self) -> None:
        """Go on with the groups that the filters are in now."""
        for name in self.groups:
            layer = self._readers[name].layer
            assert isinstance(layer, GatedLayer)
            self._members[name] = _members(layer)

    @torch.no_grad()
    def update(self) -> None:
        """Add what the present gradients say; nothing if they are not finite."""
        by_class, by_group = torch.zeros_like(self.classes), {}
        unseen, unseen_layers = self.unseen.clone(), set(self.unseen_layers)
        for name, reader in self._readers.items():
            slopes = _slopes(reader.layer)
            if slopes is None:
                unseen_layers |= self.groups.keys() & {name}
                for classes in reader.classes:
                    unseen[classes] = True
                continue
            for classes in reader.classes:
                by_class.index_add_(0, classes, slopes.sum(1).reshape(-1).to(classes.device))
            if name in self.groups:
                by_group[name] = torch.einsum("sgo,soc->sgc", self._members[name], slopes)
        found = by_class, *by_group.values()
        finite = [values.isfinite().all().to(self.classes.device) for values in found]
        if not bool(torch.stack(finite).all()):  # a GPU is waited for here, and only once
            return
        self.unseen, self.unseen_layers = unseen, unseen_layers
        self.classes += by_class.square()
        for name, values in by_group.items():
            self.groups[name] += values.square()

    def decay(self, factor: float) -> None:
        """Multiply all sums by `factor`: what was seen before counts less."""
        for values in self.values():
            values.mul_(factor)

    def values(self) -> list[Tensor]:
        """All sums, to be read and written in place."""
        return [self.classes, *self.groups.values()]


def _members(layer: GatedLayer) -> Tensor:
    """Float64 `[S, G, O/S]`, one where a filter is in a group."""
    groups, _ = layer.gate.logits.shape
    one_hot = nn.functional.one_hot(layer.gate.assignment, groups).double()  # [O, G]
    return one_hot.reshape(structural_groups(layer), -1, groups).transpose(1, 2)


def _slopes(layer: nn.Module) -> Tensor | None:
    """`[S, O/S, C/S]`; None where the weight is computed from others, frozen or not reached."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.grad is None or is_weighted(layer):
        return None
    slopes = filters_first(layer, weight * weight.grad)  # large: in double precision when summed
    slopes = slopes.reshape(*slopes.shape[:2], -1).sum(2, dtype=torch.float64)
    return slopes.reshape(structural_groups(layer), -1, slopes.shape[1])
