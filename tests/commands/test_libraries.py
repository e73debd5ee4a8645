"""Networks by name: what is said of names that are none, and what timm finds elsewhere."""

from pathlib import Path

import pytest
import torch
from command_line import invoke

import dspfx
from dspfx.recipe import Recipe
from dspfx.recipe.images.sources import open_source
from dspfx.recipe.networks.architectures import Architecture
from dspfx.recipe.networks.libraries import library_of, preprocessing_of


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnt18", "resnet18"), ("torchvision/mobilenetv2", "mobilenet_v2"), ("yolov8n", "volo_d")],
)
@pytest.mark.parametrize("command", ["inspect", "prune --keep-macs 0.5"])
def test_names_that_are_none(name: str, nearest: str, command: str) -> None:
    """One line, and nothing before it."""
    if nearest != "mobilenet_v2":
        pytest.importorskip("timm")
    first, *rest = command.split()
    code, out, err = invoke(first, name, *rest)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: there is no model '{name}'")
    assert len(err.splitlines()) == 1
    assert "nearest names are" in err
    assert nearest in err


@pytest.mark.parametrize("named", ["runs/nope", "./nope", "somewhere/else/model"])
@pytest.mark.parametrize("command", ["inspect", "bench", "prune --keep-macs 0.5"])
def test_runs_that_are_not_there(named: str, command: str) -> None:
    first, *rest = command.split()
    code, _, err = invoke(first, named, *rest)
    assert code == 1
    assert err.startswith(f"error: there is no file or folder {named}")
    assert len(err.splitlines()) == 1


def test_what_timm_finds_elsewhere(tmp_path: Path) -> None:
    """As from the Hub, but from a folder: built with its weights and its preprocessing."""
    hub = pytest.importorskip("timm.models")
    import timm  # noqa: PLC0415

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    hub.save_for_hf(model, tmp_path / "of_mine", safe_serialization=True)
    name = f"local-dir:{tmp_path / 'of_mine'}"
    assert library_of(name) == ("timm", name)
    assert library_of("hf-hub:timm/resnet18.a1_in1k")[0] == "timm"
    size = preprocessing_of(name).size
    assert size == model.pretrained_cfg["input_size"][-1]
    found = Architecture(name, 7, 3, size, pretrained=True)
    assert not found.runs_code
    built = found.build(load=True).state_dict()
    assert all(torch.equal(value, built[key]) for key, value in model.state_dict().items())
    with pytest.warns(dspfx.DspfxWarning, match="are for 7 classes"):
        Architecture(name, 3, 3, size, pretrained=True).build(load=True)


def test_a_folder_in_which_timm_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    code, out, err = invoke("inspect", f"local-dir:{tmp_path}")
    assert (code, out) == (1, "")
    assert "error: timm cannot find local-dir:" in err


@pytest.mark.parametrize(("images", "unused"), [(100, "1,337 more training images"), (None, None)])
def test_a_source_says_what_it_does_not_take(images: int | None, unused: str | None) -> None:
    text = open_source(Recipe(data="digits", images=images)).describe()
    assert ("not used, see --images" in text) == (unused is not None)
    assert unused is None or unused in text
