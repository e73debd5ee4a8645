"""`compile`: measured forms, the race, and what it leaves alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import dspfx
from dspfx.engines import race
from dspfx.engines.report import Candidate, CompileReport, worded
from dspfx.layers.branches import Branches
from dspfx.layers.group_conv_run import GroupConvRun
from helpers import assert_equal, random_masks, randomise

NAMES = ("as converted", "dense", "the fastest form of each layer", "native")
TORCH = ("own", "inductor")
pytestmark = pytest.mark.usefixtures("own_cache")

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def compact_of(*layers: nn.Module) -> nn.Module:
    first = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    prepared = dspfx.prepare(randomise(nn.Sequential(*first, *layers)), X).eval()
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.2))
    return dspfx.convert(prepared)


@pytest.fixture
def compact() -> nn.Module:
    norm = nn.BatchNorm2d(16)
    return compact_of(nn.Conv2d(16, 16, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(16, 4, 1))


@pytest.fixture
def partly_native() -> nn.Module:
    """The own kernel computes convolutions only."""
    pixels = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    linear = nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    return compact_of(*pixels, *linear)


@pytest.fixture
def winner(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """In place of a clock: the form of a name is the fastest."""

    def wins(name: str) -> None:
        def in_blocks(calls: Mapping[Candidate, Any]) -> dict[Candidate, float]:
            return {candidate: 1.0 + (candidate.form != name) for candidate in calls}

        monkeypatch.setattr(race, "in_blocks", in_blocks)
        monkeypatch.setattr(race, "block", lambda *_: 1.0)

    return wins


def forms_in(report: CompileReport) -> list[str]:
    return [candidate.form for candidate in report.candidates]


@pytest.mark.parametrize("name", NAMES[:3])
def test_the_fastest_is_returned(
    partly_native: nn.Module, winner: Callable[[str], None], name: str
) -> None:
    compact = partly_native
    winner(name)
    code = {k: v.clone() for k, v in compact.state_dict().items()}
    fast = dspfx.compile(compact, X, engines=TORCH)
    assert_equal(compact(X), fast(X), 1e-5)
    assert not fast(X).requires_grad
    assert fast.report.chosen.form == name
    assert worded(name) in str(fast.report)
    for key, value in compact.state_dict().items():
        assert torch.equal(value, code[key])
    forms = [m for m in fast.model.modules() if isinstance(m, Branches)]
    assert forms == [] or name != "dense"


def test_every_layer_with_groups_is_timed_against_dense(
    partly_native: nn.Module, tmp_path: Path, winner: Callable[[str], None]
) -> None:
    winner("native")
    report = dspfx.compile(partly_native, X, engines=TORCH).report
    assert [layer.name for layer in report.layers] == ["5", "7"]
    for layer in report.layers:
        assert "dense" in layer.seconds
        assert len(layer.seconds) > 1
        assert layer.seconds[layer.chosen] == min(layer.seconds.values())
    assert set(NAMES) < set(forms_in(report))
    page = tmp_path / "page.html"
    dspfx.report(partly_native).to_html(page, measured=report)
    assert f"{report.chosen} (chosen)" in page.read_text()


def test_forms_are_not_timed_where_the_own_kernel_computes_every_layer(compact: nn.Module) -> None:
    report = dspfx.compile(compact, X, engines=TORCH).report
    assert report.layers == ()
    assert set(forms_in(report)) == {"as converted", "dense", "native", "native, without inductor"}
    assert "fastest form" not in str(report)


def test_a_model_without_groups_is_compiled_as_it_is() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())).eval()
    fast = dspfx.compile(model, X)
    assert_equal(model(X), fast(X), 1e-5)
    assert fast.report.layers == ()
    assert set(forms_in(fast.report)) == {"as converted"}
    assert fast.model is model


def test_whole_channels_run_on_the_own_kernel_too(winner: Callable[[str], None]) -> None:
    """A compact network without groups, pruned or not, is timed in two forms."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    prepared = dspfx.prepare(randomise(model), X).eval()
    dspfx.prune_channels(prepared, dspfx.Budget(macs=0.6))
    compact = dspfx.convert(prepared)
    winner("native")
    fast = dspfx.compile(compact, X, engines=TORCH)
    assert_equal(compact(X), fast(X), 1e-5)
    assert "dense" not in forms_in(fast.report)
    assert fast.report.chosen.form == "native"
    assert any(isinstance(m, GroupConvRun) for m in fast.model.modules())
    assert "fastest form" not in str(fast.report)


def test_what_cannot_be_compiled(compact: nn.Module) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    prepared = dspfx.prepare(nn.Sequential(plain, nn.Conv2d(4, 4, 1)), X).eval()
    cases: list[tuple[Any, Any, str]] = [
        (prepared, X, "compile what dspfx.convert makes of it"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), X, r"call model.eval\(\)"),
        (plain.forward, X, "a method is no torch.nn.Module"),
        (plain, {"input": X}, "does not accept the example inputs"),
        (compact, X[:, :2], r"does not accept the example inputs \(\(2, 2, 12, 12\)\)"),
        (compact, (X, X), "does not accept"),
    ]
    for model, inputs, words in cases:
        with pytest.raises(dspfx.CompileError, match=words):
            dspfx.compile(model, inputs)


@pytest.mark.parametrize("mode", ["circular", "reflect"])
def test_padding_that_torch_cannot_freeze_is_compiled_all_the_same(mode: str) -> None:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    fast = dspfx.compile(model, X, engines=["inductor"])
    with torch.no_grad():
        torch.testing.assert_close(fast(X), model(X), rtol=1e-4, atol=1e-5)


def test_what_torch_cannot_compile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> Any:
            raise RuntimeError("there is no such instruction")

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(dspfx.CompileError, match=r"no such instruction; call the model as it is"):
        dspfx.compile(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), X, engines=["inductor"])


def test_models_of_one_class_are_not_taken_for_each_other() -> None:
    """They share a code object, and torch keeps what it compiled with that."""
    models = [Residual().eval() for _ in range(3)]
    fast = [dspfx.compile(model, X, engines=TORCH) for model in models]
    for model, call in zip(models, fast, strict=True):
        assert_equal(model(X), call(X), 1e-5)
        assert_equal(model(X[:1]), call(X[:1]), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_a_model_in_another_type(compact: nn.Module, dtype: torch.dtype, tolerance: float) -> None:
    """It was run with its example in float32; nor could torch pack weights in float64."""
    model, x = compact.to(dtype), X.to(dtype)
    fast = dspfx.compile(model, x)
    assert_equal(model(x), fast(x), tolerance)
    assert fast.report.chosen.engine == "inductor"


def test_flags_are_not_mixed_up() -> None:
    class Flag(nn.Module):
        def forward(self, x: torch.Tensor, negative: bool = False) -> torch.Tensor:
            return -x if negative else x + 1

    fast = dspfx.compile(Flag().eval(), (X,))
    assert_equal(X + 1, fast(X), 1e-6)
    assert_equal(-X, fast(X, True), 1e-6)
    assert_equal(X + 1, fast(X), 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu(compact: nn.Module) -> None:
    compact, x = compact.cuda(), X.cuda()
    fast = dspfx.compile(compact, x)
    assert_equal(compact(x), fast(x), 1e-3)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        return torch.relu(self.b(torch.relu(self.a(x))) + x)


def passes_over_memory(source: str) -> int:
    """How many kernels of generated code are no convolutions and read or write activations."""
    kernels = [line for line in source.splitlines() if "async_compile.cpp_pybinding(" in line]
    return sum("float*" in line for line in kernels)


def test_sums_and_activations_take_no_pass_of_their_own(winner: Callable[[str], None]) -> None:
    """In the generated code nothing is left but convolutions, and changes of layout at the ends."""
    prepared = dspfx.prepare(randomise(Residual()), X).eval()
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[::2, :3] = False
    mask[1::2, -3:] = False
    dspfx.set_masks(prepared, {"a": mask, "b": mask})
    compact = dspfx.convert(prepared)
    winner("native")
    with torch._inductor.config.patch(fx_graph_cache=False):
        _, sources = run_and_get_code(dspfx.compile, compact, X, engines=TORCH)
    of_dense = [s for s in sources if s.count("= torch.ops.mkldnn._convolution_pointwise") == 2]
    own = [s for s in sources if "group_conv_run" in s and "_convolution_pointwise" not in s]
    assert of_dense
    assert own
    for source in of_dense:
        assert source.count("torch.ops.mkldnn._convolution_pointwise_.binary(") == 1  # in place
        assert passes_over_memory(source) == 2
    assert passes_over_memory(own[0]) == 0
