"""Cycles: rates, budgets, which weights are the best, and runs that stop."""

import copy
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dspfx
from helpers import macs

STEPS = 3
X, Y = torch.randn(6, 2, 8, 8), torch.randint(3, (6,))


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16 * 16, 3)),
    )
    return dspfx.prepare(model, X, config=dspfx.PrepareConfig(groups=2)).train()


def make(budget: dspfx.Budget | None = None, **settings: Any) -> dspfx.CyclicFinetune:
    prepared = network()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1, momentum=0.9)
    return dspfx.CyclicFinetune(prepared, optimizer, budget, steps_per_epoch=STEPS, **settings)


def one_step(finetune: dspfx.CyclicFinetune) -> None:
    finetune.optimizer.zero_grad()
    nn.functional.cross_entropy(finetune.prepared(X), Y).backward()
    finetune.optimizer.step()
    finetune.step()


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def train(finetune: dspfx.CyclicFinetune, scores: Iterable[float | None]) -> list[dict]:
    """The weights at the end of each epoch."""
    ends, given = [], iter(scores)
    for _ in finetune:
        for _ in range(STEPS):
            one_step(finetune)
        finetune.end_epoch(next(given))
        ends.append(copies(finetune.prepared))
    return ends


def test_rates_follow_a_cosine_and_start_again() -> None:
    finetune = make(cycles=2, epochs=3)
    finetune.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0})
    finetune = dspfx.CyclicFinetune(
        finetune.prepared, finetune.optimizer, cycles=2, epochs=3, steps_per_epoch=STEPS
    )
    rates, momenta = [], []
    for _ in finetune:
        for _ in range(STEPS):
            rates.append([group["lr"] for group in finetune.optimizer.param_groups])
            momenta.append(len(finetune.optimizer.state))
            one_step(finetune)
        finetune.end_epoch()
    lengths = (2 * STEPS, STEPS)  # of the cycles
    expected = [
        (1 + math.cos(math.pi * s / length)) / 2 for length in lengths for s in range(length)
    ]
    assert [rate for rate, _ in rates] == pytest.approx([0.1 * e for e in expected])
    assert [rate for _, rate in rates] == pytest.approx(expected)
    assert [bool(count) for count in momenta] == [
        s > 0 for length in lengths for s in range(length)
    ]


def test_each_cycle_prunes_a_little_more() -> None:
    finetune = make(dspfx.Budget(macs=0.4), cycles=3, epochs=3, prune_more=0.1)
    whole, kept, asked = macs(network(), X), [], []
    for _ in finetune:
        asked.append(finetune.report.budget)
        kept.append(dspfx.report(finetune.prepared).after.macs / whole)
        one_step(finetune)
        finetune.end_epoch()
    assert asked == pytest.approx([0.6, 0.5, 0.4])
    assert kept == sorted(kept, reverse=True)
    assert all(k <= a for k, a in zip(kept, asked, strict=True))
    assert dspfx.report(finetune.prepared).after.macs / whole <= 0.4
    assert [done["cycle"] for done in finetune.history] == [0, 1, 2]


def test_a_cycle_starts_from_the_best_weights_and_the_last_one_counts() -> None:
    finetune = make(dspfx.Budget(macs=0.4), cycles=2, epochs=6, prune_more=0.2)
    starts = {}
    scores = iter([0.5, 0.9, 0.7, 0.3, 0.4, 0.2])  # the first cycle had the better ones
    ends = []
    for epoch in finetune:
        starts[epoch] = copies(finetune.prepared)
        for _ in range(STEPS):
            one_step(finetune)
        finetune.end_epoch(next(scores))
        ends.append(copies(finetune.prepared))
    weights = [name for name in ends[0] if name.endswith("weight")]
    assert all(torch.equal(starts[3][name], ends[1][name]) for name in weights)
    assert same(finetune.prepared.state_dict(), ends[4])
    assert (finetune.best_score, finetune.best_epoch) == (0.4, 4)
    assert [done["score"] for done in finetune.history] == [0.9, 0.4]


@pytest.mark.parametrize("budget", [None, dspfx.Budget(macs=0.5)])
def test_where_masks_stay_the_best_of_all_cycles_counts(budget: dspfx.Budget | None) -> None:
    finetune = make(budget, cycles=2, epochs=4, prune_more=0.0)
    ends = train(finetune, [0.5, 0.9, 0.7, 0.8])
    assert same(finetune.prepared.state_dict(), ends[1])
    assert finetune.best_score == 0.9


@pytest.mark.parametrize("budget", [None, dspfx.Budget(macs=1.0)])
def test_what_it_begins_with_counts_where_nothing_is_pruned(budget: dspfx.Budget | None) -> None:
    """The first epoch was always better."""
    finetune = make(budget, cycles=2, epochs=4, prune_more=0.0, initial_score=0.8)
    begun = copies(finetune.prepared)
    train(finetune, [0.5, 0.7, 0.6, 0.7])
    assert same(finetune.prepared.state_dict(), begun)
    assert (finetune.best_score, finetune.best_epoch) == (0.8, None)
    finetune = make(budget, cycles=2, epochs=4, prune_more=0.0, initial_score=0.8)
    ends = train(finetune, [0.5, 0.9, 0.6, 0.7])
    assert same(finetune.prepared.state_dict(), ends[1])


def test_what_is_left_is_fine_tuned_in_its_place() -> None:
    """A narrow model ends up where the masked one does, but for rounding."""
    whole, ends = network(), []
    whole.get_submodule("3").p = 0.0  # it would draw other numbers for fewer channels
    dspfx.prune(whole, dspfx.Budget(macs=0.4))
    for model in (copy.deepcopy(whole), dspfx.narrow(whole)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        finetune = dspfx.CyclicFinetune(model, optimizer, cycles=2, epochs=4, steps_per_epoch=STEPS)
        train(finetune, [0.5, 0.9, 0.7, 0.8])
        assert (finetune.best_score, finetune.best_epoch) == (0.9, 1)
        ends.append(model.eval()(X))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4)


def test_a_score_of_before_pruning_does_not_count() -> None:
    finetune = make(dspfx.Budget(macs=0.5), cycles=1, epochs=2, initial_score=0.9)
    ends = train(finetune, [0.5, 0.4])
    assert same(finetune.prepared.state_dict(), ends[0])
    with pytest.raises(dspfx.LearnError, match="initial_score must be finite"):
        make(cycles=1, epochs=1, initial_score=math.nan)


def test_without_scores_the_last_weights_count() -> None:
    finetune = make(dspfx.Budget(macs=0.5), cycles=2, epochs=4)
    ends = train(finetune, itertools.repeat(None))
    assert same(finetune.prepared.state_dict(), ends[-1])
    assert finetune.best_score is None


def test_an_epoch_without_a_score_does_not_replace_one_with() -> None:
    finetune = make(cycles=1, epochs=3)
    ends = train(finetune, [0.5, None, 0.4])
    assert same(finetune.prepared.state_dict(), ends[0])


def test_no_score_is_worse_than_nan() -> None:
    finetune = make(dspfx.Budget(macs=0.5), cycles=1, epochs=2)
    iterator = iter(finetune)
    next(iterator)
    begun = copies(finetune.prepared)
    for number in range(2):
        one_step(finetune)
        with pytest.warns(dspfx.DspfxWarning, match="collapsed: epoch . scored nan"):
            finetune.end_epoch(float("nan"))
        assert next(iterator, None) == (1 if number == 0 else None)
    assert same(finetune.prepared.state_dict(), begun)


def test_what_it_warns_of() -> None:
    finetune = make(cycles=1, epochs=3, reference=0.95)
    iterator = iter(finetune)
    next(iterator)
    finetune.end_epoch(0.8)
    next(iterator)
    masks = dspfx.get_masks(finetune.prepared)
    masks["4"][1:] = False
    dspfx.set_masks(finetune.prepared, masks)
    with pytest.warns(dspfx.DspfxWarning) as caught:
        finetune.end_epoch(0.1)
    (warning,) = caught
    assert warning.filename == __file__
    text = str(warning.message)
    assert "epoch 1 scored 0.1, the best with these masks is 0.8, whose weights are kept" in text
    assert "Lower the learning rate (0.1 at the start of a cycle)" in text
    assert "suspects: 4 (1 of 16 filters left)" in text
    next(iterator)
    finetune.best_score = 0.2
    with pytest.warns(dspfx.DspfxWarning, match=r"cycle 0 came to 0.2 at best, before .* 0.95"):
        finetune.end_epoch(0.2)


def test_negative_scores_do_not_collapse_by_themselves() -> None:
    finetune = make(cycles=1, epochs=3)
    train(finetune, [-2.0, -2.5, -1.0])  # losses, say; warnings would be errors here
    assert finetune.best_score == -1.0


class StoppedError(Exception):
    pass


def resumable(folder: Path, stop_after: int | None) -> dict[str, torch.Tensor]:
    """Train, with a checkpoint after every step, which is the only thing that a new call knows."""
    finetune = make(dspfx.Budget(macs=0.4), cycles=2, epochs=4, prune_more=0.1)
    run = {"model": finetune.prepared, "optimizer": finetune.optimizer, "finetune": finetune}
    path, first = folder / "run.pt", 0
    if path.exists():
        first = dspfx.load_checkpoint(path, **run)["step"]
    made = 0
    for epoch in finetune:
        for step in range(first, STEPS):
            one_step(finetune)
            if step == STEPS - 1:
                finetune.end_epoch([0.5, 0.4, 0.3, 0.2][epoch])
            dspfx.save_checkpoint(path, **run, step=(step + 1) % STEPS)
            made += 1
            if made == stop_after:
                raise StoppedError
        first = 0
    return copies(finetune.prepared)


def test_a_run_that_stops_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = resumable(tmp_path / "whole", None)
    for stop_after in (1, 2, 5):  # in the midst of epochs, between cycles, and at ends
        folder = tmp_path / str(stop_after)
        while True:
            try:
                parts = resumable(folder, stop_after)
                break
            except StoppedError:
                pass
        assert parts.keys() == whole.keys()
        assert same(parts, whole)


def test_states_of_others_are_refused() -> None:
    finetune = make(dspfx.Budget(macs=0.5), cycles=1, epochs=2)
    train(finetune, [0.1, 0.2])
    state = finetune.state_dict()
    for other, message in (
        (make(dspfx.Budget(macs=0.5), cycles=2, epochs=2), "saved with cycles=1"),
        (make(dspfx.Budget(macs=0.6), cycles=1, epochs=2), "saved with budget="),
    ):
        before = other.state_dict()
        with pytest.raises(dspfx.LearnError, match=message):
            other.load_state_dict(state)
        assert other.state_dict() == before
    fresh = make(dspfx.Budget(macs=0.5), cycles=1, epochs=2)
    with pytest.raises(dspfx.LearnError, match="another model"):
        fresh.load_state_dict({**state, "best": {"weight": torch.zeros(1)}})
    with pytest.raises(dspfx.LearnError, match="no state of a CyclicFinetune"):
        fresh.load_state_dict({"weight": torch.zeros(1)})
    assert fresh.epoch == 0


def test_wrong_use() -> None:
    for settings in (
        {"cycles": 3, "epochs": 2},
        {"cycles": 0, "epochs": 2},
        {"cycles": 1, "epochs": 1, "prune_more": -0.1},
        {"cycles": 1, "epochs": 1, "collapse": 0.0},
    ):
        with pytest.raises(dspfx.LearnError):
            make(**settings)
    finetune = make(cycles=1, epochs=2)
    for call in (finetune.step, finetune.end_epoch):
        with pytest.raises(dspfx.LearnError, match="no cycle has begun"):
            call()
    iterator = iter(finetune)
    next(iterator)
    for _ in range(STEPS):
        finetune.step()
    with pytest.raises(dspfx.LearnError, match="more than 3 steps"):
        finetune.step()
    with pytest.raises(dspfx.LearnError, match="call end_epoch"):
        next(iterator)
    with pytest.raises(dspfx.ConvertError):
        dspfx.CyclicFinetune(
            nn.Linear(2, 2),
            finetune.optimizer,
            dspfx.Budget(macs=0.5),
            cycles=1,
            epochs=1,
            steps_per_epoch=1,
        )


def test_a_budget_out_of_reach_changes_nothing() -> None:
    finetune = make(dspfx.Budget(macs=1e-4), cycles=1, epochs=1)
    before = copies(finetune.prepared)
    with pytest.raises(dspfx.BudgetError):
        next(iter(finetune))
    assert same(finetune.prepared.state_dict(), before)


def test_a_budget_of_the_last_cycle_out_of_reach_is_refused_in_the_first() -> None:
    finetune = make(dspfx.Budget(macs=0.05), cycles=3, epochs=6, prune_more=0.3)
    before = copies(finetune.prepared)
    with pytest.raises(dspfx.BudgetError, match="cannot be reached"):
        next(iter(finetune))
    assert same(before, copies(finetune.prepared))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_optimizers_with_other_states(optimizer: type[torch.optim.Optimizer]) -> None:
    prepared = network()
    finetune = dspfx.CyclicFinetune(
        prepared,
        optimizer(prepared.parameters(), lr=1e-3),
        dspfx.Budget(macs=0.5),
        cycles=2,
        epochs=2,
        steps_per_epoch=STEPS,
    )
    ends = train(finetune, [0.1, 0.2])
    assert same(finetune.prepared.state_dict(), ends[1])


def test_an_epoch_ends_once() -> None:
    """The next one was left out."""
    finetune = make(cycles=1, epochs=3)
    seen = []
    for epoch in finetune:
        seen.append(epoch)
        finetune.end_epoch(0.5)
        with pytest.raises(dspfx.LearnError, match="this epoch has ended"):
            finetune.end_epoch(0.5)
    assert seen == [0, 1, 2]


def test_optimizers_that_cannot_train_the_model_are_refused() -> None:
    prepared = network()
    annealed = torch.optim.SGD(prepared.parameters(), lr=0.0)
    foreign = torch.optim.SGD(network().parameters(), lr=0.1)
    for optimizer, words in ((annealed, "are zero"), (foreign, "no weight of this model")):
        with pytest.raises(dspfx.LearnError, match=words):
            dspfx.CyclicFinetune(prepared, optimizer, epochs=5, steps_per_epoch=1)


def test_parameter_groups_that_are_added_on_the_way_are_refused() -> None:
    finetune = make(cycles=1, epochs=2)
    next(iter(finetune))
    finetune.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(dspfx.LearnError, match="other parameter groups"):
        finetune.step()


@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_run_goes_on_with_or_without_a_wrapper(compiled_first: bool) -> None:
    """The best weights were under the names of the wrapper."""

    def wrapped(wrap: bool) -> dspfx.CyclicFinetune:
        prepared = network()
        optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
        model = torch.compile(prepared, backend="eager") if wrap else prepared
        return dspfx.CyclicFinetune(model, optimizer, epochs=5, steps_per_epoch=STEPS)

    first, second = wrapped(compiled_first), wrapped(not compiled_first)
    next(iter(first))
    first.end_epoch(0.5)
    second.load_state_dict(first.state_dict())
    second.restore_best()
    assert second.best_score == 0.5
