"""Types and devices that code reads of its parameters: they follow the model to another type."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.model.gating import Task, gate
from dspfx.passes.sandbox.calls import Call, evaluate
from dspfx.storage.container import Archive, read, write
from helpers import assert_equal, random_masks, randomise

Read = Callable[["Network"], nn.Parameter]


def first(module: nn.Module) -> nn.Parameter:
    return next(module.parameters())


def first_floating(module: nn.Module) -> nn.Parameter:
    """As libraries find the type of a model."""
    return next(p for name, p in module.named_parameters() if name and p.is_floating_point())


def of_a_layer(module: nn.Module) -> nn.Parameter:
    weight: nn.Parameter = module.get_submodule("b").weight
    return weight


class Network(nn.Module):
    """Makes tensors of the type, and at the place, that it is in."""

    read: Read = staticmethod(first)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)

    @property
    def dtype(self) -> torch.dtype:
        return type(self).read(self).dtype

    @property
    def device(self) -> torch.device:
        return type(self).read(self).device

    def forward(self, x: Tensor) -> Any:
        x = x.to(self.dtype)
        steps = torch.arange(4, dtype=self.dtype, device=self.device) / 3
        table = torch.tensor([1.5, -0.5, 2.0, 1.0]).to(device=self.device, dtype=self.dtype)
        y = self.c(self.b(self.a(x).relu()).relu()).to(self.device)
        limit = torch.finfo(self.dtype).max
        return (y + (steps * table).view(1, 4, 1, 1)).clamp(max=limit), {"type": self.dtype}


class AsLibraries(Network):
    read = staticmethod(first_floating)


class OfALayer(Network):
    read = staticmethod(of_a_layer)


class InParts(nn.Module):
    """Goes on by the values of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 3, 1), AsLibraries()

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.body(x) if x.abs().max() > 0 else x


@pytest.mark.parametrize("kind", [Network, AsLibraries, OfALayer, InParts])
def test_types_that_code_reads_of_parameters_follow_the_model(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    model = randomise(kind()).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(0))
    prepared = dspfx.prepare(model, x)
    assert [k for k in prepared.state_dict() if "gate" not in k] == list(model.state_dict())
    assert all(type(p) is nn.Parameter for p in prepared.parameters())
    assert_equal(model(x), prepared(x), tolerance=0)
    wide, exact = copy.deepcopy(prepared).double(), x.double()
    expected, actual = copy.deepcopy(model).double()(exact), wide(exact)
    assert_equal(expected[0], actual[0], tolerance=0)
    assert expected[1] == actual[1] == {"type": torch.float64}
    narrow = copy.deepcopy(prepared).bfloat16()(x.bfloat16())
    assert narrow[1] == {"type": torch.bfloat16}
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    dspfx.set_masks(wide, dspfx.get_masks(prepared))
    compact = dspfx.convert(prepared)
    assert_equal(prepared(x), compact(x), 1e-5)
    dspfx.save(wide, tmp_path / "model.safetensors")
    for twin in (
        *(dspfx.convert(wide), pickle.loads(pickle.dumps(dspfx.convert(wide)))),
        dspfx.load(tmp_path / "model.safetensors", kind().double()),
    ):
        assert_equal(wide(exact)[0], twin.eval()(exact)[0])
    assert compact.double()(exact)[1] == {"type": torch.float64}


def test_models_that_read_no_type_get_no_buffers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    prepared = dspfx.prepare(model, torch.randn(2, 3, 8, 8))
    assert not [name for name, _ in prepared.named_buffers() if "gate" not in name]


def test_a_model_that_reads_its_type_is_exported(tmp_path: Path) -> None:
    class OneOutput(Network):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)[0]

    x = torch.randn(2, 3, 8, 8)
    compact = dspfx.convert(dspfx.prepare(randomise(OneOutput()).eval(), x))
    dspfx.export(compact, x, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert_equal(compact(x), program(x), 1e-5)
    dspfx.export(compact, x, tmp_path / "model.onnx")


def test_files_of_versions_that_took_types_for_constants_are_read(tmp_path: Path) -> None:
    model = randomise(Network()).eval()
    x = torch.randn(2, 3, 8, 8)
    root = copy.deepcopy(model)
    call = Call((x,))
    task = Task(dspfx.PrepareConfig(), tracing=0)
    prepared = gate(root, call, task, evaluate(root, call))
    assert "type_of" not in prepared.code
    dspfx.save(prepared, tmp_path / "model.safetensors")
    archive = read(tmp_path / "model.safetensors", 2**24)
    for part in archive.plan["parts"]:
        del part["tracing"], part["outside"]
    write(tmp_path / "older.safetensors", Archive(archive.plan, archive.tensors))
    for name in ("model", "older"):
        loaded = dspfx.load(tmp_path / f"{name}.safetensors", model)
        assert_equal(model(x)[0], loaded(x)[0], tolerance=0)
        dspfx.save(loaded, tmp_path / f"{name}.safetensors")
