"""`export`: files that run elsewhere and compute the same."""

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detector import IMAGES, Detector
from models import CRNN, MODELS, C2f, Configurable, ListInput, Siamese
from small import Small, pruned
from torch import Tensor, nn
from unusual import CountsCalls

import dspfx
from dspfx.layers.group_conv import group_conv_like
from dspfx.layers.group_conv_run import GroupConvRun
from dspfx.utils.pytree import leaves
from helpers import assert_equal, random_masks, randomise, unchanged

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FORMS = {"likely": dspfx.convert.__kwdefaults__["cost_model"], "branches": dspfx.FEWEST_WEIGHTS}


def batches() -> Iterator[Tensor]:
    for samples in (1, 2, 7):
        yield torch.randn(samples, 3, 16, 16, generator=torch.Generator().manual_seed(samples))


def onnx_outputs(path: Path, *inputs: Tensor) -> list[Tensor]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    fed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, fed)]


@pytest.fixture(scope="module", params=FORMS)
def compact(request: pytest.FixtureRequest) -> nn.Module:
    return dspfx.convert(pruned(Small(width=24), X), cost_model=FORMS[request.param])


@pytest.fixture
def onnx_file(compact: nn.Module, tmp_path: Path) -> Path:
    pytest.importorskip("onnxscript")
    with unchanged(compact):
        dspfx.export(compact, X, tmp_path / "m.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    return tmp_path / "m.onnx"


def test_onnx_runtime(compact: nn.Module, onnx_file: Path) -> None:
    for x in batches():
        assert_equal(compact(x), onnx_outputs(onnx_file, x)[0], 1e-5)


def test_openvino(compact: nn.Module, onnx_file: Path) -> None:
    openvino = pytest.importorskip("openvino")
    network = openvino.Core().compile_model(
        openvino.Core().read_model(onnx_file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    for x in batches():
        assert_equal(compact(x), torch.from_numpy(network(x.numpy())[0]), 1e-4)


def test_onnx_has_standard_operators_and_no_gather_that_is_not_in_the_report(
    compact: nn.Module, onnx_file: Path
) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["Gather"] == dspfx.report(compact).gathers
    assert "BatchNormalization" not in kinds
    (given,) = model.graph.input
    assert given.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_a_network_whose_channels_lie_in_order_has_no_gather(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    prepared = dspfx.prepare(
        randomise(nn.Sequential(*(nn.Conv2d(c, 16, 3) for c in (3, 16, 16)))), X
    )
    dspfx.set_masks(prepared, random_masks(prepared, keep=0.4))  # in any order
    compact = dspfx.convert(prepared)
    dspfx.export(compact, X, tmp_path / "m.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
    assert kinds["Gather"] == dspfx.report(compact).gathers


@pytest.mark.parametrize("kind", [C2f, CRNN, Siamese, ListInput, Configurable])
def test_awkward_models(kind: type[nn.Module], tmp_path: Path) -> None:
    """Several inputs and outputs, lists, flags, integers, an LSTM."""
    pytest.importorskip("onnxscript")
    model = dspfx.convert(pruned(kind(), as_float32(MODELS[kind])))
    inputs = model.example_inputs
    dspfx.export(model, inputs, tmp_path / "m.onnx")
    dspfx.export(model, inputs, tmp_path / "m.pt2")
    expected, program = list(leaves(model(*inputs))), torch.export.load(tmp_path / "m.pt2")
    assert_equal(expected, list(leaves(program.module()(*inputs))), 1e-5)
    given = [x for x in leaves(inputs) if isinstance(x, Tensor)]
    assert_equal(expected, onnx_outputs(tmp_path / "m.onnx", *given), 1e-5)


def as_float32(inputs: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )


WITHOUT_DSPFX = """
import sys, torch
x, y = torch.load(sys.argv[1])
program = torch.export.load(sys.argv[2]).module()
package = torch._inductor.aoti_load_package(sys.argv[3])
for name, call in (("export", program), ("aoti", package)):
    with torch.no_grad():
        for size in (7, 2, 1):
            difference = (call(x[:size]) - y[:size]).abs().max()
            assert difference < 1e-5 * y.abs().max(), (name, size, difference)
assert not [name for name in sys.modules if name.split(".")[0] in ("dspfx", "test_save")]
print("equal")
"""


def test_runs_without_the_sources_of_the_model(tmp_path: Path) -> None:
    compact = dspfx.convert(pruned(Small(width=24), X), cost_model=dspfx.FEWEST_WEIGHTS)
    with unchanged(compact):
        dspfx.export(compact, X, tmp_path / "m.pt2")
        dspfx.export(compact, X[:1], tmp_path / "m.aoti.pt2")
    x = torch.randn(7, 3, 16, 16)
    torch.save((x, compact(x)), tmp_path / "expected")
    files = [str(tmp_path / name) for name in ("expected", "m.pt2", "m.aoti.pt2")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DSPFX, *files],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "equal\n", done.stderr


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.stem(x)).reshape(2, 4, -1)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    compact = dspfx.convert(pruned(Small(), X))
    fixed = dspfx.convert(pruned(FixedBatch(), X))
    groups = [(np.arange(4), np.arange(3))]
    own = group_conv_like(nn.Conv2d(3, 4, 1), groups, torch.ones(4, 3, 1, 1), None)
    run = GroupConvRun([own, own.remade(activation="relu")], [(0, -1), (0, -1)], 1, [2])
    detector = dspfx.convert(pruned(Detector().double(), (IMAGES,), groups=2))
    cases: list[tuple[Any, Any, str, dict[str, Any], str]] = [
        (lambda x: x, X, "m.onnx", {}, "is no torch.nn.Module"),
        (pruned(Small(), X), X, "m.onnx", {}, "dspfx.convert"),
        (nn.Sequential(own).eval(), X, "m.onnx", {}, "own kernel"),
        (nn.Sequential(run).eval(), X, "m.onnx", {}, "own kernel"),
        (Small().train(), X, "m.onnx", {}, r"model\.eval\(\)"),
        (compact, X, "m.bin", {}, "pass format="),
        (compact, X, "m.onnx", {"format": "aoti"}, "end with .pt2"),
        (compact, X, "m.onnx", {"format": "tflite"}, "none of onnx, export, aoti"),
        (compact, torch.randn(2, 5, 9, 9), "m.onnx", {}, "does not accept the example inputs"),
        (fixed, X, "m.pt2", {}, "dynamic_batch=False"),
        (detector, (IMAGES,), "m.pt2", {}, "export the children"),
        (compact, X, "nowhere/m.pt2", {}, "nowhere.* cannot be written"),
    ]
    for model, inputs, name, options, words in cases:
        with pytest.raises(dspfx.ExportError, match=words):
            dspfx.export(model, inputs, tmp_path / name, **options)
        assert list(tmp_path.iterdir()) == []
    dspfx.export(fixed, X, tmp_path / "m.pt2", dynamic_batch=False)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_is_that_of_the_example(tmp_path: Path, batch: int) -> None:
    """A single sample was doubled, and the file took two."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(batch, 3, 8, 8)
    dspfx.export(model, x, tmp_path / "fixed.onnx", dynamic_batch=False)
    (outputs,) = onnx_outputs(tmp_path / "fixed.onnx", x)
    assert_equal(model(x), outputs, 1e-5)


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.sub_(1))
        return out


def test_what_a_file_would_leave_out_is_refused(tmp_path: Path) -> None:
    for model, words in (
        (CountsCalls(), "writes into its buffer 'calls'"),
        (Overwrites(), "its inputs"),
    ):
        with pytest.raises(dspfx.ExportError, match=words):
            dspfx.export(model.eval(), torch.randn(2, 3, 8, 8), tmp_path / "file.onnx")
        assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(dspfx.ExportError, match=r"pip install 'dspfx\[deploy\]'"):
        dspfx.export(dspfx.convert(pruned(Small(), X)), X, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_example_images_are_not_stored(tmp_path: Path) -> None:
    secret = torch.full((2, 3, 16, 16), 0.7182818)
    dspfx.export(dspfx.convert(pruned(Small(), X)), secret, tmp_path / "m.pt2")
    (args, _) = torch.export.load(tmp_path / "m.pt2").example_inputs
    assert not args[0].any()


class Up(nn.Module):
    """A U-Net of one level, a shuffle and a transposed convolution; of sizes that are even."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 24, 3, 2, 1)
        self.up, self.shuffle = nn.ConvTranspose2d(24, 8, 2, 2), nn.PixelShuffle(2)
        self.body, self.last = nn.Conv2d(26, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x).relu()
        b = self.down(a).relu()
        x = torch.cat([a, self.shuffle(b), self.up(b).relu()], 1)
        return self.last(self.body(x).relu())


@pytest.mark.parametrize("make", [lambda: Small(width=24), Up])
def test_height_and_width_may_change(make: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    compact = dspfx.convert(pruned(make(), X))
    with unchanged(compact):
        for name in ("m.onnx", "m.pt2"):
            dspfx.export(compact, X, tmp_path / name, dynamic_size=True)
    program = torch.export.load(tmp_path / "m.pt2").module()
    for shape in ((2, 3, 16, 16), (1, 3, 18, 32), (5, 3, 40, 24)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
        with torch.no_grad():
            expected = compact(x)
            assert_equal(expected, program(x), 1e-5)
        assert_equal(expected, onnx_outputs(tmp_path / "m.onnx", x)[0], 1e-5)
    (given,) = onnx.load(tmp_path / "m.onnx").graph.input
    dims = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    assert dims == ["batch", 3, "height", "width"]


def test_lengths_of_several_inputs_may_change_by_themselves(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    inputs = torch.randn(2, 3, 20), torch.randn(2, 4, 12)
    compact = dspfx.convert(pruned(Signals(), inputs))
    dspfx.export(compact, inputs, tmp_path / "m.onnx", dynamic_size=True, dynamic_batch=False)
    for lengths in ((20, 12), (9, 31)):
        given = [torch.randn(2, c, n) for c, n in zip((3, 4), lengths, strict=True)]
        assert_equal(compact(*given), onnx_outputs(tmp_path / "m.onnx", *given)[0], 1e-5)
    shapes = [i.type.tensor_type.shape.dim for i in onnx.load(tmp_path / "m.onnx").graph.input]
    names = [[d.dim_param or d.dim_value for d in dims] for dims in shapes]
    assert names == [[2, 3, "length"], [2, 4, "b_length"]]


class Signals(nn.Module):
    """Two signals of any lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 12, 3, padding=1), nn.Conv1d(4, 12, 3, padding=1)
        self.both, self.head = nn.Conv1d(12, 12, 1), nn.Linear(24, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.both(self.a(a).relu()), self.both(self.b(b).relu())
        return self.head(torch.cat([a.relu().mean(2), b.relu().amax(2)], 1))


class Placed(nn.Module):
    """Adds something of its own to every position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.places = nn.Parameter(torch.randn(1, 8, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + self.places)


def test_a_model_that_fixes_its_sizes_says_so(tmp_path: Path) -> None:
    compact = dspfx.convert(pruned(Placed(), X))
    with pytest.raises(dspfx.ExportError, match="dynamic_size=False"):
        dspfx.export(compact, X, tmp_path / "m.pt2", dynamic_size=True)
    assert not list(tmp_path.iterdir())
    dspfx.export(compact, X, tmp_path / "m.pt2")
