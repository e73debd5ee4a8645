"""The CIFAR ResNet, and the authors' networks that are loaded into it."""

import os
from pathlib import Path

import pytest
import torch
from torch import fx

import dspfx
from benchmarks.reference import DEFAULT_FOLDER, NOT_GATED, load
from dspfx.recipe.networks.cifar_resnet import CifarResNet
from helpers import assert_equal, macs

NAMES = ("resnet20_g2", "resnet20_g4", "resnet56_g2")
FOLDER = Path(os.environ.get("DSPFX_REFERENCE", DEFAULT_FOLDER))


@pytest.mark.parametrize(("depth", "parameters"), [(8, 78_042), (20, 272_474), (56, 855_770)])
def test_sizes(depth: int, parameters: int) -> None:
    model = CifarResNet(depth)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert fx.symbolic_trace(model)(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_inner_widths() -> None:
    model = CifarResNet(8, inner=(3, 5, 7), in_channels=1, classes=4)
    widths = [m.conv_a.out_channels for m in (model.stage_1[0], model.stage_2[0], model.stage_3[0])]
    assert widths == [3, 5, 7]
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 4)


def test_wrong_depths_and_widths() -> None:
    with pytest.raises(dspfx.DspfxError, match="6n \\+ 2 layers"):
        CifarResNet(9)
    with pytest.raises(dspfx.DspfxError, match="each of the 3 blocks"):
        CifarResNet(8, inner=(1, 2))


@pytest.mark.parametrize("name", NAMES)
def test_reference_networks(name: str) -> None:
    """Outputs equal the authors' packed program's, and so do the pruned MACs and parameters."""
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"the reference network {name} is not in {FOLDER}")
    reference = load(path)
    prepared = reference.prepared().eval()
    compact = dspfx.convert(prepared)
    x = reference.check_input
    with torch.no_grad():
        assert float((prepared(x) - reference.check_output).abs().max()) < 1e-4
        assert float((compact(x) - reference.check_output).abs().max()) < 1e-4
        assert_equal(prepared(x), compact(x), 1e-5)
    report = dspfx.report(compact)
    config = dspfx.PrepareConfig(groups=reference.groups, ignore=NOT_GATED)
    dense = dspfx.report(dspfx.prepare(reference.dense(), x, config=config)).gated_before
    pruned_macs = 100 * (1 - report.gated_after.macs / dense.macs)
    pruned_parameters = 100 * (1 - report.gated_after.parameters / dense.parameters)
    assert abs(pruned_macs - reference.pruned_macs_percent) < 0.01
    assert abs(pruned_parameters - reference.pruned_params_percent) < 0.01
    assert macs(compact, x) == report.emitted.macs
