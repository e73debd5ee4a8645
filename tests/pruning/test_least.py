"""What can go at most: what budgets say, too, and why the rest stays."""

import copy
import re

import pytest
import torch
import torchvision
from torch import nn

import dspfx
from dspfx.passes.analysis.cost import Cost
from dspfx.pruning.least import LAST_CHANNEL, prunable
from helpers import randomise


@pytest.fixture(scope="module")
def mobile() -> nn.Module:
    model = randomise(torchvision.models.mobilenet_v2(weights=None, num_classes=10)).eval()
    return dspfx.prepare(model, torch.zeros(2, 3, 64, 64))


def test_it_is_what_a_budget_can_come_to(mobile: nn.Module) -> None:
    found = prunable(mobile)
    assert found.before == dspfx.report(mobile).before == dspfx.report(mobile).after
    with pytest.raises(dspfx.BudgetError) as refused:
        dspfx.prune_channels(mobile, dspfx.Budget(macs=1e-9, count="masks"))
    least = re.search(r"([\d.]+)% remains", str(refused.value))
    assert least is not None
    assert least[1] == f"{100 * found.channels.macs / found.before.macs:.2f}"
    assert found.groups.macs <= found.channels.macs
    trial = copy.deepcopy(mobile)
    share = found.channels.macs / found.before.macs
    dspfx.prune_channels(trial, dspfx.Budget(macs=share * 1.0001, count="masks"))
    assert dspfx.report(trial).after == found.channels
    assert dspfx.report(mobile).after == found.before  # it was a copy


def test_why_the_rest_stays() -> None:
    """The stem reads the images, a softmax all channels, and a layer is to be ignored."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.body = nn.Conv2d(8, 8, 3, padding=1)
            self.alone = nn.Conv2d(8, 6, 3, padding=1)
            self.head = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(torch.relu(self.stem(x))).softmax(1)
            return self.head(torch.relu(self.alone(x)).mean((2, 3)))

    config = dspfx.PrepareConfig(ignore=("alone",))
    prepared = dspfx.prepare(Mixed(), torch.zeros(2, 3, 4, 4), config=config)
    found = prunable(prepared)
    per_layer = {"stem": 3 * 9 * 16, "body": 8 * 9 * 16, "alone": 8 * 6 * 9 * 16, "head": 6 * 4}
    held = {holder.layers: holder for holder in found.holders}
    assert set(held) == {("stem",), ("body",), ("alone",), ("head",)}
    assert held["alone",].reason == "it is to be ignored"
    assert held["stem",].reason == "it reads the model's inputs"
    assert held["head",].reason == "it is the last linear layer"
    assert found.channels.macs == sum(per_layer.values())  # of the stem one filter, to the body
    shares = [holder.macs for holder in found.holders]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(found.channels.macs / found.before.macs)
    assert str(found).startswith(f"{1 - found.channels.macs / found.before.macs:.1%} of the MACs, ")
    assert f"{held['alone',].macs:.1%} in alone: it is to be ignored" in str(found)
    assert found.to_dict()["before"] == {"macs": found.before.macs, "parameters": 1_274}


def test_the_last_channel_is_a_reason() -> None:
    layers = [nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1)]
    prepared = dspfx.prepare(nn.Sequential(*layers), torch.zeros(2, 1, 2, 2))
    found = prunable(prepared)
    assert LAST_CHANNEL in {holder.reason for holder in found.holders}
    assert found.channels == found.groups == Cost(3 * 4, 3 + 3)
