"""`recalibrate`: the running statistics of batch norms, estimated again from a few batches."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dspfx.errors import DataError
from dspfx.model.modes import only_training
from dspfx.passes.sandbox.state import buffers_kept
from dspfx.training.moments import Moments, observe
from dspfx.utils.distributed import Processes
from dspfx.utils.wrappers import unwrapped


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[Any], object] | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> None:
    """Replace the running mean and variance of every batch norm by those of `batches`.

    Masks change what batch norms see. Their statistics are estimated again here, without training:
    the model is in evaluation mode, apart from the batch norms, which normalise by the batch. They
    become the mean and the unbiased variance of all values in all batches together; how large the
    batches are, and the momentum of a batch norm, do not matter. Where several processes train the
    model, each of them calls this, with its own share of the batches: the statistics are those of
    all shares, the same everywhere.

    Args:
        model: prepared, compact or any other. Only `running_mean`, `running_var` and
            `num_batches_tracked` of its batch norms are changed, those of functional ones are not.
            In a compact model, those which were folded into convolutions are no longer there, so
            recalibrate before `convert`.
        batches: a tensor for each batch, a tuple or list of positional inputs, or a dict of inputs
            by name. Of a tuple that is longer than the model has required inputs, such as
            `(images, labels)`, the first ones are taken; at least one.
        call: what to do with a batch instead, such as `lambda b: model(b["image"].cuda())`.
        process_group: the processes that train the model together, see `GroupLearner`.

    Raises:
        DataError: there is no batch, none reaches any batch norm with statistics though there are
            such, one is too small, or what they lead to is not finite; nothing is changed then.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> report = dspfx.prune_channels(prepared, dspfx.Budget(macs=0.7))
        >>> dspfx.recalibrate(prepared, [x])
        >>> compact = dspfx.convert(prepared)  # with the new statistics folded in
    """
    processes = Processes.of(model, process_group)
    model = unwrapped(model)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    found = {norm: _of_batch_norm(norm) for norm in norms if norm.running_mean is not None}
    with only_training(model, found.keys()), buffers_kept(model):
        try:
            count = observe(model, found, batches, call, processes)
        except ValueError as error:
            if "more than 1 value" not in str(error):
                raise
            raise DataError(
                "a batch norm cannot normalise a batch that gives it one value per channel; leave "
                "that batch out, or join it with another"
            ) from error
    if count == 0:
        raise DataError("there is no batch to recalibrate with; give at least one")
    seen = {norm: moments for norm, moments in found.items() if moments.count}
    if found and not seen:
        raise DataError(
            "the batches reached no batch norm of the model; let call=... call the model that "
            "recalibrate is given, or what it holds"
        )
    for norm, moments in seen.items():
        _take_over(norm, moments, count)


def _of_batch_norm(norm: _BatchNorm) -> Moments:
    return Moments(1, torch.zeros_like(cast(Tensor, norm.running_mean), dtype=torch.float64))


@torch.no_grad()
def _take_over(norm: _BatchNorm, moments: Moments, batches: int) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(moments.mean)
    norm.running_var.copy_(moments.squares / max(moments.count - 1, 1))
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(batches)
