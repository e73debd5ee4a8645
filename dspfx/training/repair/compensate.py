"""`compensate`: what pruned layers lack is regressed on the inputs that they have kept."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import DataError
from dspfx.layers.gated import GatedLayer
from dspfx.layers.weights import as_weight, filters_first, structural_groups
from dspfx.model.modes import only_training
from dspfx.model.parts import parts_of
from dspfx.training.repair.least_squares import Fit, NormalEquations
from dspfx.training.repair.paired_runs import PairedRuns
from dspfx.training.repair.repairable import Repairable, repairables
from dspfx.utils.distributed import Processes
from dspfx.utils.wrappers import unwrapped

LARGEST = 8192  # inputs times taps of the largest system; its sums take 0.5 GiB
RIDGE = 1e-3
UNREACHED = "the batches do not reach it"


@dataclass(frozen=True)
class Compensation:
    """What `compensate` did.

    Attributes:
        before, after: by the name of each layer that was fitted, the mean square of what its output
            lacks of the dense layer's, relative to the variance of that: before the fit, with the
            layers before it already fitted, and after it.
        left_alone: the layers that pruning affects and that were not fitted, and why.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(16, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> report = dspfx.prune_channels(prepared, dspfx.Budget(macs=0.5))
        >>> done = dspfx.compensate(prepared, [x])
        >>> list(done.after), done.left_alone
        (['1', '2'], {})
    """

    before: Mapping[str, float]
    after: Mapping[str, float]
    left_alone: Mapping[str, str]

    def __str__(self) -> str:
        lines = [
            f"{name}: error {self.before[name]:.2%} -> {after:.2%}"
            for name, after in self.after.items()
        ]
        return "\n".join([*lines, *(f"{n} stays: {why}" for n, why in self.left_alone.items())])


def compensate(
    prepared: nn.Module,
    batches: Iterable[Any],
    *,
    ridge: float = RIDGE,
    call: Callable[[Any], object] | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Compensation:
    """Fit the layers of a pruned model to what they computed before it was pruned.

    No labels, no gradients. Every convolution and linear layer that has lost inputs, or whose
    inputs are others by the pruning before it, gets the weights and the bias that come closest to
    its dense output, the one without masks, on `batches`: ridge regression on the inputs that each
    group of its filters has kept, the sum over taps included,

        min over d, b of  mean |y - (W + d) x - b|^2 + lambda |d|^2,

    with y the dense output, W the present weights, and `lambda` = `ridge` times the mean square of
    the inputs about their means (least-squares reconstruction of the inputs that remain: He, Zhang,
    Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, arXiv 1707.06168;
    ridge regression for linear layers and attention: arXiv 2602.05243). Layers are fitted in the
    order in which they are executed, so that each reads what those before it give after their fit;
    none is worse than without, on `batches`. A convolution without a bias leaves its
    constant to the running mean of the batch norm that follows; other statistics stay, and
    `recalibrate` may estimate them again afterwards. What is masked stays masked.

    Call it once, when pruning is done and before anything is trained: the dense model is
    `prepared` without its masks. Each part of a model that was prepared in parts is compared with
    its own dense form, given the same inputs.

    The batches are gone through once for every layer that waits for another, each time with and
    without the masks: what is fitted to inputs that are not repaired yet is of no use. An iterator
    is kept in memory for that. Sums are in float64 and need the memory of the largest layer alone,
    `n^2` numbers for n inputs times taps. A layer with n above 8192 is fitted block by block of
    its input channels, each to what the blocks before it have left, in a pass of its own.

    Args:
        prepared: from `dspfx.prepare`, pruned. Weights and biases of layers, and running means, are
            changed in place. It is in evaluation mode meanwhile.
        batches: see `recalibrate`; a few hundred samples are enough.
        ridge: at least 0. More keeps weights closer to what they are.
        call: see `recalibrate`; it has to call `prepared` itself, or what it holds.
        process_group: the processes that hold the model together, each of which gives its share
            of the batches; see `GroupLearner`. All get the same weights.

    Returns:
        How far every layer is from the dense one, before and after, and which are left alone: those
        whose weight is shared or computed, or which read what depends on their own output.

    Raises:
        DataError: there is no batch, none reaches any layer that pruning affects, `ridge` is
            negative, or values are not finite; nothing is changed then.
        ConvertError: `prepared` does not come from `dspfx.prepare`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(16, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> report = dspfx.prune_channels(prepared, dspfx.Budget(macs=0.5))
        >>> done = dspfx.compensate(prepared, [x])
        >>> all(done.after[name] <= done.before[name] for name in ("1", "2"))
        True
        >>> compact = dspfx.convert(prepared)
    """
    if not ridge >= 0 or ridge == float("inf"):
        raise DataError(f"ridge must be a number of at least 0, got {ridge}")
    processes = Processes.of(prepared, process_group)
    model = unwrapped(prepared)
    parts = parts_of(model)
    batches = list(batches) if isinstance(batches, Iterator) else batches
    runs = PairedRuns(model, batches, call, processes)
    with only_training(model, ()), runs.undone_on_error():
        parts = runs.in_order(parts)
        found = repairables(model, parts)
        left_alone = dict(found.left_alone)
        fits: dict[str, list[Fit]] = {}
        for systems in itertools.chain.from_iterable(map(_passes, found.stages)):
            runs.observe([system for _, system in systems], parts)
            for layer, system in systems:
                if not system.count:
                    left_alone[layer.name] = UNREACHED
                    continue
                fit = system.solve(ridge)
                processes.broadcast([fit.weight, fit.bias])
                _apply(layer, system, fit, runs)
                fits.setdefault(layer.name, []).append(fit)
        if not fits and UNREACHED in left_alone.values():
            raise DataError(
                "the batches reached no layer that pruning affects; let call=... call the model "
                "that compensate is given, or what it holds"
            )
        if not fits:
            runs.observe([], parts)  # there must be a batch
    before = {name: own[0].before / (own[0].whole or 1.0) for name, own in fits.items()}
    after = {name: own[-1].after / (own[-1].whole or 1.0) for name, own in fits.items()}
    return Compensation(before, after, left_alone)


Systems = list[tuple[Repairable, NormalEquations]]


def _passes(stage: Sequence[Repairable]) -> Iterator[Systems]:
    """The systems of a stage, as many at once as have room for their sums."""
    waiting = [(layer, list(_blocks(layer))) for layer in stage]
    while waiting := [(layer, blocks) for layer, blocks in waiting if blocks]:
        systems: Systems = []
        room = LARGEST**2
        for layer, blocks in waiting:
            mask, channels = blocks[0]
            groups = structural_groups(layer.layer)
            size = groups * (mask.shape[1] * filters_first(layer.layer)[0, 0].numel()) ** 2
            if size <= room or not systems:
                del blocks[0]
                system = NormalEquations(
                    layer.name, layer.layer, mask, channels, layer.shift is not None
                )
                systems.append((layer, system))
                room -= size
        yield systems


def _blocks(layer: Repairable) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The inputs to fit at once: bool `[O, n]`, and which channels these n are.

    Layers of one structural group are fitted to channels that somebody reads, all others to all;
    where nothing is read there is nothing to fit.
    """
    own = layer.layer
    weight = filters_first(own)
    mask = (
        own.gate.mask if isinstance(own, GatedLayer) else weight.new_ones(weight.shape[:2]).bool()
    )
    if structural_groups(own) > 1:
        yield mask, None
        return
    read = mask.any(0).nonzero()[:, 0]
    for channels in torch.split(read, max(1, LARGEST // weight[0, 0].numel())):
        if len(channels):
            yield mask[:, channels], channels


@torch.no_grad()
def _apply(layer: Repairable, system: NormalEquations, fit: Fit, runs: PairedRuns) -> None:
    """Add what was found to the weight, and to what holds the constant of the layer."""
    weight = layer.layer.get_parameter("weight")
    filters = filters_first(layer.layer, weight).double()
    if system.channels is None:
        filters = filters + fit.weight
    else:
        filters = filters.index_add(1, system.channels, fit.weight)
    runs.write(weight, as_weight(layer.layer, filters))
    if layer.shift is not None:
        runs.write(layer.shift, layer.shift.double() + layer.sign * fit.bias)
