"""Scores of one's own, what layers keep at least, and widths of layers with groups of their own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx import Budget
from dspfx.errors import BudgetError, DataError
from dspfx.layers.gated import gated_layers
from helpers import assert_equal

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def prepared_chain(**settings: Any) -> dspfx.PreparedModule:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU()),
        *(nn.Conv2d(12, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)),
    )
    config = dspfx.PrepareConfig(**settings)
    prepared: dspfx.PreparedModule = dspfx.prepare(model.double(), X, config=config)
    return prepared


def alive(prepared: nn.Module, name: str) -> Tensor:
    return gated_layers(prepared)[name].gate.alive


@pytest.mark.parametrize("verb", [dspfx.prune, dspfx.prune_channels])
@pytest.mark.parametrize("of_filters", [True, False])
def test_scores_decide_what_goes(verb: Any, of_filters: bool) -> None:
    """Of the layer that writes and the one that reads: whatever the weights are, the first stay."""
    prepared = prepared_chain(groups=1)
    layers = gated_layers(prepared)
    with torch.no_grad():
        layers["2"].weight[8:].mul_(100)
        layers["4"].weight[:, 4:].mul_(100)
    rank = torch.arange(12, 0, -1).double()
    scores = {"2": rank if of_filters else rank[:, None].expand(12, 16)}
    scores["4"] = rank.reshape(2, 1, 6).expand(2, 4, 6).reshape(8, 6)
    verb(prepared, Budget(macs=0.5), scores=scores)
    kept = alive(prepared, "2").nonzero().flatten().tolist()
    if verb is dspfx.prune_channels:
        assert kept == list(range(len(kept)))
        assert 0 < len(kept) < 12
    else:  # each of the two groups of the layer after it reads its own best
        masks = dspfx.get_masks(prepared)["4"]
        for own in (masks[:4], masks[4:]):
            read = own.any(0).nonzero().flatten().tolist()
            assert read == list(range(len(read)))
    assert_equal(prepared(X), dspfx.convert(prepared)(X))


def test_scores_of_zero_go_first_but_not_unasked() -> None:
    prepared = prepared_chain()
    scores = {"2": torch.zeros(12, 16)}
    assert dspfx.prune(prepared, Budget(macs=1.0), scores=scores).achieved == 1.0


@pytest.mark.parametrize(("verb", "fraction"), [(dspfx.prune, 0.7), (dspfx.prune_channels, 0.87)])
def test_layers_keep_at_least_what_is_said(verb: Any, fraction: float) -> None:
    free, capped = prepared_chain(), prepared_chain()
    shares = {"2": 0.9, "[46]": 0.25}
    with pytest.raises(BudgetError, match="keep_at_least"):
        verb(capped, Budget(macs=0.3), keep_at_least=shares)
    verb(free, Budget(macs=0.3))
    assert int(dspfx.get_masks(free)["2"].sum(1).max()) < 15
    verb(capped, Budget(macs=fraction), keep_at_least=shares)
    read = dspfx.get_masks(capped)["2"]
    assert all(int(row.sum()) >= 15 for row in read[read.any(1)])
    for name, mask in dspfx.get_masks(capped).items():
        groups = mask.reshape(2, -1, mask.shape[1]) if name == "4" else mask[None]
        least = {"2": 0.9, "4": 0.25, "6": 0.25}[name]
        for own in groups:
            assert int(own.any(0).sum()) >= least * mask.shape[1]


@pytest.mark.parametrize(
    ("said", "error", "what"),
    [
        ({"scores": {"0.conv": torch.ones(2)}}, DataError, "no gated layer"),
        ({"scores": {"2": torch.ones(16)}}, DataError, r"\(12, 16\)"),
        ({"scores": {"2": -torch.ones(12)}}, DataError, "negative"),
        ({"scores": {"2": torch.full((12, 16), torch.nan)}}, DataError, "finite"),
        ({"scores": [torch.ones(12)]}, DataError, "dict"),
        ({"keep_at_least": 1.5}, BudgetError, "fractions"),
        ({"keep_at_least": {"layer*": 0.5}}, BudgetError, "matches no gated layer"),
    ],
)
def test_scores_and_shares_that_fit_no_layer(
    said: dict[str, Any], error: type[Exception], what: str
) -> None:
    prepared = prepared_chain()
    for verb in (dspfx.prune, dspfx.prune_channels):
        with pytest.raises(error, match=what):
            verb(prepared, Budget(macs=0.5), **said)
    assert all(mask.all() for mask in dspfx.get_masks(prepared).values())


@pytest.mark.parametrize("verb", [dspfx.prune, dspfx.prune_channels])
@pytest.mark.parametrize(("groups", "round_to"), [(4, 8), (2, 4)])
def test_filters_of_layers_with_groups_are_as_many_as_reported(
    verb: Any, groups: int, round_to: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 128, 1, groups=groups), nn.ReLU()),
        *(nn.Conv2d(128, 64, 1), nn.ReLU(), nn.Conv2d(64, 8, 1)),
    ).double()
    config = dspfx.PrepareConfig(groups=1, round_to=round_to)
    prepared = dspfx.prepare(model, X, config=config)
    verb(prepared, Budget(macs=0.6))
    compact = dspfx.convert(prepared)
    for layer in dspfx.report(compact).layers:
        emitted: Any = compact.get_submodule(layer.name)
        convs = [m for m in emitted.modules() if isinstance(m, nn.Conv2d)]
        assert sum(conv.out_channels for conv in convs) == layer.filters[1]
        assert layer.filters[1] % round_to == 0
    assert_equal(prepared(X), compact(X))
