"""What is counted is what is there: costs as reported, as budgeted and as torch counts them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_properties import COUNT, EXAMPLES, inputs, prepare
from torch import Tensor, nn

import dspfx
from dspfx import Budget
from dspfx.errors import BudgetError
from dspfx.passes.lowering.cost_model import CPU
from helpers import assert_equal, macs, random_masks, randomise
from random_networks import MaskRecipe, mask_recipes, networks

FEWER = settings(EXAMPLES, max_examples=max(1, COUNT // 3))  # each of them prunes, or counts


def chain(conv: Callable[[int, int], nn.Module], dims: int, depth: int = 3) -> nn.Module:
    layers: list[nn.Module] = [(nn.Conv1d, nn.Conv2d)[dims - 1](3, 64, 1)]
    for _ in range(depth):
        layers += [nn.ReLU(), conv(64, 64)]
    return nn.Sequential(*layers)


GROUPED = {
    "convolutions": lambda: chain(lambda c, o: nn.Conv2d(c, o, 3, padding=1, groups=8), 2),
    "transposed": lambda: chain(lambda c, o: nn.ConvTranspose2d(c, o, 2, groups=32), 2),
    "1d": lambda: chain(lambda c, o: nn.Conv1d(c, o, 5, groups=4), 1),
}


def grouped(kind: str, groups: int) -> tuple[dspfx.PreparedModule, Tensor]:
    torch.manual_seed(0)
    model = GROUPED[kind]().double()
    x = torch.randn(2, 3, *[16] * (1 if kind == "1d" else 2), dtype=torch.float64)
    return dspfx.prepare(model, x, config=dspfx.PrepareConfig(groups=groups)), x


@pytest.mark.parametrize("cost_model", [CPU, dspfx.FEWEST_WEIGHTS])
@pytest.mark.parametrize("kind", GROUPED)
def test_layers_with_groups_never_grow(kind: str, cost_model: dspfx.CostModel) -> None:
    """Where channels go unevenly, groups are filled up, and are not taken for one dense layer."""
    for keep in (0.9, 0.5, 0.2):
        prepared, x = grouped(kind, 4)
        dspfx.set_masks(prepared, random_masks(prepared, keep=keep, drop=0.2))
        compact = dspfx.convert(prepared, cost_model=cost_model)
        found = dspfx.report(compact)
        assert macs(compact, x) == found.emitted.macs <= found.before.macs
        assert sum(p.numel() for p in compact.parameters()) == found.emitted.parameters
        for layer in found.layers:
            assert layer.emitted.macs <= layer.before.macs


@pytest.mark.parametrize("verb", [dspfx.prune, dspfx.prune_channels])
@pytest.mark.parametrize("kind", GROUPED)
def test_budgets_are_of_what_is_emitted(kind: str, verb: Any) -> None:
    prepared, x = grouped(kind, 4)
    found = verb(prepared, Budget(macs=0.5))
    compact = dspfx.convert(prepared)
    assert found.emitted == dspfx.report(compact).emitted == dspfx.report(prepared).emitted
    assert macs(compact, x) == found.emitted.macs
    assert found.achieved == found.emitted.macs / found.before.macs <= 0.5


@FEWER
@given(model=networks(), recipe=mask_recipes(), groups=st.integers(1, 4))
def test_what_is_reported_is_emitted(model: Any, recipe: MaskRecipe, groups: int) -> None:
    prepared = prepare(model, groups)
    if not isinstance(prepared, dspfx.PreparedModule):
        return  # of a model in parts, these alone are counted
    dspfx.set_masks(prepared, recipe.masks(prepared))
    compact = dspfx.convert(prepared, verify=False)
    found = dspfx.report(compact)
    assert dspfx.report(prepared).emitted == found.emitted
    assert macs(compact, inputs(model)) == found.emitted.macs
    assert found.emitted.macs <= found.before.macs
    assert found.emitted.parameters <= found.before.parameters


@FEWER
@given(
    model=networks(),
    verb=st.sampled_from([dspfx.prune, dspfx.prune_channels]),
    groups=st.integers(1, 4),
    kind=st.sampled_from(["macs", "params"]),
    fraction=st.floats(0.05, 1),
)
def test_budgets_hold_for_what_is_emitted(
    model: Any, verb: Any, groups: int, kind: str, fraction: float
) -> None:
    prepared = prepare(model, groups)
    if not isinstance(prepared, dspfx.PreparedModule):
        return  # of a model in parts, these alone are counted
    try:
        found = verb(prepared, Budget(**{kind: fraction}))
    except BudgetError:
        return
    compact = dspfx.convert(prepared, verify=False)
    left = dspfx.report(compact)
    assert left.emitted == found.emitted
    assert left.after == found.after
    assert macs(compact, inputs(model)) == found.emitted.macs
    of = "macs" if kind == "macs" else "parameters"
    assert getattr(left.emitted, of) <= fraction * getattr(left.before, of)
    assert found.achieved == getattr(left.emitted, of) / getattr(left.before, of)


def test_what_is_emitted_anyway_is_not_masked() -> None:
    """Layers this small are emitted dense: their groups read all that any of them reads."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU()),
        *(nn.Conv2d(24, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3)),
    )
    prepared = dspfx.prepare(model, torch.randn(2, 3, 12, 12))
    dspfx.cluster_groups(prepared)
    papers = copy.deepcopy(prepared)
    found = dspfx.prune(prepared, Budget(macs=0.5))
    assert found.after.macs == found.emitted.macs
    assert 0.45 < found.achieved <= 0.5
    by_masks = dspfx.prune(papers, Budget(macs=0.5, count="masks"))
    assert by_masks.after.macs <= 0.5 * by_masks.before.macs < by_masks.emitted.macs
    first = dspfx.get_masks(prepared)
    dspfx.prune(prepared, Budget(macs=0.3))
    assert not any((m & ~first[name]).any() for name, m in dspfx.get_masks(prepared).items())


def test_errors_of_budgets_name_the_layers_that_hold_the_rest() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))
    config = dspfx.PrepareConfig(ignore=("1",))
    for kind in ("macs", "params"):
        prepared = dspfx.prepare(model, torch.randn(2, 3, 8, 8), config=config)
        with pytest.raises(BudgetError, match=r"not gated hold \d+\.\d+%: 1 \(\d+"):
            dspfx.prune(prepared, Budget(**{kind: 0.1}))


class Shared(nn.Module):
    """One layer for two streams, perhaps each with a norm of its own after it."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(3, 12, 1) for _ in range(2))
        self.sides = nn.ModuleList(nn.Conv2d(12, 16, 1) for _ in range(2))
        self.shared = nn.Conv2d(16, 16, 3, bias=not norms)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) if norms else nn.ReLU() for _ in range(2))
        self.outs = nn.ModuleList(nn.Conv2d(16, 4, 1) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        streams = zip(self.stems, self.sides, self.norms, self.outs, strict=True)
        return [out(norm(self.shared(side(stem(x))))) for stem, side, norm, out in streams]


@pytest.mark.parametrize("norms", [False, True])
def test_a_layer_that_is_called_twice_is_not_emitted_as_more_than_it_was(norms: bool) -> None:
    torch.manual_seed(0)
    model = randomise(Shared(norms)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    prepared = dspfx.prepare(model, x)
    masks = dspfx.get_masks(prepared)
    masks["sides.0"][:4] = False
    masks["sides.1"][12:] = False
    dspfx.set_masks(prepared, {name: masks[name] for name in ("sides.0", "sides.1")})
    compact = dspfx.convert(prepared)
    found = dspfx.report(compact)
    assert found.emitted.parameters == sum(p.numel() for p in compact.parameters())
    assert found.emitted.parameters <= found.before.parameters
    assert macs(compact, x) == found.emitted.macs <= found.before.macs
    assert_equal(prepared(x), compact(x))
    assert_equal(prepared(x[:, :, :5]), compact(x[:, :, :5]))
