"""`compress`: from a trained model and its data to a compact model, in one call.

1. `prepare` makes a gated copy of the model; the example inputs are those of the first batch.
2. One training loop: `GradualPruning` drops what the loss misses least during the first part of the
   steps, the rest of the steps fine-tunes what remains. The learning rate falls along a cosine.
3. `convert` emits the compact model and verifies it.

For another training loop, call these three yourself; see docs/training.md.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

from dspfx.convert import convert
from dspfx.errors import DataError, LearnError
from dspfx.model.config import PrepareConfig
from dspfx.model.rebuilt import plain_copy
from dspfx.passes.sandbox.calls import Call, of_few_samples, parameter_dtype_and_device
from dspfx.passes.sandbox.randomness import fixed_seeds
from dspfx.prepare import prepare
from dspfx.pruning.budget import Budget
from dspfx.pruning.gradual import GradualPruning
from dspfx.reporting.report import Report, report
from dspfx.training.groups.cluster import cluster_groups
from dspfx.utils.pytree import map_leaves

Loss = Callable[[nn.Module, Any], Tensor]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Progress = Callable[[int, float, float], object]

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
BEGIN = 0.05  # share of the steps before pruning begins
CONTRACT = (
    "it is called as loss(model, batch) and returns a scalar to minimise, such as "
    "lambda model, batch: cross_entropy(model(batch[0]), batch[1])"
)


class Compressed(NamedTuple):
    """What `compress` returns: `compact, report = dspfx.compress(...)`; `str` is the report.

    Attributes:
        model: the compact model, in evaluation mode, on the device of the original.
        report: of that model, layer by layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> batches = [(x, torch.tensor([0, 1]))] * 4
        >>> def loss(model, batch):
        ...     images, labels = batch
        ...     return nn.functional.cross_entropy(model(images).mean((2, 3)), labels)
        >>> done = dspfx.compress(model, batches, loss, keep_macs=0.5, steps=8)
        >>> done.model(x).shape
        torch.Size([2, 4, 8, 8])
        >>> str(done) == str(done.report)
        True
    """

    model: nn.Module
    report: Report

    def __repr__(self) -> str:
        before, emitted = self.report.before, self.report.emitted
        return (
            f"Compressed({self.report.model}: {emitted.macs / before.macs:.2%} of the MACs, "
            f"{emitted.parameters / before.parameters:.2%} of the parameters)"
        )

    def __str__(self) -> str:
        return str(self.report)


def compress(
    model: nn.Module,
    train_batches: Iterable[Any],
    loss: Loss,
    *,
    keep_macs: float = 0.5,
    steps: int,
    prune_until: float = 0.4,
    groups: bool = False,
    learning_rate: float | None = None,
    optimizer: OptimizerFactory | None = None,
    example_inputs: Any = None,
    config: PrepareConfig | None = None,
    progress: bool | Progress = True,
) -> Compressed:
    """Prune a trained model while it trains on, fine-tune it, and convert it; `model` is unchanged.

        def loss(model, batch):
            images, labels = batch
            return cross_entropy(model(images), labels)

        compact, report = dspfx.compress(model, loader, loss, keep_macs=0.5, steps=2000)

    It is `prepare`, `GradualPruning` in a plain training loop, and `convert`, on the device that
    the model is on. Whatever is random, such as the order of batches and dropout, follows torch's
    global generator: seed it for a result that repeats.

    Args:
        model: trained, any module; a copy of it is trained and pruned.
        train_batches: a `DataLoader`, or anything else that can be iterated, again and again if it
            has fewer than `steps` batches. A batch may be of any kind; its tensors are moved to the
            model's device.
        loss: called with the model in training and a batch; returns a scalar to minimise. It has to
            call the model that it is given. Half precision: use `torch.autocast` in it.
        keep_macs: the fraction of the MACs that may remain, in (0, 1].
        steps: of the optimizer, in all.
        prune_until: the share of the steps after which all is pruned, in (0, 1]; the rest
            fine-tunes.
        groups: whether groups of filters may drop inputs by themselves, which is fast after
            `dspfx.compile` only. Without, only whole channels go, which is fast in any runtime.
        learning_rate: at the start, of SGD with momentum 0.9 and weight decay 1e-4; it falls along
            a cosine to zero. 0.01 if left out.
        optimizer: makes another optimizer of the parameters that it is given, with its own learning
            rate, such as `lambda parameters: torch.optim.AdamW(parameters, 1e-3)`.
        example_inputs: see `prepare`; if left out, those that `loss` calls the model with for the
            first batch, two samples of them.
        config: see `PrepareConfig`.
        progress: whether a terminal shows a bar; or a function that is called after every step with
            the number of steps done, the loss, and the fraction of the MACs that is left.

    Raises:
        BudgetError: `keep_macs` is out of range or cannot be reached.
        DataError: there is no batch, or there are none when they are iterated again.
        LearnError: a setting out of range, or a loss that fails, is not finite, is no scalar, or
            does not depend on the weights of the model that it is given.
        DspfxError: whatever `prepare` and `convert` raise.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> batches = [(x, torch.tensor([0, 1]))] * 4
        >>> def loss(model, batch):
        ...     images, labels = batch
        ...     return nn.functional.cross_entropy(model(images).mean((2, 3)), labels)
        >>> compact, report = dspfx.compress(model, batches, loss, keep_macs=0.5, steps=8)
        >>> report.emitted.macs <= 0.5 * report.before.macs
        True
        >>> compact(x).shape == model(x).shape
        True
    """
    budget = Budget(macs=keep_macs)
    _check(steps, prune_until, learning_rate, optimizer)
    with torch.inference_mode(mode=False), torch.enable_grad():
        batches = _endless(train_batches, parameter_dtype_and_device(model)[1])
        if example_inputs is None:
            first = next(batches)
            batches = itertools.chain([first], batches)
            example_inputs = _inputs_of(model, loss, first)
        prepared = prepare(model, example_inputs, config=config).train()
        if groups:
            cluster_groups(prepared)
        pruning = GradualPruning(
            prepared,
            budget,
            total_steps=steps,
            begin=min(BEGIN, prune_until),
            end=prune_until,
            groups=groups,
        )
        make = optimizer or _sgd(LEARNING_RATE if learning_rate is None else learning_rate)
        _show(_train(prepared, pruning, make, loss, batches), pruning, progress)
        if pruning.report is None:
            raise LearnError("nothing was pruned: no gradient of the loss reached any gated layer")
        compact = convert(prepared)
    return Compressed(compact, report(compact))


def _check(
    steps: int,
    prune_until: float,
    learning_rate: float | None,
    optimizer: OptimizerFactory | None,
) -> None:
    if not isinstance(steps, int) or steps < 1:
        raise LearnError(f"steps must be an integer, at least 1, got {steps!r}")
    if not 0 < prune_until <= 1:
        raise LearnError(f"prune_until is a share of the steps in (0, 1], got {prune_until!r}")
    if learning_rate is not None:
        if optimizer is not None:
            raise LearnError("the optimizer that you make has its own learning rate; give one")
        if not (math.isfinite(learning_rate) and learning_rate >= 0):
            raise LearnError(f"learning_rate must be finite and >= 0, got {learning_rate!r}")


def _sgd(learning_rate: float) -> OptimizerFactory:
    return lambda parameters: torch.optim.SGD(
        parameters, learning_rate, MOMENTUM, weight_decay=WEIGHT_DECAY
    )


def _endless(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches over and over, on `device`.

    Raises:
        DataError: there is none, the first time or again.
    """
    for turn in itertools.count():
        found = False
        for batch in batches:
            found = True
            yield map_leaves(lambda leaf: _moved(leaf, device), batch)
        if not found:
            raise DataError(
                "train_batches can be iterated only once and has fewer batches than steps; give a "
                "DataLoader or a list"
                if turn
                else "train_batches holds no batch"
            )


def _moved(leaf: Any, device: torch.device) -> Any:
    """A tensor on `device` that can be trained on, wherever it was made."""
    if not isinstance(leaf, Tensor):
        return leaf
    moved = leaf.to(device)
    return moved.clone() if moved.is_inference() else moved


def _inputs_of(model: nn.Module, loss: Loss, batch: Any) -> Call:
    """What `loss` calls the model with, a few samples of it.

    Raises:
        LearnError: it fails, or never calls the model.
    """
    calls: list[Call] = []
    twin = plain_copy(model).train()  # `loss` is found out if it calls the user's model instead
    hook = twin.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(Call(args, kwargs)), with_kwargs=True
    )
    try:
        with torch.no_grad(), fixed_seeds(parameter_dtype_and_device(model)[1]):
            loss(twin, batch)
    except Exception as error:
        raise LearnError(
            f"the loss fails for the first batch, {type(error).__name__}: {error}; {CONTRACT}"
        ) from error
    if not calls:
        raise LearnError(
            f"the loss never calls the model that it is given, which is a copy of yours; {CONTRACT}"
        )
    hook.remove()
    return of_few_samples(twin, calls[0]).call


def _show(
    steps: Iterator[tuple[int, float]], pruning: GradualPruning, progress: bool | Progress
) -> None:
    """Take all `steps`, with a bar on a terminal or a call of `progress` after each."""
    hidden = None if progress is True else True  # None: but on terminals
    with tqdm(total=pruning.total_steps, desc="compress", disable=hidden) as bar:
        for done, value in steps:
            kept = 1.0 if pruning.report is None else pruning.report.achieved
            bar.set_postfix(loss=f"{value:.4g}", macs=f"{kept:.1%}", refresh=False)
            bar.update()
            if callable(progress):
                progress(done, value, kept)


def _train(
    prepared: nn.Module,
    pruning: GradualPruning,
    make_optimizer: OptimizerFactory,
    loss: Loss,
    batches: Iterator[Any],
) -> Iterator[tuple[int, float]]:
    """Take all steps; yields after each how many are done, and the loss."""
    optimizer = make_optimizer(prepared.parameters())
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise LearnError(
            f"optimizer has to make a torch.optim.Optimizer of the parameters that it is given, it "
            f"made a {type(optimizer).__name__}"
        )
    schedule = CosineAnnealingLR(optimizer, T_max=pruning.total_steps)
    for done, batch in enumerate(itertools.islice(batches, pruning.total_steps), 1):
        optimizer.zero_grad()
        value = loss(prepared, batch)
        _check_loss(value, done)
        value.backward()  # type: ignore[no-untyped-call]
        pruning.step()
        optimizer.step()
        schedule.step()
        yield done, float(value.detach())


def _check_loss(value: Any, step: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise LearnError(f"the loss is no scalar tensor but {kind}; {CONTRACT}")
    if not value.requires_grad:
        raise LearnError(
            "the loss does not depend on the weights of the model that it is given, or they are "
            f"all frozen; {CONTRACT}"
        )
    if not torch.isfinite(value).all():
        raise LearnError(
            f"the loss is {float(value.detach())} at step {step}; lower the learning rate, or look "
            "at the data"
        )
