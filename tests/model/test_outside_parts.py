"""What models in parts multiply outside of their parts is counted, in budgets and in reports."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dspfx
from dspfx.storage.container import Archive, read, write
from helpers import assert_equal, randomise


class Around(nn.Module):
    """Goes on only where its input is bright; its own code multiplies, or does not."""

    def __init__(self, own: str) -> None:
        super().__init__()
        self.own = own
        self.body = nn.Sequential(
            *(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        )
        self.table = nn.Parameter(torch.eye(8))

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() < 0:
            return x
        y: Tensor = self.body(x)
        match self.own:
            case "product":
                y = y @ self.table
            case "convolution":
                y = nn.functional.conv1d(y[:, None], self.table[:1, None, :3]).flatten(1)
        return self.body(y) if self.own == "nothing" else y


@pytest.mark.parametrize(("own", "macs"), [("product", 64), ("convolution", 18), ("nothing", 0)])
def test_macs_outside_of_parts_are_told(own: str, macs: int) -> None:
    model, x = randomise(Around(own)).eval(), torch.randn(2, 8)
    with FlopCounterMode(display=False) as counter:
        model(x)
    times = 2 if own == "nothing" else 1
    assert counter.get_total_flops() == 2 * 2 * (times * 512 + macs)
    prepared = dspfx.prepare(model, x)
    assert isinstance(prepared.body, dspfx.PreparedModule)
    assert not prepared.body._forward_hooks
    assert not prepared.body._forward_pre_hooks
    said = " ".join(str(dspfx.report(prepared)).split())
    share = f"{macs / (512 + macs):.1%}"
    told = f"outside of the parts are {macs} multiply-accumulates for a sample, {share} of all"
    assert (told in said) == (macs > 0)
    assert ("outside of the parts" in said) == (macs > 0)
    report = dspfx.report(prepared)
    assert report.before.macs == report.after.macs == report.emitted.macs == 512 + macs
    assert dspfx.report(dspfx.convert(prepared)).emitted.macs == 512 + macs


class Mixed(nn.Module):
    """Half of its products are in its own code, of single layers and of none."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
        )
        self.other = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
        self.table = nn.Parameter(torch.randn(16, 40))

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() < 0:
            return x
        y = self.body(x) @ self.table
        return self.other(nn.functional.linear(y.relu(), self.table).relu())


def flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("kept", [0.9, 0.7, 0.5])
def test_budgets_are_of_the_whole_model_in_parts(kept: float) -> None:
    model, x = randomise(Mixed()).eval(), torch.randn(3, 16)
    dense = flops(model, x)
    for prune in (dspfx.prune_channels, dspfx.prune):
        prepared = dspfx.prepare(model, x)
        report = prune(prepared, dspfx.Budget(macs=kept))
        assert report.before.macs * 2 * len(x) == dense
        left = flops(dspfx.convert(prepared), x) / dense
        assert left == pytest.approx(report.achieved, abs=1e-9)
        assert kept - 0.02 < left <= kept


def test_gradual_pruning_counts_the_code_around_the_parts() -> None:
    model, x = randomise(Mixed()), torch.randn(3, 16)
    prepared = dspfx.prepare(model, x).train()
    pruning = dspfx.GradualPruning(prepared, dspfx.Budget(macs=0.5), total_steps=6)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-4)
    for _ in range(6):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        pruning.step()
        optimizer.step()
    left = flops(dspfx.convert(prepared), x) / flops(model, x)
    assert 0.48 < left <= 0.5


def test_a_budget_below_what_is_around_the_parts_says_so() -> None:
    prepared = dspfx.prepare(randomise(Mixed()).eval(), torch.randn(3, 16))
    with pytest.raises(dspfx.BudgetError, match=r"the code around the parts \(\d\d\.\d\d%\)"):
        dspfx.prune_channels(prepared, dspfx.Budget(macs=0.1))


def test_what_is_counted_around_the_parts_is_saved_and_not_of_older_files(tmp_path: Path) -> None:
    model, x = randomise(Mixed()).eval(), torch.randn(3, 16)
    prepared = dspfx.prepare(model, x)
    whole = dspfx.report(prepared).before.macs
    assert dspfx.report(copy.deepcopy(prepared)).before.macs == whole
    dspfx.prune_channels(prepared, dspfx.Budget(macs=0.7))
    for number, saved in enumerate((prepared, dspfx.convert(prepared))):
        path = tmp_path / f"{number}.safetensors"
        dspfx.save(saved, path)
        loaded = dspfx.load(path, Mixed())
        assert dspfx.report(loaded).before.macs == whole
        assert_equal(saved(x), loaded(x), tolerance=0)
    archive = read(tmp_path / "0.safetensors", 2**24)
    plan = json.loads(json.dumps(archive.plan))
    for part in plan["parts"]:
        del part["outside"], part["tracing"]
        plan["settings"][part["name"]].pop("outside", None)
    write(tmp_path / "older.safetensors", Archive(plan, archive.tensors))
    older = dspfx.load(tmp_path / "older.safetensors", Mixed())
    assert_equal(prepared(x), older(x), tolerance=0)
    products = 2 * 16 * 40
    assert dspfx.report(older).before.macs == whole - products
