"""The ways to prune that are compared: from the weights of a trained network to a smaller one.

Every method gets the same dense weights and the same number of epochs, and must leave at most the
same multiply-accumulates. What trains before it prunes does so for 8 epochs and is fine-tuned for
5 + 5; what does not is fine-tuned for 8 + 5 + 5.
"""

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dspfx
from benchmarks.accuracy.protocol import (
    Data,
    Schedule,
    cross_entropy,
    distilled,
    noise,
    train,
)
from benchmarks.accuracy.scenarios import IMAGE, Scenario
from dspfx.layers.gated import gated_layers
from dspfx.layers.weights import energy, filters_first
from dspfx.training.narrow.narrow import NARROW

SPARSE_LEARNING = 5e-4  # what Torch-Pruning's authors reproduce their CIFAR results with
RATIOS = [step / 16 for step in range(1, 17)]  # of channels, that are tried before bisection
BISECTIONS = 10
PRUNED_BY = 0.4  # the share of the epochs after which gradual pruning is done
PASSES, SAMPLE = 40, 32  # backward passes, and their images, where nothing is trained
# strength times steps of our own setting: the longer the penalty acts, the weaker it may be
SHRINKAGE = 19.0


@dataclass(frozen=True)
class Run:
    """What a method may use.

    Attributes:
        scenario, data: what is trained on what.
        dense: the trained network; not to be changed.
        generator: of everything random.
    """

    scenario: Scenario
    data: Data
    dense: nn.Module
    generator: torch.Generator


@dataclass(frozen=True)
class Method:
    """One way to prune.

    Attributes:
        start: what it starts from, for any budget; of `STARTS`.
        prune: the pruned network at a number of MACs, given the start.
        learns: `prune` itself spends 8 epochs on learning.
        higher_rate: its first 8 epochs have the rate that learning has.
        distil: fine-tuning learns from the dense network, too.
        tuned: whether there is any fine-tuning; otherwise batch norms are recalibrated.
    """

    start: str
    prune: Callable[[nn.Module, int, Run], nn.Module]
    learns: bool = False
    higher_rate: bool = False
    distil: bool = False
    tuned: bool = True

    def tune(self, model: nn.Module, run: Run) -> None:
        """Fine-tune `model` in place."""
        if not self.tuned:
            dspfx.recalibrate(model, run.data.train_x[:2000].cpu().split(500))
            return
        scenario, loss = run.scenario, distilled(run.dense) if self.distil else cross_entropy
        schedules = [scenario.tune_longer]
        if self.higher_rate:
            schedules = [scenario.learn, scenario.tune]
        elif self.learns or STARTS[self.start].trains:
            schedules = [scenario.tune]
        with _narrow(model) as trained:
            for schedule in schedules:
                train(trained, run.data, schedule, run.generator, loss=loss)


@contextlib.contextmanager
def _narrow(model: nn.Module) -> Iterator[nn.Module]:
    """What is alive of `model`, where little is; it has learned the same afterwards."""
    if not isinstance(model, dspfx.PreparedModule):
        yield model
        return
    left = dspfx.report(model)
    if left.after.macs > NARROW * left.before.macs:
        yield model
        return
    narrow = dspfx.narrow(model)
    yield narrow
    dspfx.widen(narrow, model)


def dense_macs(model: nn.Module) -> tuple[int, int]:
    """MACs of `model` for one image, and those of its layers with gates."""
    found = dspfx.report(dspfx.prepare(model, IMAGE.repeat(2, 1, 1, 1)))
    return found.before.macs, found.gated_before.macs


def macs_of(model: nn.Module) -> int:
    """MACs for one image: of what is alive in a prepared network, else counted by torch."""
    if isinstance(model, dspfx.PreparedModule):
        return dspfx.report(model).after.macs
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(IMAGE)
    return int(counter.get_total_flops()) // 2


# -- channel pruning, by Torch-Pruning -------------------------------------------------------------


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


def _magnitude(model: nn.Module, macs: int, _: Run) -> nn.Module:
    return _channels(model, macs, torch_pruning.importance.GroupMagnitudeImportance(p=2))


def _group_norm(model: nn.Module, macs: int, _: Run) -> nn.Module:
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, normalizer="max")
    return _channels(model, macs, importance)


def _sparse_learning(run: Run) -> nn.Module:
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


# -- groups of filters -----------------------------------------------------------------------------


def _prepared(run: Run, groups: int) -> nn.Module:
    config = dspfx.PrepareConfig(groups=groups)
    return dspfx.prepare(run.dense, IMAGE.repeat(2, 1, 1, 1), config=config)


def _learn(
    prepared: nn.Module,
    run: Run,
    learner: type[dspfx.GroupLearner] = dspfx.GroupLearner,
    **settings: Any,
) -> nn.Module:
    """Group learning in place, by default as in the paper."""
    made: list[dspfx.GroupLearner] = []
    steps = run.data.steps(run.scenario.learn.epochs)

    def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
        if not made:
            gumbel = noise(run.generator)
            made.append(
                learner(prepared, optimizer, total_steps=steps, generator=gumbel, **settings)
            )
        made[0].step(loss)

    train(prepared, run.data, run.scenario.learn, run.generator, step)
    return prepared


def _learned(run: Run, groups: int = 4, **settings: Any) -> nn.Module:
    return _learn(_prepared(run, groups), run, **settings)


def _strength(run: Run) -> float:
    """Our own strength, about 8 times the paper's here."""
    return SHRINKAGE / run.data.steps(run.scenario.learn.epochs)


def _learned_strongly(run: Run) -> nn.Module:
    return _learned(run, strength=_strength(run))


class FirstOrderLearner(dspfx.GroupLearner):
    """Moves the logits by dR/dp at the present weights alone: the task has no say in the groups."""

    def _learn_groups(self, layers: Any, *_: Any) -> None:
        for name, layer in layers.items():
            soft = self._soft_assignment(layer).requires_grad_()
            energies = energy(filters_first(layer)).detach()
            (gradient,) = torch.autograd.grad(self.penalties[name](energies, soft), soft)
            inner = (gradient * soft).sum(0)
            layer.gate.logits.grad = (soft * (gradient - inner)).detach() / self.temperature
        self.logits_optimizer.step()
        self.logits_optimizer.zero_grad(set_to_none=True)


def _random(run: Run, groups: int = 4) -> nn.Module:
    """Groups at random, all of the same size."""
    prepared = _prepared(run, groups)
    for layer in gated_layers(prepared).values():
        count, filters = layer.gate.logits.shape
        layer.gate.assign(torch.randperm(filters, generator=run.generator) % count)
    return prepared


def _clustered(run: Run, groups: int = 4) -> nn.Module:
    prepared = _prepared(run, groups)
    dspfx.cluster_groups(prepared)
    return prepared


def _masked(
    prepared: nn.Module, macs: int, run: Run, prune: Callable[..., object] = dspfx.prune
) -> nn.Module:
    """A copy of `prepared` that `prune` has pruned."""
    pruned = copy.deepcopy(prepared)
    prune(pruned, dspfx.Budget(macs=macs / dense_macs(run.dense)[0], count="masks"))
    return pruned


_without_channels = functools.partial(_masked, prune=dspfx.prune_channels)


def _moments(prepared: nn.Module, run: Run) -> dict[str, Tensor]:
    return dspfx.input_moments(prepared, run.data.train_x[:1000].cpu().split(250))


def _without_channels_calibrated(prepared: nn.Module, macs: int, run: Run) -> nn.Module:
    """By what channels do to the inputs of layers, too."""
    prune = functools.partial(dspfx.prune_channels, moments=_moments(prepared, run))
    return _masked(prepared, macs, run, prune)


def _regrouped(prepared: nn.Module, macs: int, run: Run) -> nn.Module:
    """Groups are clustered in the present weights and inputs; no filters are dropped by them."""
    moments = _moments(prepared, run)

    def prune(pruned: nn.Module, budget: dspfx.Budget) -> None:
        dspfx.cluster_groups(pruned, moments=moments)
        dspfx.prune(pruned, budget, drop_filters=False)

    return _masked(prepared, macs, run, prune)


def _half_way(macs: int, run: Run) -> int:
    """The MACs that are half of the way to `macs`, by factors."""
    return math.isqrt(dense_macs(run.dense)[0] * macs)


def _channels_then_regrouped(prepared: nn.Module, macs: int, run: Run) -> nn.Module:
    narrow = _without_channels_calibrated(prepared, _half_way(macs, run), run)
    return _regrouped(narrow, macs, run)


def _narrow_and_clustered(prepared: nn.Module, macs: int, run: Run) -> nn.Module:
    narrow = _without_channels(prepared, _half_way(macs, run), run)
    dspfx.cluster_groups(narrow)
    return narrow


def _channels_then_groups(prepared: nn.Module, macs: int, run: Run) -> nn.Module:
    return _masked(_narrow_and_clustered(prepared, macs, run), macs, run)


def _channels_then_learned(prepared: nn.Module, macs: int, run: Run) -> nn.Module:
    """Learning starts from the clusters."""
    learned = _learn(_narrow_and_clustered(prepared, macs, run), run, strength=_strength(run))
    return _masked(learned, macs, run)


def _gradually(
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


def _by_the_loss(prepared: nn.Module, macs: int, run: Run, groups: bool = True) -> nn.Module:
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


def _dense(run: Run) -> nn.Module:
    return copy.deepcopy(run.dense)


@dataclass(frozen=True)
class Start:
    """What is done before the budget matters; `trains` says whether 8 epochs are spent on it."""

    make: Callable[[Run], nn.Module]
    trains: bool = False


STARTS = {
    "dense": Start(_dense),
    "sparse": Start(_sparse_learning, trains=True),
    "gated": Start(functools.partial(_prepared, groups=4)),
    "random": Start(_random),
    "clustered": Start(_clustered),
    "clustered-2": Start(functools.partial(_clustered, groups=2)),
    "first-order": Start(functools.partial(_learned, learner=FirstOrderLearner), trains=True),
    "learned-2": Start(functools.partial(_learned, groups=2), trains=True),
    "learned-4": Start(_learned, trains=True),
    "every-8": Start(functools.partial(_learned, logits_every=8), trains=True),
    "strong-4": Start(_learned_strongly, trains=True),
}

METHODS = {
    "channels, magnitude": Method("dense", _magnitude),
    "channels, magnitude, distilled": Method("dense", _magnitude, distil=True),
    "channels, sparse learning": Method("sparse", _group_norm),
    "channels, magnitude, higher rate": Method("dense", _magnitude, higher_rate=True),
    "channels, magnitude, higher rate, distilled": Method(
        "dense", _magnitude, higher_rate=True, distil=True
    ),
    "whole channels": Method("gated", _without_channels),
    "whole channels, gradually": Method(
        "gated", functools.partial(_gradually, groups=False), learns=True
    ),
    "channels and random groups, gradually": Method("random", _gradually, learns=True),
    "channels and groups, gradually": Method("clustered", _gradually, learns=True),
    "channels and 2 groups, gradually": Method("clustered-2", _gradually, learns=True),
    "channels and groups, gradually, distilled": Method(
        "clustered", functools.partial(_gradually, distil=True), learns=True, distil=True
    ),
    "whole channels, calibrated": Method("gated", _without_channels_calibrated),
    "channels, then clustered groups": Method("gated", _channels_then_groups),
    "channels, then clustered groups, calibrated": Method("gated", _channels_then_regrouped),
    "channels, then learned groups": Method("gated", _channels_then_learned, learns=True),
    "random groups": Method("random", _masked),
    "clustered groups": Method("clustered", _masked),
    "clustered groups, calibrated": Method("gated", _regrouped),
    "learned, first order": Method("first-order", _masked),
    "learned, 2 groups": Method("learned-2", _masked),
    "learned, 4 groups": Method("learned-4", _masked),
    "learned, 4 groups, regrouped": Method("learned-4", _regrouped),
    "learned, 4 groups, every 8th step": Method("every-8", _masked),
    "learned strongly, 4 groups": Method("strong-4", _masked),
    "learned, 4 groups, distilled": Method("learned-4", _masked, distil=True),
}
# of the time that the dense network is predicted to take, not of its MACs, a share remains
TIMED = {
    "whole channels, gradually, by time": Method(
        "gated", functools.partial(_gradually, groups=False, timed=True), learns=True
    ),
    "channels and groups, gradually, by time": Method(
        "clustered", functools.partial(_gradually, timed=True), learns=True
    ),
}
UNTRAINED = {
    f"{name}, untrained": dataclasses.replace(METHODS[name], tuned=False)
    for name in (
        "channels, magnitude",
        "whole channels",
        "whole channels, calibrated",
        "channels, then clustered groups, calibrated",
        "random groups",
        "clustered groups",
        "clustered groups, calibrated",
        "learned, 4 groups",
        "learned, 4 groups, regrouped",
    )
}
UNTRAINED |= {
    "whole channels, by the loss, untrained": Method(
        "gated", functools.partial(_by_the_loss, groups=False), tuned=False
    ),
    "channels and groups, by the loss, untrained": Method("clustered", _by_the_loss, tuned=False),
}
METHODS |= UNTRAINED | TIMED
