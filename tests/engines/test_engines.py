"""Every engine computes what the module does, and one that fails costs a line of the report."""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from unusual import CountsCalls

import dspfx
from dspfx.engines import child, onnx_call
from dspfx.engines.agreement import agreement, worst_difference
from dspfx.engines.engines import ENGINES, NAMES
from dspfx.engines.onnx_network import OnnxNetwork
from dspfx.layers import native
from dspfx.layers.group_conv_run import GroupConvRun
from helpers import assert_equal, random_masks, randomise

pytestmark = pytest.mark.usefixtures("own_cache")
X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
ON_FILES = ("onnxruntime", "openvino")


def pruned(model: nn.Module, x: Any = X) -> nn.Module:
    prepared = dspfx.prepare(randomise(model), x).eval()
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.2))
    return dspfx.convert(prepared)


@pytest.fixture(scope="module")
def compact() -> nn.Module:
    body = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()
    return pruned(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)))


@pytest.mark.parametrize("name", NAMES)
def test_at_other_batches_sizes_and_from_threads(compact: nn.Module, name: str) -> None:
    fast = dspfx.compile(compact, X[:1], engines=[name])
    assert fast.report.chosen.engine == name
    assert {c.engine for c in fast.report.candidates} == {name}
    others = [X, X[:3], X[:1, :, 1:, :10], X[:, :, ::2, ::2], X.transpose(2, 3)]
    for x in others:
        assert_equal(compact(x), fast(x), 1e-5)
        assert not fast(x).requires_grad
    with ThreadPoolExecutor(4) as pool:
        requests = [X[i % 3 : i % 3 + 1 + i % 2] for i in range(40)]
        for x, found in zip(requests, pool.map(fast, requests), strict=True):
            assert_equal(compact(x), found, 1e-5)


@pytest.mark.parametrize("name", ON_FILES)
def test_outputs_are_kept_apart(compact: nn.Module, name: str) -> None:
    """A later call does not overwrite what an earlier one returned, nor the caller's input."""
    fast = dspfx.compile(compact, X, engines=[name])
    given = X.clone()
    first = fast(given)
    kept = first.clone()
    fast(X.flip(0))
    assert torch.equal(first, kept)
    assert torch.equal(given, X)


class Pair(NamedTuple):
    scores: Tensor
    where: dict[str, Any]


class Nested(nn.Module):
    """Takes a tuple, a dict and a flag; returns a named tuple, a constant and an integer tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, pair: tuple[Tensor, Tensor], more: dict[str, Tensor], flip: bool) -> Pair:
        x = self.head(torch.relu(self.conv(pair[0] + more["shift"])))
        x = -x if flip else x
        return Pair(x, {"best": x.argmax(1), "stride": 2, "sum": pair[1].sum((1, 2, 3))})


@pytest.mark.parametrize("name", ON_FILES)
def test_nested_inputs_and_outputs(name: str) -> None:
    model = randomise(Nested()).eval()
    inputs = (X, X + 1), {"shift": X / 2}, False
    fast = dspfx.compile(model, inputs, engines=[name])
    for given in (inputs, ((X[:2], X[1:3]), {"shift": X[:2]}, False), (*inputs[:2], True)):
        expected, found = model(*given), fast(*given)
        assert type(found) is Pair
        assert found.where["stride"] == 2
        assert torch.equal(expected.where["best"], found.where["best"])
        assert_equal(expected.scores, found.scores, 1e-5)
        assert_equal(expected.where["sum"], found.where["sum"], 1e-5)


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x)).reshape(4, 4, 100)


@pytest.mark.parametrize("name", ON_FILES)
def test_a_batch_that_the_code_fixes(name: str) -> None:
    model = randomise(FixedBatch()).eval()
    fast = dspfx.compile(model, X, engines=[name])
    assert_equal(model(X), fast(X), 1e-5)
    with pytest.raises(RuntimeError):
        fast(X[:2])  # as the module itself


def test_what_an_engine_cannot_express_is_left_to_others() -> None:
    model = randomise(CountsCalls()).eval()
    fast = dspfx.compile(model, X)
    assert fast.report.chosen.engine == "inductor"
    notes = {c.engine: c.note for c in fast.report.candidates}
    assert all("writes into its buffer" in notes[name] for name in ON_FILES)
    with pytest.raises(
        dspfx.CompileError, match=r"(?s)no engine runs the model.*openvino.*its buffer"
    ):
        dspfx.compile(model, X, engines=["openvino"])


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.abort()", "crashed (SIGABRT)"),
        ("import sys; sys.exit(3)", "ended with 3"),
        ("raise ValueError('no such operator')", "ValueError: no such operator"),
        ("import time; time.sleep(60)", "did not come back within 2 s"),
    ],
)
def test_a_crash_costs_a_line(
    compact: nn.Module, monkeypatch: pytest.MonkeyPatch, program: str, words: str
) -> None:
    monkeypatch.setattr(child, "PROGRAM", program)
    monkeypatch.setattr(child, "PATIENCE", 2.0)
    fast = dspfx.compile(compact, X, engines=["own", *ON_FILES])
    assert fast.report.chosen.engine == "own"
    assert {c.note for c in fast.report.candidates if c.engine in ON_FILES} == {words}
    assert words in str(fast.report)


def test_a_missing_and_a_broken_package_cost_a_line(
    compact: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else find(name, *a)
    )
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libfoo.so.1: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    fast = dspfx.compile(compact, X, engines=["own", *ON_FILES])
    assert fast.report.missing == {
        "openvino": "openvino is not installed: pip install 'dspfx[deploy]'",
        "onnxruntime": "onnxruntime cannot be imported: libfoo.so.1: no such file",
    }
    assert "libfoo.so.1" in str(fast.report)


def test_an_engine_that_computes_something_else_does_not_win(
    compact: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    returned = OnnxNetwork.returned

    def wrong(self: OnnxNetwork, computed: Any) -> Any:
        return returned(self, [2 * tensor for tensor in computed])

    monkeypatch.setattr(OnnxNetwork, "returned", wrong)
    fast = dspfx.compile(compact, X, engines=["own", *ON_FILES])
    assert fast.report.chosen.engine == "own"
    notes = [c.note for c in fast.report.candidates if c.engine in ON_FILES]
    assert notes
    assert all(note.startswith("its outputs differ") for note in notes)


def test_what_differs_at_another_shape_is_left_to_the_module(
    compact: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = dspfx.compile(compact, X, engines=["onnxruntime"])
    worst = onnx_call.worst_difference
    monkeypatch.setattr(onnx_call, "worst_difference", lambda a, b: 1.0 + worst(a, b))
    assert_equal(compact(X[:2]), fast(X[:2]), 1e-5)
    assert fast._call._proved == {(X.shape,): True, (X[:2].shape,): False}


def test_bfloat16_where_there_is_any(compact: nn.Module) -> None:
    there = [e.name for e in ENGINES if "bf16" in e.precisions(torch.device("cpu"))]
    if not there:
        pytest.skip("the processor has no instructions for bfloat16")
    for name in there:
        fast = dspfx.compile(compact, X, engines=[name], precision="bf16")
        assert fast.report.chosen.precision == "bf16"
        assert fast(X).dtype == torch.float32
        assert 1e-6 < worst_difference(compact(X), fast(X)) < 0.05


def test_the_own_kernel_in_bfloat16(compact: nn.Module) -> None:
    """Nothing between its runs is in float32 either; other batches are computed as well."""
    if not native.multiplies_bf16():
        pytest.skip("the processor has no instructions for bfloat16")
    fast = dspfx.compile(compact, X, engines=["own"], precision="bf16")
    forms = {c.form: c for c in fast.report.candidates}
    assert set(forms) == {"native", "native, without inductor"}
    assert {c.precision for c in forms.values()} == {"bf16"}
    assert all(0 < (c.difference or 0.0) < 0.05 for c in forms.values())
    runs = [m for m in fast.model.modules() if isinstance(m, GroupConvRun)]
    assert runs
    assert all(run.weight.dtype == torch.bfloat16 for run in runs)
    assert "bfloat16" in str(fast.model)
    for x in (X, X[:1]):
        assert fast(x).dtype == torch.float32
        assert worst_difference(compact(x), fast(x)) < 0.05
    assert all(b.dtype != torch.bfloat16 for b in compact.buffers())


def test_without_instructions_the_own_kernel_computes_in_float32(
    compact: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "multiplies_bf16", lambda: False)
    with pytest.raises(dspfx.CompileError, match='computes in precision="bf16"'):
        dspfx.compile(compact, X, engines=["own"], precision="bf16")


def test_auto_returns_what_agrees(compact: nn.Module) -> None:
    batches = [torch.randn(8, 3, 12, 12), torch.randn(5, 3, 12, 12)]
    engines = ("openvino", "onnxruntime")
    fast = dspfx.compile(compact, X, engines=engines, precision="auto", batches=batches)
    compared = [c for c in fast.report.candidates if c.agreement is not None]
    assert all(c.difference is not None for c in compared)
    assert fast.report.chosen.agreement is not None
    assert fast.report.chosen.agreement >= 0.99
    strict = dspfx.compile(
        compact, X, engines=engines, precision="auto", batches=batches, agreement=1.1
    )
    assert strict.report.chosen.precision == "fp32"
    left = [c for c in strict.report.candidates if c.precision == "bf16"]
    assert all(c.note.startswith(("does not agree", "hopeless", "not tried")) for c in left)


@pytest.mark.parametrize("name", ON_FILES)
def test_int8(compact: nn.Module, name: str) -> None:
    """Quantised by `compile`, or before; in both forms; right at other batches as well."""
    pytest.importorskip("torchao")
    batches = [torch.randn(16, 3, 12, 12), torch.randn(7, 3, 12, 12)]
    fast = dspfx.compile(compact, X, engines=[name], precision="int8", batches=batches)
    assert {c.precision for c in fast.report.candidates} == {"int8"}
    assert {c.form for c in fast.report.candidates} == {"as converted", "dense"}
    assert 1e-4 < worst_difference(compact(X), fast(X)) < 0.1
    quantised = dspfx.quantize(compact, batches)
    again = dspfx.compile(quantised, X, engines=[name])
    assert again.report.chosen.precision == "int8"
    for x in (X, X[:3]):
        assert worst_difference(quantised(x), again(x)) < 0.05


def test_bad_calibration_is_said(compact: nn.Module) -> None:
    pytest.importorskip("torchao")
    for bad in (torch.full((8, 3, 12, 12), float("nan")), torch.zeros(8, 3, 12, 12)):
        with pytest.raises(dspfx.QuantizeError):
            dspfx.compile(compact, X, precision="int8", batches=[bad])
    with pytest.raises(dspfx.QuantizeError, match="not compact"):
        dspfx.compile(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), X, precision="int8", batches=[X])


def test_what_is_asked_wrongly(compact: nn.Module) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"engines": ["tensorrt"]}, "no engine 'tensorrt'; there are openvino, onnxruntime"),
        ({"engines": []}, "names none"),
        ({"precision": "fp8"}, "precision='fp8' is none of fp32, bf16, int8, auto"),
        ({"precision": "auto"}, "give batches="),
        ({"precision": "int8"}, "give batches="),
        ({"precision": "auto", "batches": []}, "fewer than the 4 samples"),
        ({"precision": "auto", "batches": [X[:, :2]]}, "does not accept"),
        ({"precision": "bf16", "engines": ["onnxruntime"]}, 'computes in precision="bf16"'),
    ]
    for asked, words in cases:
        with pytest.raises(dspfx.CompileError, match=words):
            dspfx.compile(compact, X, **asked)


def test_agreement_is_of_decisions() -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    assert agreement(scores, scores.flip(1)) == 0.0
    assert agreement(scores, scores + torch.tensor([[0.0, 0.5], [0.0, 2.5]])) == 0.5
    assert agreement((scores, 1), (scores, 2)) == 0.0
    assert agreement(scores, scores[:1]) == 0.0
    assert agreement(torch.ones(4), torch.ones(4) * 0.9) == pytest.approx(0.9)
    assert worst_difference(scores, scores + 0.3) == pytest.approx(0.1)
    assert worst_difference(scores, scores.log() / 0) == float("inf")
    nan = torch.tensor([1.0, float("nan")])
    assert worst_difference(nan, nan) == 0.0
