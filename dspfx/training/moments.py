"""What a model's modules see of some batches: the moments of their inputs, channel by channel.

`input_moments` measures what the weights alone do not show: how much each input channel
contributes to a layer's output. After a norm and an activation, channels differ by orders of
magnitude.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import DataError
from dspfx.layers.parametrised import weight_of
from dspfx.layers.weights import filters_first, structural_groups
from dspfx.model.analysed import analyse_prepared
from dspfx.model.batches import call_with
from dspfx.model.modes import only_training
from dspfx.model.parts import parts_of
from dspfx.passes.analysis.channel_ops import Mix
from dspfx.utils.distributed import Processes
from dspfx.utils.wrappers import unwrapped


def input_moments(
    prepared: nn.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[Any], object] | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """How strong the input channels of every convolution and linear layer are.

    For `prune_channels`, `prune` and `cluster_groups`, which then weigh what a filter does with a
    channel by the channel's mean square: the energy `sum_k W[o,c,k]^2 E[x_c^2]` is what channel c
    contributes to the mean square of filter o's output, were channels and taps uncorrelated. A few
    hundred samples are enough. The model is in evaluation mode meanwhile; nothing is changed.

    Args:
        prepared: from `dspfx.prepare`.
        batches, call: see `recalibrate`.
        process_group: the processes that train the model together, each of which gives its share
            of the batches; see `GroupLearner`.

    Returns:
        Name of a layer -> float64 `[C]`, the mean of `x^2` over samples and positions. Layers that
        the batches do not reach are left out: of these the weights alone will count.

    Raises:
        DataError: there is no batch, none reaches any layer, or inputs are not finite.
        ConvertError: `prepared` does not come from `dspfx.prepare`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> moments = dspfx.input_moments(prepared, [x])
        >>> {name: moment.shape for name, moment in moments.items()}
        {'0': torch.Size([3]), '1': torch.Size([8]), '2': torch.Size([8])}
        >>> report = dspfx.prune_channels(prepared, dspfx.Budget(macs=0.5), moments=moments)
    """
    processes = Processes.of(prepared, process_group)
    prepared = unwrapped(prepared)
    layers = {
        part.full_name(op.layer): part.module.get_submodule(op.layer)
        for part in parts_of(prepared)
        for op in analyse_prepared(part.module).ops.values()
        if isinstance(op, Mix)
    }
    weighted = {n: m for n, m in layers.items() if isinstance(weight_of(m), Tensor)}
    found = {layer: _of_inputs(layer) for layer in weighted.values()}
    with only_training(prepared, ()):
        count = observe(prepared, found, batches, call, processes)
    if count == 0:
        raise DataError("there is no batch to measure inputs with; give at least one")
    if not any(moments.count for moments in found.values()):
        raise DataError(
            "the batches reached no layer of the model; let call=... call the model that "
            "input_moments is given, or what it holds"
        )
    return {n: found[layer].mean_square for n, layer in weighted.items() if found[layer].count}


def _of_inputs(layer: nn.Module) -> "Moments":
    weight = filters_first(layer)
    channels = weight.shape[1] * structural_groups(layer)
    return Moments(1 - weight.dim(), weight.new_zeros(channels, dtype=torch.float64))


class Moments:
    """Mean and squared deviations of all values of each channel.

    Attributes:
        dim: which dimension of the values holds the channels.
        count: how many values of each channel were seen.
        mean, squares: `[C]`, their mean, and the sum of their squared deviations from it.
    """

    def __init__(self, dim: int, zeros: Tensor) -> None:
        self.dim = dim
        self.count = 0
        self.mean, self.squares = zeros, zeros

    @property
    def mean_square(self) -> Tensor:
        """`[C]`, the mean of the squared values."""
        return self.mean.square() + self.squares / self.count

    def see(self, x: Tensor) -> None:
        """Take the values `x` into account (Chan, Golub, LeVeque, 1979)."""
        if not x.numel():
            return
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        every_but_channels = [d for d in range(x.dim()) if d != self.dim % x.dim()]
        variance, mean = torch.var_mean(x, dim=every_but_channels, correction=0)
        variance, mean, count = variance.double(), mean.double(), x.numel() // x.shape[self.dim]
        shift, whole = mean - self.mean, self.count + count
        self.squares = self.squares + variance * count + shift**2 * (self.count * count / whole)
        self.mean = self.mean + shift * (count / whole)
        self.count = whole

    def gather(self, processes: Processes) -> None:
        """Replace these moments by those of what all processes have seen."""
        counts = processes.sum(torch.zeros_like(self.mean) + self.count)
        mean = processes.sum(self.count * self.mean) / counts.clamp(min=1)
        self.squares = processes.sum(self.squares + self.count * (mean - self.mean) ** 2)
        self.mean, self.count = mean, int(counts[0])


@torch.no_grad()
def observe(
    model: nn.Module,
    found: Mapping[Any, Moments],
    batches: Iterable[Any],
    call: Callable[[Any], object] | None,
    processes: Processes,
) -> int:
    """Run `model` on `batches`; how many there were, in all processes.

    Args:
        model: called with each batch, in the mode that it is in.
        found: modules in it; the inputs of each are added to its moments.
        batches, call: see `dspfx.recalibrate`.
        processes: each of which has its own share of the batches.

    Raises:
        DataError: an input is not finite.
    """
    with ExitStack() as hooks:
        for module, moments in found.items():
            see = _sees_input(moments)
            hooks.enter_context(module.register_forward_pre_hook(see, with_kwargs=True))
        count = 0
        for batch in batches:
            call(batch) if call is not None else call_with(model, batch)
            count += 1
    if not processes.alone and found:
        for moments in found.values():
            moments.gather(processes)
        count = int(processes.sum(torch.zeros_like(moments.mean) + count)[0])
    for moments in found.values():
        if not (torch.isfinite(moments.mean).all() and torch.isfinite(moments.squares).all()):
            raise DataError("the batches lead to values that are not finite; look for bad ones")
    return count


def _sees_input(moments: Moments) -> Callable[..., None]:
    def see(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        moments.see(args[0] if args else kwargs["input"])

    return see
