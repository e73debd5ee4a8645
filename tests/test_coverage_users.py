"""The table of other libraries' models says what becomes of a model, whatever that is."""

import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.coverage_users import examine
from benchmarks.examination import examined, flops
from benchmarks.users.case import MODELS, UsersModel, images
from benchmarks.users_page import Outcome, document, read_page
from benchmarks.users_zoo import LIBRARIES, users_cases
from benchmarks.zoo import Case

CASE = Case("spandrel", "tests", "own")


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class Branches(Convs):
    """Whose code has no graph, though two of its children have."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        self.c = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.c(y if y.sum() > 0 else -y)


@pytest.fixture
def listed() -> Iterator[Callable[[type[nn.Module]], Case]]:
    def add(kind: type[nn.Module]) -> Case:
        MODELS[CASE] = UsersModel(kind, images(16, 24))
        return CASE

    yield add
    MODELS.pop(CASE, None)


def test_more_than_sixty_models_of_all_libraries_are_listed() -> None:
    cases = users_cases()
    assert len(cases) >= 60
    assert {case.library for case in cases} == set(LIBRARIES)


@pytest.mark.filterwarnings("ignore")
def test_a_model_goes_all_the_way(listed: Callable[[type[nn.Module]], Case]) -> None:
    outcome = examine(listed(Convs))
    assert outcome.status == "all the way", outcome.troubles
    assert outcome.asked == 0.5
    assert outcome.left == pytest.approx(0.5, abs=0.03)
    assert outcome.macs_share == outcome.parameters_share == outcome.known == 1
    assert outcome.equal <= 1e-9
    assert (outcome.prepared, outcome.trained, outcome.onnx) == (0, "yes", "any batch")
    assert "1 all the way" in document([outcome], "make coverage-users", 1)


@pytest.mark.filterwarnings("ignore")
def test_a_model_in_parts_is_said_to_be(listed: Callable[[type[nn.Module]], Case]) -> None:
    outcome = examine(listed(Branches))
    assert outcome.status == "in parts", outcome.troubles
    assert outcome.equal <= 1e-9


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_model_is_found_out(
    listed: Callable[[type[nn.Module]], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module, *_: object, **__: object) -> nn.Module:
        return nn.Sequential(model, nn.Threshold(0.1, 0.2)).eval()

    monkeypatch.setattr("dspfx.convert", wrong)
    outcome = examine(listed(Convs))
    assert outcome.status == "quietly wrong"
    assert "compact, size 1" in outcome.troubles
    assert "compact, size 2" in outcome.troubles


def _ends(case: Case) -> str:
    if case.name == "dies":
        os._exit(1)
    if case.name == "hangs":
        time.sleep(60)
    if case.name == "raises":
        raise ValueError("on purpose")
    return f"{case.name}: fine"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_models_that_hang_raise_or_die_hinder_no_other() -> None:
    cases = [Case("", "", name) for name in ("hangs", "dies", "raises", "works")]
    found = examined(cases, _ends, lambda case, why: f"{case.name}: {why}", workers=2, seconds=2)
    assert sorted(found) == [
        "dies: its process ended, for want of memory perhaps",
        "hangs: took more than 2 s",
        "raises: ValueError: on purpose",
        "works: fine",
    ]


def test_attention_and_recurrent_layers_are_counted() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.rand(1, 5, 8)
    total = sum(flops(attention, (x, x, x))["Global"].values()) / 2
    assert total == 4 * 5 * 8 * 8 + 2 * 5 * 5 * 8
    gates = 4 * (8 + 6) * 6
    assert sum(flops(nn.LSTM(8, 6), (x,))["Global"].values()) / 2 == 5 * gates


def test_a_page_says_why_a_model_does_not_go_all_the_way() -> None:
    outcome = Outcome(CASE, "raw error", {"prepare": "[raw error] KeyError: 'a | b'"})
    page = document([outcome], "make coverage-users", 95)
    assert "1 models, of 95 that are listed" in page
    assert "0 all the way, 0 partly frozen, 0 in parts, 0 refused, 1 raw error" in page
    assert r"KeyError: 'a \| b'" in page


def test_a_page_is_read_as_it_was_written() -> None:
    """So that a few of its rows can be written again."""
    other, third = Case("spandrel", "tests", "other"), Case("spandrel", "tests", "third")
    outcomes = [
        Outcome(CASE, "raw error", {"prepare": "[raw error] KeyError: 'a | b'"}, 123_456),
        Outcome(
            *(other, "in parts", {}, 20_000, 0.5, 0.25, 1.0, 0.5, 0.499, 3e-15, 0.0, "any batch"),
            *("yes", True, "prepared in parts, a, since b"),
        ),
        Outcome(third, "all the way", {}, 7_000_000, 1, 1, 1, 0.5, 0.5, 0.0, 0.0, "", "yes"),
    ]
    page = document(outcomes, "make coverage-users", 3)
    read = read_page(page)
    assert list(read) == [CASE, other, third]
    assert document(list(read.values()), "make coverage-users", 3) == page
