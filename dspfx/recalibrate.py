"""`recalibrate`: the running statistics of batch norms, anew from a few batches."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dspfx.errors import DataError
from dspfx.module import CompactModule, PreparedModule, TwoModeModule
from dspfx.processes import Processes
from dspfx.wrappers import unwrapped


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
            `num_batches_tracked` of its batch norms are changed; in a compact model, those which
            were folded into convolutions are no longer there, so recalibrate before `convert`.
        batches: a tensor for each batch, a tuple or list of positional inputs, or a dict of inputs
            by name. Of a tuple that is longer than the model has required inputs, such as
            `(images, labels)`, the first ones are taken; at least one.
        call: what to do with a batch instead, such as `lambda b: model(b["image"].cuda())`.
        process_group: the processes that train the model together, see `GroupLearner`.

    Raises:
        DataError: there is no batch, none reaches any batch norm with statistics though there are
            such, or what they lead to is not finite; nothing is changed then.
    """
    processes = Processes.of(model, process_group)
    model = unwrapped(model)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    found = {norm: _Moments() for norm in norms}
    with torch.no_grad(), _only_norms_train(model, norms), ExitStack() as hooks:
        for norm in norms:
            hooks.enter_context(norm.register_forward_pre_hook(found[norm].see, with_kwargs=True))
        count = 0
        for batch in batches:
            call(batch) if call is not None else _call(model, batch)
            count += 1
    count = _of_all(processes, found, count)
    if count == 0:
        raise DataError("there is no batch to recalibrate with; give at least one")
    seen = {norm: moments for norm, moments in found.items() if moments.count}
    if norms and not seen:
        raise DataError(
            "the batches reached no batch norm of the model; let call=... call the model that "
            "recalibrate is given, or what it holds"
        )
    for moments in seen.values():
        if not (torch.isfinite(moments.mean).all() and torch.isfinite(moments.squares).all()):
            raise DataError("the batches lead to values that are not finite; look for bad ones")
    for norm, moments in seen.items():
        _take_over(norm, moments, count)


@dataclass
class _Moments:
    """Count, mean `[C]` and sum of squared deviations `[C]` of all that a batch norm has seen."""

    count: int = 0
    mean: Any = 0.0
    squares: Any = 0.0

    def see(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        """Take one more input, `[N, C, ...]`, into account (Chan, Golub, LeVeque, 1979)."""
        x = args[0] if args else kwargs["input"]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        every_but_channels = [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(x, dim=every_but_channels, correction=0)
        variance, mean, count = variance.double(), mean.double(), x.numel() // x.shape[1]
        shift, whole = mean - self.mean, self.count + count
        self.squares = self.squares + variance * count + shift**2 * (self.count * count / whole)
        self.mean = self.mean + shift * (count / whole)
        self.count = whole


def _of_all(processes: Processes, found: Mapping[_BatchNorm, _Moments], batches: int) -> int:
    """Let each of `found` be that of all processes; the number of batches of them all."""
    if processes.alone or not found:
        return batches
    for norm, moments in found.items():
        assert norm.running_mean is not None
        zero = torch.zeros_like(norm.running_mean, dtype=torch.float64)
        counts = processes.sum(zero + moments.count)
        mean = processes.sum(zero + moments.count * moments.mean) / counts.clamp(min=1)
        shift = moments.count * (mean - moments.mean) ** 2
        moments.squares = processes.sum(zero + moments.squares + shift)
        moments.mean, moments.count = mean, int(counts[0])
    return int(processes.sum(zero + batches)[0])


@torch.no_grad()
def _take_over(norm: _BatchNorm, moments: _Moments, batches: int) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(moments.mean)
    norm.running_var.copy_(moments.squares / max(moments.count - 1, 1))
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(batches)


@contextmanager
def _only_norms_train(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """All in evaluation mode, except `norms`; modes and statistics are afterwards as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(b, b.clone()) for norm in norms for b in norm._buffers.values() if b is not None]
    _set_modes({module: module in norms for module in modes})
    try:
        yield
    finally:
        _set_modes(modes)
        for buffer, saved in buffers:
            buffer.copy_(saved)


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        if isinstance(module, TwoModeModule):
            module.train(mode)  # it has a graph for either
    for module, mode in modes.items():
        module.training = mode


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, tuple | list):
        model(*batch[: _inputs(model)])
    else:
        model(batch)


def _inputs(model: nn.Module) -> int | None:
    """How many positional inputs to give: the required ones, or else one; None for any number."""
    if isinstance(model, PreparedModule | CompactModule):
        return len(model.example_inputs)
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in parameters if p.kind in kinds]
    required = sum(p.default is p.empty for p in positional)
    return min(max(1, required), len(positional))
