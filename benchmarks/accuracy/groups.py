"""Prepared networks, with groups that are learned, clustered or random."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import dspfx
from benchmarks.accuracy.protocol import noise, train
from benchmarks.accuracy.scenarios import IMAGE
from benchmarks.accuracy.setting import Run
from dspfx.layers.gated import gated_layers
from dspfx.layers.weights import energy, filters_first
from dspfx.training.groups.assignment import soft_assignment

# strength times steps of our own setting: the longer the penalty acts, the weaker it may be
SHRINKAGE = 19.0


def prepared_for(run: Run, groups: int) -> nn.Module:
    """The dense network with gates, each layer with at most `groups` groups."""
    config = dspfx.PrepareConfig(groups=groups)
    return dspfx.prepare(run.dense, IMAGE.repeat(2, 1, 1, 1), config=config)


def learn_groups(
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


def with_learned_groups(run: Run, groups: int = 4, **settings: Any) -> nn.Module:
    """A prepared network whose groups were learned for 8 epochs; `settings` are the learner's."""
    return learn_groups(prepared_for(run, groups), run, **settings)


def strength_of(run: Run) -> float:
    """Our own strength, about 8 times the paper's here."""
    return SHRINKAGE / run.data.steps(run.scenario.learn.epochs)


def with_strongly_learned_groups(run: Run) -> nn.Module:
    """Learned with our own strength, not the paper's."""
    return with_learned_groups(run, strength=strength_of(run))


class FirstOrderLearner(dspfx.GroupLearner):
    """Moves the logits by dR/dp at the present weights alone: the task has no say in the groups."""

    def _learn_groups(self, layers: Any, *_: Any) -> None:
        for name, layer in layers.items():
            soft = soft_assignment(layer.gate, self.temperature, self.generator).requires_grad_()
            energies = energy(filters_first(layer)).detach()
            (gradient,) = torch.autograd.grad(self.penalties[name](energies, soft), soft)
            inner = (gradient * soft).sum(0)
            layer.gate.logits.grad = (soft * (gradient - inner)).detach() / self.temperature
        self.logits_optimizer.step()
        self.logits_optimizer.zero_grad(set_to_none=True)


def with_random_groups(run: Run, groups: int = 4) -> nn.Module:
    """Groups at random, all of the same size."""
    prepared = prepared_for(run, groups)
    for layer in gated_layers(prepared).values():
        count, filters = layer.gate.logits.shape
        layer.gate.assign(torch.randperm(filters, generator=run.generator) % count)
    return prepared


def with_clustered_groups(run: Run, groups: int = 4) -> nn.Module:
    """A prepared network whose groups were clustered by the weights alone."""
    prepared = prepared_for(run, groups)
    dspfx.cluster_groups(prepared)
    return prepared
