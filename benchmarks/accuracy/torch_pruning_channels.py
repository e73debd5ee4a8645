"""Channel pruning by Torch-Pruning, which dspfx is compared with."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from benchmarks.accuracy.protocol import Schedule, train
from benchmarks.accuracy.scenarios import IMAGE
from benchmarks.accuracy.setting import Run, macs_of

SPARSE_LEARNING = 5e-4  # what Torch-Pruning's authors reproduce their CIFAR results with
RATIOS = [step / 16 for step in range(1, 17)]  # of channels, that are tried before bisection
BISECTIONS = 10


def _channels(model: nn.Module, macs: int, importance: Any) -> nn.Module:
    """`model` without its least important channels, over all layers, at `macs` or just below."""

    def at(ratio: float) -> nn.Module | None:
        pruned = copy.deepcopy(model)
        _pruner(pruned, torch_pruning.pruner.MagnitudePruner, importance, ratio).step()
        return pruned if macs_of(pruned) <= macs else None

    # layers that would lose all channels lose none: near 1 a higher ratio leaves more
    high, best = next((r, m) for r in RATIOS if (m := at(r)) is not None)
    low = high - RATIOS[0]
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        pruned = at(ratio)
        if pruned is None:
            low = ratio
        else:
            high, best = ratio, pruned
    return best


def _pruner(model: nn.Module, kind: Any, importance: Any, ratio: float, **options: Any) -> Any:
    heads = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return kind(
        model,
        IMAGE,
        importance=importance,
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=heads,
        **options,
    )


def by_magnitude(model: nn.Module, macs: int, _: Run) -> nn.Module:
    """Channels with the smallest weights go, those of coupled layers together."""
    return _channels(model, macs, torch_pruning.importance.GroupMagnitudeImportance(p=2))


def by_group_norm(model: nn.Module, macs: int, _: Run) -> nn.Module:
    """Likewise, relative to the largest of each set of coupled layers."""
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer="max")
    return _channels(model, macs, importance)


def sparse_learning(run: Run) -> nn.Module:
    """8 epochs with a stronger decay for weaker channels, and no other, as in the original."""
    model = copy.deepcopy(run.dense)
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer="max")
    kind = torch_pruning.pruner.GroupNormPruner
    pruner = _pruner(model, kind, importance, 0.5, reg=SPARSE_LEARNING)

    def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
        optimizer.zero_grad()
        loss().backward()
        pruner.regularize(model)
        optimizer.step()

    schedule = Schedule(run.scenario.learn.cycles, run.scenario.learn.lr, weight_decay=0.0)
    train(model, run.data, schedule, run.generator, step)
    return model
