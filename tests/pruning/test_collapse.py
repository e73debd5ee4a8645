"""Layers that are nearly closed are found, and `prune` says so."""

import torch
from torch import nn

import dspfx
from dspfx.layers.gated import gated_layers
from dspfx.pruning.weak_layers import MOST_NAMES, in_words, suspects, weak_layers_of
from dspfx.recipe.networks.cifar_resnet import CifarResNet


def network() -> nn.Module:
    torch.manual_seed(0)
    return dspfx.prepare(CifarResNet(8), torch.randn(2, 3, 16, 16))


def test_nothing_is_weak_before_pruning_or_after_a_little() -> None:
    prepared = network()
    assert weak_layers_of(prepared) == []
    report = dspfx.prune(prepared, dspfx.Budget(macs=0.5))
    assert report.warnings == ()
    assert "warning" not in str(report)
    assert suspects(prepared) == []


def test_each_kind_of_weakness() -> None:
    prepared = network()
    masks = dspfx.get_masks(prepared)
    masks["stage_1.0.conv_b"][:] = False
    masks["stage_2.0.conv_b"][1:] = False
    masks["stage_3.0.conv_a"][:] = False
    masks["stage_3.0.conv_a"][:, 5] = True
    dspfx.set_masks(prepared, masks)
    weak = {layer.name: layer for layer in weak_layers_of(prepared)}
    # conv_a of a branch that writes nothing has no reader
    assert weak.keys() == {
        *("stage_1.0.conv_a", "stage_1.0.conv_b", "stage_2.0.conv_b", "stage_3.0.conv_a")
    }
    assert weak["stage_1.0.conv_b"].kept == 0
    assert "writes nothing" in str(weak["stage_1.0.conv_b"])
    assert str(weak["stage_2.0.conv_b"]) == "stage_2.0.conv_b (1 of 32 filters left)"
    assert str(weak["stage_3.0.conv_a"]) == "stage_3.0.conv_a (reads 1 of 32 channels)"
    (warning,) = in_words(list(weak.values()))
    assert warning.startswith("4 layers are nearly closed: stage_1.0.conv_a (no filter is left")
    assert "PrepareConfig(ignore=...)" in warning


def test_the_report_of_prune() -> None:
    prepared = network()
    with torch.no_grad():  # nearly all the energy is in one filter
        prepared.stage_1[0].conv_b.weight[1:] *= 1e-3
    report = dspfx.prune(prepared, dspfx.Budget(macs=0.8))
    (warning,) = report.warnings
    assert "stage_1.0.conv_b (1 of 16 filters left)" in warning
    assert str(report).splitlines()[-1] == f"warning: {warning}"


def test_many_names_are_cut_and_odd_weights_are_named() -> None:
    prepared = network()
    masks = {name: torch.zeros_like(mask) for name, mask in dspfx.get_masks(prepared).items()}
    dspfx.set_masks(prepared, masks)
    (warning,) = in_words(weak_layers_of(prepared))
    assert warning.count("(no filter is left") == MOST_NAMES
    assert f"and {len(masks) - MOST_NAMES} more" in warning
    with torch.no_grad():
        gated_layers(prepared)["stage_2.0.conv_a"].weight[0] = torch.nan
    assert suspects(prepared)[0] == "stage_2.0.conv_a (holds NaN or infinite weights)"


def test_models_in_parts_have_full_names() -> None:
    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = CifarResNet(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body(x)
            return y if y.sum() > 0 else -y

    prepared = dspfx.prepare(Chooses(), torch.randn(2, 3, 16, 16))
    masks = {n: torch.zeros_like(m) for n, m in dspfx.get_masks(prepared).items()}
    dspfx.set_masks(prepared, {n: m for n, m in masks.items() if n == "body.stage_1.0.conv_b"})
    assert "body.stage_1.0.conv_b" in {layer.name for layer in weak_layers_of(prepared)}
