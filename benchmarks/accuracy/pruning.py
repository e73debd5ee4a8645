"""From a prepared network to a masked one with a given number of MACs."""

import copy
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import dspfx
from benchmarks.accuracy.groups import learn_groups, strength_of
from benchmarks.accuracy.protocol import cross_entropy, distilled, train
from benchmarks.accuracy.setting import Run, dense_macs

PRUNED_BY = 0.4  # the share of the epochs after which gradual pruning is done
PASSES, SAMPLE = 40, 32  # backward passes, and their images, where nothing is trained


def masked(
    prepared: nn.Module, macs: int, run: Run, prune: Callable[..., object] = dspfx.prune
) -> nn.Module:
    """A copy of `prepared` that `prune` has pruned."""
    pruned = copy.deepcopy(prepared)
    prune(pruned, dspfx.Budget(macs=macs / dense_macs(run.dense)[0], count="masks"))
    return pruned


without_channels = functools.partial(masked, prune=dspfx.prune_channels)


def _moments(prepared: nn.Module, run: Run) -> dict[str, Tensor]:
    return dspfx.input_moments(prepared, run.data.train_x[:1000].cpu().split(250))


def without_channels_calibrated(prepared: nn.Module, macs: int, run: Run) -> nn.Module:
    """By what channels do to the inputs of layers, too."""
    prune = functools.partial(dspfx.prune_channels, moments=_moments(prepared, run))
    return masked(prepared, macs, run, prune)


def regrouped(prepared: nn.Module, macs: int, run: Run) -> nn.Module:
    """Groups are clustered in the present weights and inputs; no filters are dropped by them."""
    moments = _moments(prepared, run)

    def prune(pruned: nn.Module, budget: dspfx.Budget) -> None:
        dspfx.cluster_groups(pruned, moments=moments)
        dspfx.prune(pruned, budget, drop_filters=False)

    return masked(prepared, macs, run, prune)


def _half_way(macs: int, run: Run) -> int:
    """The MACs that are half of the way to `macs`, by factors."""
    return math.isqrt(dense_macs(run.dense)[0] * macs)


def channels_then_regrouped(prepared: nn.Module, macs: int, run: Run) -> nn.Module:
    """Half of the way by whole channels, the rest by groups that are clustered in what is left."""
    narrow = without_channels_calibrated(prepared, _half_way(macs, run), run)
    return regrouped(narrow, macs, run)


def _narrow_and_clustered(prepared: nn.Module, macs: int, run: Run) -> nn.Module:
    narrow = without_channels(prepared, _half_way(macs, run), run)
    dspfx.cluster_groups(narrow)
    return narrow


def channels_then_groups(prepared: nn.Module, macs: int, run: Run) -> nn.Module:
    """The same by the weights alone, without moments of the inputs."""
    return masked(_narrow_and_clustered(prepared, macs, run), macs, run)


def channels_then_learned(prepared: nn.Module, macs: int, run: Run) -> nn.Module:
    """Learning starts from the clusters."""
    learned = learn_groups(
        _narrow_and_clustered(prepared, macs, run), run, strength=strength_of(run)
    )
    return masked(learned, macs, run)


def gradually(
    prepared: nn.Module,
    macs: int,
    run: Run,
    groups: bool = True,
    distil: bool = False,
    timed: bool = False,
) -> nn.Module:
    """8 epochs at the rate of learning, in which the network is pruned by what the loss says."""
    pruned, schedule = copy.deepcopy(prepared), run.scenario.learn
    made: list[dspfx.GradualPruning] = []
    whole, gated = dense_macs(run.dense)
    budget = dspfx.Budget(macs=macs / whole, count="masks")
    if timed:
        budget = dspfx.Budget(latency=1 - (whole - macs) / gated)
    steps = run.data.steps(schedule.epochs)

    def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
        if not made:
            made.append(
                dspfx.GradualPruning(
                    pruned, budget, total_steps=steps, end=PRUNED_BY, groups=groups
                )
            )
        optimizer.zero_grad()
        loss().backward()
        made[0].step()
        optimizer.step()

    loss = distilled(run.dense) if distil else None
    train(
        pruned, run.data, schedule, run.generator, step, loss, special=math.ceil(PRUNED_BY * steps)
    )
    return pruned


def by_the_loss(prepared: nn.Module, macs: int, run: Run, groups: bool = True) -> nn.Module:
    """Gradually, by the gradients of some batches, but without a step of any optimizer."""
    pruned = copy.deepcopy(prepared).train()
    budget = dspfx.Budget(macs=macs / dense_macs(run.dense)[0], count="masks")
    pruning = dspfx.GradualPruning(
        pruned, budget, total_steps=PASSES, begin=0.2, end=1.0, prunings=PASSES // 2, groups=groups
    )
    x, y = run.data.train_x[:2000].cpu(), run.data.train_y[:2000].cpu()
    for _ in range(PASSES):
        some = torch.randperm(len(y), generator=run.generator)[:SAMPLE]
        pruned.zero_grad()
        cross_entropy(pruned, x[some], y[some]).backward()
        pruning.step()
    return pruned
