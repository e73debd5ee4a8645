"""Quantised models in files: bit for bit, without pickle."""

import dataclasses
from pathlib import Path

import pytest
import torch
from detector import IMAGES, Detector
from groups import grouped
from small import Small, X, pruned
from torch import nn

import dspfx
from dspfx.storage import container as archive
from dspfx.storage.blueprint import Blueprint
from dspfx.utils.typed_json import from_json, to_json
from helpers import assert_equal, unchanged

pytest.importorskip("torchao")


def round_trip(model: nn.Module, fresh: nn.Module, folder: Path) -> nn.Module:
    file, again = folder / "model", folder / "again"
    dspfx.save(model, file)
    with unchanged(fresh):
        loaded = dspfx.load(file, fresh)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert str(dspfx.report(loaded)) == str(dspfx.report(model))
    dspfx.save(loaded, again)
    assert again.read_bytes() == file.read_bytes()
    return loaded


@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_saved_is_loaded(groups: int, tmp_path: Path) -> None:
    compact = dspfx.convert(pruned(Small(16))) if groups == 1 else grouped(Small(16))
    quantized = dspfx.quantize(compact, [X])
    loaded = round_trip(quantized, Small(16), tmp_path)
    assert isinstance(loaded, dspfx.CompactModule)
    assert loaded.quantization == quantized.quantization
    for size in (1, 3):
        x = torch.randn(size, 3, 12, 9)
        assert_equal(quantized(x), loaded(x), tolerance=0)
    dspfx.save(compact, tmp_path / "float32")
    assert (tmp_path / "model").stat().st_size < (tmp_path / "float32").stat().st_size


def test_models_in_parts(tmp_path: Path) -> None:
    images = [image.float() for image in IMAGES]
    compact = dspfx.convert(pruned(Detector(), (images,)))
    quantized = dspfx.quantize(compact, [images], call=compact)
    loaded = round_trip(quantized, Detector(), tmp_path)
    assert_equal(quantized(images), loaded(images), tolerance=0)


def test_a_plan_of_other_places_is_refused(tmp_path: Path) -> None:
    """Though the digest of the file is right."""
    dspfx.save(dspfx.quantize(dspfx.convert(pruned(Small())), [X]), tmp_path / "m")
    found = archive.read(tmp_path / "m", 2**30)
    plain: Blueprint = from_json(Blueprint, found.plan["parts"][0])
    assert plain.quantization is not None
    how = plain.quantization.how

    def refused(**changes: object) -> str:
        places = dataclasses.replace(how.places, **changes)  # type: ignore[arg-type]
        own = dataclasses.replace(how, places=places)
        record = dataclasses.replace(plain.quantization, how=own)  # type: ignore[type-var]
        part = to_json(dataclasses.replace(plain, quantization=record))
        archive.write(
            tmp_path / "n", archive.Archive({**found.plan, "parts": [part]}, found.tensors)
        )
        with pytest.raises(dspfx.LoadError) as raised:
            dspfx.load(tmp_path / "n", Small())
        return str(raised.value)

    first, *others = how.places.activations
    assert "rounded in another way" in refused(activations=(*others, first))
    assert "no value leads from 'x' to 'head'" in refused(activations=((("x", "head"),), *others))
    assert "a scale is of nothing" in refused(activations=((), *others))
    assert refused(weights=(("x", "conv2d"), *how.places.weights[1:]))


def test_scales_are_checked(tmp_path: Path) -> None:
    dspfx.save(dspfx.quantize(dspfx.convert(pruned(Small())), [X]), tmp_path / "m")
    found = archive.read(tmp_path / "m", 2**30)
    for key, value in (("scale", 0.0), ("scale", -1.0), ("zero_point", 256), ("zero_point", -1)):
        plan = archive.read(tmp_path / "m", 2**30).plan
        plan["parts"][0]["quantization"]["how"]["scales"][0][key] = value
        archive.write(tmp_path / "n", archive.Archive(plan, found.tensors))
        with pytest.raises(dspfx.LoadError, match=r"is no scale|is no zero point"):
            dspfx.load(tmp_path / "n", Small())


def test_reports_say_what_stays_in_float32() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.up = Small(), nn.ConvTranspose2d(4, 4, 2)
            self.lstm = nn.LSTM(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(self.up(self.small(x)[:, :, None, None]).flatten(2).mT)[0]

    compact = dspfx.convert(pruned(Net()))
    before = dspfx.report(compact)
    report = dspfx.report(dspfx.quantize(compact, [X]))
    assert report.layers == before.layers
    assert report.notes == (
        "4 layers compute with integers of 8 bits",
        "in float32: up: ConvTranspose2d is called whole, and has no form with integers",
        "in float32: lstm: LSTM is called whole, and has no form with integers",
    )
    assert "in float32: up" in str(report)
