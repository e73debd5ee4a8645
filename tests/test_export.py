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
from models import CRNN, MODELS, C2f, Configurable, ListInput, Siamese
from test_parts import IMAGES, Detector
from test_save import Small, pruned
from torch import Tensor, nn

import dspfx
from dspfx.group_conv import GroupConvRun, group_conv_like
from dspfx.trees import leaves
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
