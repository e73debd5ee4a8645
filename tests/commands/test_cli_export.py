"""The end of the road on the command line: files that other programs run."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from command_line import SMALL, TINY, invoke, saved

import dspfx
from dspfx.recipe import Recipe
from dspfx.recipe.networks.architectures import Architecture
from dspfx.recipe.networks.cifar_resnet import CifarResNet
from helpers import assert_equal

__all__ = ["saved"]  # a fixture

# networks that have learned so little may well collapse
pytestmark = pytest.mark.filterwarnings("ignore::dspfx.DspfxWarning")
NEEDS_ONNX = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnxscript", "onnxruntime"))), reason="needs ONNX"
)
X = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on digits, and the ONNX file of it."""
    folder = tmp_path_factory.mktemp("trained")
    output = ["-o", str(folder / "model.onnx")] if importlib.util.find_spec("onnxscript") else []
    more = ["--images", "1200", "--epochs-dense", "3", "--epochs-learn", "2", "--epochs-tune", "3"]
    words = [*TINY.split(), *more, "--run-dir", str(folder / "run"), *output]
    code, text, err = invoke("train", *words, "--json")
    assert code == 0, err
    (folder / "result.json").write_text(text)
    if output:
        assert "whole channels" in err
    return folder


@NEEDS_ONNX
def test_train_on_digits_to_a_file_of_the_accuracy_that_the_report_says(trained: Path) -> None:
    """Counted by ONNX Runtime's answers on the test images, and by the graph in the file."""
    import onnxruntime  # noqa: PLC0415

    from onnx_graphs import macs_of, parameters_of  # noqa: PLC0415

    result = json.loads((trained / "result.json").read_text())
    stated = json.loads((trained / "run" / "report.json").read_text())
    path = trained / "model.onnx"
    assert result["file"] == str(path)
    data = dspfx.recipe.images.datasets.load("digits")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {session.get_inputs()[0].name: data.test_x.numpy()})
    right = int((torch.from_numpy(answers).argmax(1) == data.test_y).sum())
    assert right / len(data.test_y) == pytest.approx(stated["compact"])
    assert f"{right / len(data.test_y):.2%}" in (trained / "run" / "report.txt").read_text()
    assert right > 0.5 * len(data.test_y)  # it has learned something
    emitted = stated["report"]["emitted"]
    assert macs_of(path) == emitted["macs"]
    assert macs_of(path) <= 0.5 * stated["report"]["before"]["macs"]
    assert parameters_of(path) <= stated["report"]["before"]["parameters"]


def test_every_run_has_a_page(trained: Path) -> None:
    pytest.importorskip("matplotlib")
    page = (trained / "run" / "report.html").read_text()
    report = json.loads((trained / "run" / "report.json").read_text())["report"]
    assert report["layers"][1]["layer"] in page
    assert "<svg" in page or "image/svg" in page


@pytest.mark.parametrize("named", ["run", "run/model.safetensors"])
def test_a_run_is_exported(trained: Path, tmp_path: Path, named: str) -> None:
    path = tmp_path / "again.pt2"
    code, text, err = invoke("export", str(trained / named), "-o", str(path))
    assert code == 0, err
    assert text.startswith(f"written: {path}, {path.stat().st_size:,} bytes, ")
    own = trained / "run" / "model.safetensors"
    compact = dspfx.load(own, Architecture.beside(own).build())
    assert_equal(compact(X), torch.export.load(path).module()(X), 1e-6)


@pytest.mark.parametrize("kind", ["prepared", "compact"])
def test_a_file_is_exported(saved: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "small.pt2"
    code, text, err = invoke(
        "export", str(saved / f"{kind}.safetensors"), "-o", str(path), "--json"
    )
    assert code == 0, err
    found = json.loads(text)
    assert (found["file"], found["bytes"]) == (str(path), path.stat().st_size)
    compact = dspfx.load(saved / "compact.safetensors", CifarResNet(8, in_channels=1))
    assert_equal(compact(X), torch.export.load(path).module()(X), 1e-5)


def test_a_file_with_the_name_of_its_model(saved: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((saved / "compact.safetensors").read_bytes())
    words = ["export", str(alone), "-o", str(tmp_path / "m.pt2")]
    code, _, err = invoke(*words)
    assert code == 1
    assert "--model NAME --classes N" in err
    code, _, err = invoke(*words, "--model", "cifar-resnet8", *SMALL.split())
    assert code == 0, err
    assert (tmp_path / "m.pt2").is_file()


@pytest.mark.parametrize("given", ["run", "compact.safetensors"])
def test_prune_names_the_command_that_exports(saved: Path, trained: Path, given: str) -> None:
    named = (trained if given == "run" else saved) / given
    for more in ([], ["--keep-macs", "0.5"]):
        code, _, err = invoke("prune", str(named), "-o", "first.onnx", *more)
        assert code == 1
        assert f"dspfx export {named} -o first.onnx" in " ".join(err.split())


@NEEDS_ONNX
@pytest.mark.parametrize(
    "data", ["", "--data digits --images 64 --passes 4", "--data digits --passes 0"]
)
@pytest.mark.parametrize("keep", [0.5, 0.7])
def test_prune_writes_whole_channels_for_other_programs(
    saved: Path, tmp_path: Path, data: str, keep: float
) -> None:
    """The headline is what the file holds."""
    from onnx_graphs import macs_of, parameters_of  # noqa: PLC0415

    path = tmp_path / "small.onnx"
    sizes = "" if data else SMALL
    words = (
        f"prune cifar-resnet8 --keep-macs {keep} --weights {saved / 'weights.pt'} {sizes} {data}"
    )
    code, text, err = invoke(*words.split(), "-o", str(path), "--json")
    assert code == 0, err
    assert "whole channels" in err
    found = json.loads(text)
    report = found["report"]
    assert all(len(set(layer["inputs_of_groups"])) <= 1 for layer in report["layers"])
    assert macs_of(path) == report["emitted"]["macs"] == report["after"]["macs"]
    assert 0.9 * keep < macs_of(path) / report["before"]["macs"] <= keep
    assert parameters_of(path) < report["before"]["parameters"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("export cifar-resnet8 -o m.pt2", "dspfx prune cifar-resnet8 --keep-macs 0.5 -o m.pt2"),
        ("export cifar-resnet8 -o m.safetensors", "does not say in which format"),
        ("export nosuch.safetensors -o m.onnx", "there is no file nosuch.safetensors"),
        ("export m -o /nowhere/m.onnx", "there is no folder /nowhere"),
        ("train --data digits -o m.exe", "does not say in which format"),
        ("train --data digits -o /nowhere/m.onnx", "there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_written(words: str, text: str, tmp_path: Path) -> None:
    code, out, err = invoke(*words.split())
    assert (code, out) == (1, "")
    assert text in " ".join(err.split())


def test_groups_are_there_for_those_who_ask() -> None:
    from dspfx.commands.train import for_other_programs  # noqa: PLC0415

    assert for_other_programs(Recipe(), {})["method"] == "channels"
    for given in ({"method": "gradual"}, {"groups": 2}):
        assert for_other_programs(Recipe(), given) == given
    assert for_other_programs(Recipe(method="learned"), {}) == {}
