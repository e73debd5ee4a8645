"""The ways to prune that are compared: from the weights of a trained network to a smaller one.

Every method gets the same dense weights and the same number of epochs, and must leave at most the
same multiply-accumulates. What trains before it prunes does so for 8 epochs and is fine-tuned for
5 + 5; what does not is fine-tuned for 8 + 5 + 5.
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

import dspfx
from benchmarks.accuracy import groups, pruning, torch_pruning_channels
from benchmarks.accuracy.protocol import cross_entropy, distilled, train
from benchmarks.accuracy.setting import Run
from dspfx.training.narrow.narrow import NARROW


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


def _dense(run: Run) -> nn.Module:
    return copy.deepcopy(run.dense)


@dataclass(frozen=True)
class Start:
    """What is done before the budget matters; `trains` says whether 8 epochs are spent on it."""

    make: Callable[[Run], nn.Module]
    trains: bool = False


STARTS = {
    "dense": Start(_dense),
    "sparse": Start(torch_pruning_channels.sparse_learning, trains=True),
    "gated": Start(functools.partial(groups.prepared_for, groups=4)),
    "random": Start(groups.with_random_groups),
    "clustered": Start(groups.with_clustered_groups),
    "clustered-1": Start(functools.partial(groups.with_clustered_groups, groups=1)),
    "clustered-2": Start(functools.partial(groups.with_clustered_groups, groups=2)),
    "first-order": Start(
        functools.partial(groups.with_learned_groups, learner=groups.FirstOrderLearner), trains=True
    ),
    "learned-2": Start(functools.partial(groups.with_learned_groups, groups=2), trains=True),
    "learned-4": Start(groups.with_learned_groups, trains=True),
    "every-8": Start(functools.partial(groups.with_learned_groups, logits_every=8), trains=True),
    "strong-4": Start(groups.with_strongly_learned_groups, trains=True),
}

METHODS = {
    "channels, magnitude": Method("dense", torch_pruning_channels.by_magnitude),
    "channels, magnitude, distilled": Method(
        "dense", torch_pruning_channels.by_magnitude, distil=True
    ),
    "channels, sparse learning": Method("sparse", torch_pruning_channels.by_group_norm),
    "channels, magnitude, higher rate": Method(
        "dense", torch_pruning_channels.by_magnitude, higher_rate=True
    ),
    "channels, magnitude, higher rate, distilled": Method(
        "dense", torch_pruning_channels.by_magnitude, higher_rate=True, distil=True
    ),
    "whole channels": Method("gated", pruning.without_channels),
    "whole channels, gradually": Method(
        "gated", functools.partial(pruning.gradually, groups=False), learns=True
    ),
    "channels and random groups, gradually": Method("random", pruning.gradually, learns=True),
    "channels and groups, gradually": Method("clustered", pruning.gradually, learns=True),
    "channels and own inputs, gradually": Method("clustered-1", pruning.gradually, learns=True),
    "channels and 2 groups, gradually": Method("clustered-2", pruning.gradually, learns=True),
    "channels and groups, gradually, distilled": Method(
        "clustered", functools.partial(pruning.gradually, distil=True), learns=True, distil=True
    ),
    "whole channels, calibrated": Method("gated", pruning.without_channels_calibrated),
    "channels, then clustered groups": Method("gated", pruning.channels_then_groups),
    "channels, then clustered groups, calibrated": Method("gated", pruning.channels_then_regrouped),
    "channels, then learned groups": Method("gated", pruning.channels_then_learned, learns=True),
    "random groups": Method("random", pruning.masked),
    "clustered groups": Method("clustered", pruning.masked),
    "clustered groups, calibrated": Method("gated", pruning.regrouped),
    "learned, first order": Method("first-order", pruning.masked),
    "learned, 2 groups": Method("learned-2", pruning.masked),
    "learned, 4 groups": Method("learned-4", pruning.masked),
    "learned, 4 groups, regrouped": Method("learned-4", pruning.regrouped),
    "learned, 4 groups, every 8th step": Method("every-8", pruning.masked),
    "learned strongly, 4 groups": Method("strong-4", pruning.masked),
    "learned, 4 groups, distilled": Method("learned-4", pruning.masked, distil=True),
}
# of the time that the dense network is predicted to take, not of its MACs, a share remains
TIMED = {
    "whole channels, gradually, by time": Method(
        "gated", functools.partial(pruning.gradually, groups=False, timed=True), learns=True
    ),
    "channels and groups, gradually, by time": Method(
        "clustered", functools.partial(pruning.gradually, timed=True), learns=True
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
        "gated", functools.partial(pruning.by_the_loss, groups=False), tuned=False
    ),
    "channels and groups, by the loss, untrained": Method(
        "clustered", pruning.by_the_loss, tuned=False
    ),
}
METHODS |= UNTRAINED | TIMED
