"""Budgets of latency in engines: layers as files, whole channels in multiples, corrections."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dspfx
from dspfx import Budget
from dspfx.engines.one_layer import INPUT, OneLayer
from dspfx.engines.onnx_runtime import OnnxRuntime
from dspfx.layers import native
from dspfx.layers.gated import gated_layers
from dspfx.layers.group_conv_run import GroupConvRun
from dspfx.model.liveness import present_liveness
from dspfx.passes.analysis.channel_ops import ChannelAnalysis
from dspfx.passes.analysis.cost import layer_costs
from dspfx.passes.lowering.measure import Measured
from dspfx.pruning.latency import Latency, LatencyTable
from dspfx.pruning.layer_times import SHARES, LayerTimes, layer_times
from dspfx.pruning.multiples import multiple_of
from helpers import randomise

GROUPS = 2


def network() -> nn.Module:
    return randomise(
        nn.Sequential(
            *(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU()),
            *(nn.Conv2d(96, 64, 3), nn.ReLU(), nn.Conv2d(64, 4, 1)),
        )
    )


def prepared(groups: int = GROUPS) -> dspfx.PreparedModule:
    config = dspfx.PrepareConfig(groups=groups)
    found = dspfx.prepare(network(), torch.randn(2, 3, 14, 14), config=config)
    dspfx.cluster_groups(found)
    assert isinstance(found, dspfx.PreparedModule)
    return found


class Machine:
    """Layers take as long as their MACs; of what they save, a whole network saves `saved`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, own_inputs: float, saved: float) -> None:
        self.saved, self.own_inputs, self.timed = saved, own_inputs, 0
        monkeypatch.setattr(dspfx.pruning.latency, "layer_times", self.layer_times)
        monkeypatch.setattr(dspfx.pruning.prune_in_time, "WholeTimes", lambda *_: self)
        monkeypatch.setattr(dspfx.pruning.gradual, "WholeTimes", lambda *_: self)

    def layer_times(self, module: nn.Module, analysis: ChannelAnalysis, _: Budget) -> LayerTimes:
        costs = layer_costs(analysis).items()
        times = {node.name: tuple(share * cost.macs for share in SHARES) for node, cost in costs}
        return LayerTimes(times, dict.fromkeys(gated_layers(module), self.own_inputs))

    def fraction(self, modules: Sequence[dspfx.PreparedModule]) -> float:
        self.timed += 1
        (module,) = modules
        analysis, live = present_liveness(module)
        times = self.layer_times(module, analysis, Budget(latency=0.5))
        table = replace(LatencyTable.blank(module), times=times.times)
        points = ((0.01, 1 - 0.99 * self.saved),)
        return Latency((table,), points).predict([live])


def in_openvino(fraction: float) -> Budget:
    return Budget(latency=fraction, engine="openvino", precision="int8")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latency": 0.5, "engine": "tensorrt"}, "no engine 'tensorrt'; there are openvino"),
        ({"latency": 0.5, "precision": "fp8"}, "none of fp32, bf16, int8"),
        ({"macs": 0.5, "engine": "openvino"}, "are of a budget of latency"),
        ({"params": 0.5, "precision": "int8"}, "are of a budget of latency"),
    ],
)
def test_budgets_that_say_nothing(given: dict[str, Any], message: str) -> None:
    with pytest.raises(dspfx.BudgetError, match=message):
        Budget(**given)


def test_a_budget_of_old_is_saved_as_before() -> None:
    assert Budget(macs=0.5).plain() == {
        "macs": 0.5,
        "params": None,
        "latency": None,
        "count": "emitted",
    }
    assert in_openvino(0.5).plain()["engine"] == "openvino"
    assert in_openvino(0.5).at(0.7) == in_openvino(0.7)


@pytest.mark.parametrize("verb", ["prune", "prune_channels", "gradual"])
@pytest.mark.parametrize("own_inputs", [0.0, 0.9])
def test_granularity_follows_the_engine(
    verb: str, own_inputs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups drop inputs by themselves only where that saves time, and widths are multiples."""
    Machine(monkeypatch, own_inputs, saved=1.0)
    model = prepared()
    pruned(verb, model, in_openvino(0.5))
    masks = {name: layer.gate.mask for name, layer in gated_layers(model).items()}
    whole = all(len(mask[mask.any(1)].unique(dim=0)) == 1 for mask in masks.values())
    assert whole == (own_inputs == 0.0 or verb == "prune_channels")
    if whole:
        compact = dspfx.convert(model)
        layers = [m for m in compact.modules() if isinstance(m, nn.Conv2d)]
        for layer, dense in zip(layers[:-1], (64, 96, 64), strict=True):
            assert layer.out_channels % multiple_of(OnnxRuntime().multiple, dense) == 0
        assert [m.out_channels for m in layers] != [64, 96, 64, 4]


def pruned(verb: str, model: dspfx.PreparedModule, budget: Budget) -> dspfx.PruneReport:
    if verb != "gradual":
        verbs = {"prune": dspfx.prune, "prune_channels": dspfx.prune_channels}
        return verbs[verb](model, budget)
    pruning = dspfx.GradualPruning(model, budget, total_steps=12, prunings=6)
    for number in range(12):
        model.zero_grad()
        x = torch.randn(4, 3, 14, 14, generator=torch.Generator().manual_seed(number))
        model(x).square().mean().backward()
        pruning.step()
    assert pruning.report is not None
    return pruning.report


@pytest.mark.parametrize("verb", ["prune", "prune_channels", "gradual"])
@pytest.mark.parametrize("saved", [0.7, 1.2])
def test_what_is_measured_is_heeded(
    verb: str, saved: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, own_inputs=1.0, saved=saved)
    model = prepared()
    report = pruned(verb, model, Budget(latency=0.6))
    assert machine.timed >= 2
    assert machine.fraction([model]) == pytest.approx(0.6, abs=0.05)
    if verb != "gradual":
        assert report.measured == pytest.approx(report.achieved, abs=0.02)


def test_a_network_that_saves_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, own_inputs=1.0, saved=0.01)
    report = dspfx.prune_channels(prepared(), Budget(latency=0.5))
    assert "by what was measured, the budget of 50.00% cannot be reached" in report.note
    assert report.measured == pytest.approx(1.0, abs=0.01)
    assert machine.timed == 4


def test_a_disturbance_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that seemed to save no time at all ended the search."""
    machine = Machine(monkeypatch, own_inputs=1.0, saved=0.9)
    fraction, disturbed = machine.fraction, iter([1.1])
    monkeypatch.setattr(
        machine, "fraction", lambda modules: next(disturbed, None) or fraction(modules)
    )
    model = prepared()
    report = dspfx.prune_channels(model, Budget(latency=0.6))
    assert report.note == ""
    assert fraction([model]) == report.measured == pytest.approx(0.6, abs=0.1)


def test_an_engine_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "missing", lambda *_: "it is broken")
    model = prepared()
    before = dspfx.get_masks(model)
    for verb in (dspfx.prune, dspfx.prune_channels):
        with pytest.raises(dspfx.BudgetError, match="in onnxruntime, but it is broken"):
            verb(model, Budget(latency=0.5, engine="onnxruntime"))
    assert all(torch.equal(mask, before[name]) for name, mask in dspfx.get_masks(model).items())


def test_a_precision_that_an_engine_lacks() -> None:
    with pytest.raises(dspfx.BudgetError, match=r"bf16 here; it does in fp32, int8"):
        dspfx.prune(prepared(), Budget(latency=0.5, engine="onnxruntime", precision="bf16"))
    with pytest.raises(dspfx.BudgetError, match=r"own does not compute in int8"):
        dspfx.prune(prepared(), Budget(latency=0.5, precision="int8"))


@pytest.mark.usefixtures("own_cache")
def test_layers_on_the_own_kernel_are_timed_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.multiplies_bf16():
        pytest.skip("the processor has no instructions for bfloat16")
    timed: list[nn.Module] = []

    def measured(_: Measured, modules: Mapping[str, nn.Module], __: Tensor) -> dict[str, float]:
        timed.extend(modules.values())
        return dict.fromkeys(modules, 1e-3)

    monkeypatch.setattr(Measured, "__call__", measured)
    model = prepared()
    layer_times(model, present_liveness(model)[0], Budget(latency=0.5, precision="bf16"))
    runs = [module for module in timed if isinstance(module, GroupConvRun)]
    assert len(runs) == len(timed) == 4 * len(SHARES)
    assert all(run.weight.dtype == torch.bfloat16 for run in runs)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_times_in_an_engine(precision: Any) -> None:
    model = prepared()
    budget = Budget(latency=0.7, engine="onnxruntime", precision=precision)
    report = dspfx.prune_channels(model, budget)
    assert report.achieved <= 0.7
    assert report.measured is not None
    assert report.measured > 0
    assert report.after.macs < report.before.macs


def test_narrow_structural_groups_go_whole() -> None:
    """A step as wide as a group left such layers as they were."""
    layers = [
        *(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 64, 1), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, groups=8), nn.ReLU(), nn.Conv2d(64, 32, 1), nn.Conv2d(32, 4, 1)),
    ]
    x = torch.randn(2, 3, 8, 8)
    config = dspfx.PrepareConfig(groups=1, round_to=8)
    model = dspfx.prepare(randomise(nn.Sequential(*layers)), x, config=config)
    dspfx.prune_channels(model, Budget(macs=0.6))
    (conv,) = (
        m for m in dspfx.convert(model).modules() if isinstance(m, nn.Conv2d) and m.groups > 1
    )
    assert conv.groups < 8
    assert conv.in_channels == conv.out_channels == 8 * conv.groups


# -- layers as files -----------------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> OneLayer:
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    filters, channels = (groups * draw(st.integers(1, 6)) for _ in range(2))
    rank = draw(st.integers(0, 3))
    if rank == 0:
        shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
        return OneLayer(filters, channels, shape, None)
    taps = [draw(st.integers(1, 3)) for _ in range(rank)]
    dilations = [draw(st.integers(1, 2)) for _ in range(rank)]
    pads = [draw(st.integers(0, 2)) for _ in range(2 * rank)]
    conv: Mapping[str, Sequence[int]] = {
        "kernel_shape": taps,
        "dilations": dilations,
        "strides": [draw(st.integers(1, 3)) for _ in range(rank)],
        "pads": pads,
    }
    sizes = [
        d * (t - 1) + 1 + draw(st.integers(0, 4)) for t, d in zip(taps, dilations, strict=True)
    ]
    return OneLayer(filters, channels, (draw(st.integers(1, 2)), *sizes), conv, groups)


def output_of(file: bytes, shape: Sequence[int]) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {INPUT: np.ones(shape, np.float32)})
    assert isinstance(found, np.ndarray)
    return found


@settings(max_examples=40, deadline=None)
@given(layers(), st.sampled_from(["fp32", "int8"]), st.integers(1, 3))
def test_files_of_layers_run(one: OneLayer, precision: Any, groups: int) -> None:
    batch, *positions = one.after().shape
    expected = (batch, *positions, 1) if one.conv is None else (batch, 1, *positions)
    assert output_of(one.file(precision), one.input_shape()).shape == expected
    around = one.after()
    assert output_of(around.around(precision), around.input_shape()).shape == expected
    if one.structural_groups == 1 and one.filters >= groups:
        reads = tuple(tuple(range(0, one.channels, g + 1)) for g in range(groups))
        gathered = replace(one, reads=reads)
        assert output_of(gathered.file(precision), one.input_shape()).shape == expected


def test_shapes_of_layers_are_those_of_torch() -> None:
    conv = nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    attributes = {
        "kernel_shape": (3, 2),
        "strides": (2, 1),
        "dilations": (1, 2),
        "pads": (1, 0) * 2,
    }
    expected = conv(torch.randn(2, 6, 9, 8)).shape
    assert OneLayer(4, 6, (2, 9, 8), attributes).after().shape == (2, *expected[2:])


@given(st.sampled_from([1, 8, 16]), st.integers(1, 300))
def test_narrow_layers_have_steps(liked: int, width: int) -> None:
    step = multiple_of(liked, width)
    assert liked % step == 0
    assert step == 1 or width >= 4 * step
    assert step == liked or width < 8 * step
    assert math.log2(step).is_integer()
