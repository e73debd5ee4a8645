"""Several processes that train one model: equal among themselves, and to one with all the data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data_parallel as work
import pytest
import torch
from launch import torchrun
from torch import Tensor, nn

import dspfx
from helpers import assert_equal

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes returned, by case."""
    folder = tmp_path_factory.mktemp("processes")
    torchrun(str(TESTS / "data_parallel.py"), str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def alone(build: Any = work.plain, make: Any = work.sgd) -> dict[str, Tensor]:
    """The state after the same steps in one process, on whole batches."""
    model = build()
    learner = work.learner_of(model, make)
    for x, y in zip(work.X, work.Y, strict=True):
        learner.step(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y))
    return work.state(model)


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert_same(value, b[name])
    elif isinstance(a, Sequence) and not isinstance(a, str):
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


def without(state: dict[str, Any], *words: str) -> dict[str, Any]:
    return {name: v for name, v in state.items() if not any(word in name for word in words)}


# -- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "build", "make"),
    [
        ("wrapped", work.plain, work.sgd),
        ("unwrapped", work.plain, work.sgd),
        ("adamw", work.plain, work.adamw),
        ("look_ahead_as_a_whole", work.plain, work.own_sgd),
        ("static_graph", work.plain, work.sgd),
        ("find_unused", work.plain, work.sgd),
        ("no_forward_sync", work.plain, work.sgd),
        ("micro_batches", work.plain, work.sgd),
        ("micro_batches_static_graph", work.plain, work.sgd),
        ("scaler", work.plain, work.sgd),
        ("own_backward", work.plain, work.sgd),
        ("compiled", work.plain, work.sgd),
        ("parts", work.in_parts, work.sgd),
    ],
)
def test_processes_are_equal_and_equal_to_one(
    outcomes: list[dict[str, Any]], case: str, build: Any, make: Any
) -> None:
    one, other = (without(outcome[case], "losses") for outcome in outcomes)
    assert_same(one, other)
    expected = alone(build, make)
    assert one.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-7, atol=1e-9)
    logits = [tensor for name, tensor in expected.items() if "logits" in name]
    assert all(tensor.any() for tensor in logits)  # they learned something


def test_losses_are_those_of_the_shares(outcomes: list[dict[str, Any]]) -> None:
    one, other = (outcome["wrapped"]["losses"] for outcome in outcomes)
    assert not torch.equal(one, other)
    model = work.plain()
    first = nn.functional.cross_entropy(model(work.X[0]), work.Y[0])
    torch.testing.assert_close((one[0] + other[0]) / 2, first.detach())


def test_batch_norms(outcomes: list[dict[str, Any]]) -> None:
    """Statistics are the process's own until the next forward, all else is equal."""
    one, other = (outcome["normed"] for outcome in outcomes)
    assert_same(without(one, "running", "losses"), without(other, "running", "losses"))
    assert not torch.equal(one["1.running_mean"], other["1.running_mean"])


def test_the_look_ahead_leaves_no_trace(outcomes: list[dict[str, Any]]) -> None:
    """Not in statistics that are broadcast, and not in gradients that lie in DDP's buckets."""
    for outcome in outcomes:
        learned, plain = outcome["normed_plain_loop"]
        assert_same(learned, plain)
        assert_same(*outcome["gradients_of_another_optimizer"])


def test_hooks_see_the_share(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        assert outcome["hooks"] == [("2", 4), ("whole", 4)] * 2


def test_processes_with_models_of_their_own(outcomes: list[dict[str, Any]]) -> None:
    (steps, mean), (steps_too, mean_too) = (outcome["each_its_own"] for outcome in outcomes)
    assert (steps, steps_too) == (1, 2)
    for rank, found in enumerate((mean, mean_too)):
        model = work.normed()
        dspfx.recalibrate(model, [work.X[0].chunk(2)[rank]])
        assert torch.equal(model.state_dict()["1.running_mean"], found)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("not_wrapped", "different gradients; compute the loss by calling the model"),
        ("never_synchronised", "let it synchronise in the last micro-batch"),
        ("different_weights", "different weights; wrap the model in DistributedDataParallel"),
    ],
)
def test_mistakes_are_found_by_all(outcomes: list[dict[str, Any]], case: str, words: str) -> None:
    for outcome in outcomes:
        assert words in outcome[case]


def test_a_bad_loss_of_one_process_stops_all(outcomes: list[dict[str, Any]]) -> None:
    (mine, after), (theirs, after_too) = (outcome["one_bad_loss"] for outcome in outcomes)
    for message in mine:
        assert "loss of one of the processes is not finite, here it is " in message
        assert "nan" not in message
    for message in theirs:
        assert "loss of one of the processes is not finite, here it is nan" in message
    assert_same(without(after, "losses"), without(after_too, "losses"))


def test_shards_are_refused(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes:
        weights, states = outcome["sharded"]
        assert "the weights are sharded" in weights
        assert "use the optimizer that it shards" in states


# -- the other verbs -------------------------------------------------------------------------------


def test_masks_groups_and_reports_are_equal(outcomes: list[dict[str, Any]]) -> None:
    one, other = (outcome["verbs"] for outcome in outcomes)
    assert_same(one, other)
    assert not all(mask.all() for mask in one["masks"].values())


def test_masks_that_one_process_has_set(outcomes: list[dict[str, Any]]) -> None:
    (masks, output), (masks_too, output_too) = (o["pruned_by_the_first"] for o in outcomes)
    assert not all(mask.all() for mask in masks.values())
    assert_same(masks, masks_too)
    assert torch.equal(output, output_too)


def test_all_prune_by_what_the_first_process_has_seen(outcomes: list[dict[str, Any]]) -> None:
    (masks, achieved), other = (outcome["gradually"] for outcome in outcomes)
    assert 0.3 < achieved <= 0.5
    assert_same([masks, achieved], list(other))


def test_the_first_process_measures(outcomes: list[dict[str, Any]]) -> None:
    one, other = (outcome["latency"] for outcome in outcomes)
    assert_same(one, other)
    assert one["measured"] == 0.5


def test_an_error_of_the_first_process_is_one_of_all(outcomes: list[dict[str, Any]]) -> None:
    budget = ("BudgetError", "no such budget")
    (mine, value), (theirs, value_too) = (outcome["the_first_fails"] for outcome in outcomes)
    assert value == value_too == 7
    assert mine == [budget, ("KeyError", "'a site'")]
    assert theirs == [budget, ("DspfxError", "the first process failed with KeyError: 'a site'")]


def test_statistics_are_those_of_all_shares(outcomes: list[dict[str, Any]]) -> None:
    model = work.normed()
    dspfx.recalibrate(model, [work.X.flatten(0, 1)])
    expected = without(work.state(model), "tracked")
    one, other = (outcome["recalibrated_by_unequal_shares"] for outcome in outcomes)
    assert_same(one, other)
    assert int(one["1.num_batches_tracked"]) == 4
    # the second norm sees what the first one makes of each batch
    for name in ("1.running_mean", "1.running_var"):
        assert_equal(expected[name], one[name], 1e-12)
    batches = work.normed()
    dspfx.recalibrate(batches, list(work.X.flatten(0, 1).split([5, 1, 10, 8])))
    for name, tensor in work.state(batches).items():
        assert_equal(tensor.double(), one[name].double(), 1e-12)


def test_layers_are_fitted_to_all_shares(outcomes: list[dict[str, Any]]) -> None:
    model = work.halved()
    done = dspfx.compensate(model, [work.X.flatten(0, 1)])
    assert done.after
    for case in ("compensated_by_unequal_shares", "compensated_by_one"):
        one, other = (outcome[case] for outcome in outcomes)
        assert_same(one, other)
        for name, tensor in work.state(model).items():
            assert_equal(tensor.double(), one[0][name].double(), 1e-9)
    _, before, after = outcomes[0]["compensated_by_unequal_shares"]
    assert before == pytest.approx(done.before)
    assert after == pytest.approx(done.after)
    _, (none, bad) = outcomes[0]["compensated_by_one"]
    assert "no batch" in none
    assert "not finite" in bad


def test_checkpoints(outcomes: list[dict[str, Any]]) -> None:
    """Random numbers go on where they were in the process that saved, and differ in the others."""
    one, other = (outcome["checkpoint"] for outcome in outcomes)
    assert_same(one["state"], other["state"])
    assert torch.equal(one["drawn"], one["again"])
    assert not torch.equal(one["again"], other["again"])
