"""Models in another form than the code that was written, and modules that rebuild themselves."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, random_masks, randomise

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.manual_seed(0))


class Branches(nn.Module):
    """Two convolutions that can be made one, as many libraries have them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.one: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) if self.one is None else self.one(x)

    def reparameterize(self) -> None:
        self.one = copy.deepcopy(self.a)
        with torch.no_grad():
            self.one.weight += nn.functional.pad(self.b.weight, (1, 1, 1, 1))
            self.one.bias += self.b.bias
        del self.a, self.b

    def fuse(self) -> nn.Module:
        self.reparameterize()
        return self


class Net(nn.Module):
    def __init__(self, choosy: bool = False) -> None:
        super().__init__()
        self.stem, self.choosy = nn.Conv2d(3, 6, 3), choosy
        self.inner = nn.Sequential(Branches(), nn.ReLU(), nn.Conv2d(6, 6, 1))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.choosy and x.abs().max() <= 0:
            return x
        return self.head(self.inner(x).mean((2, 3)))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model)


def with_compiled_children(model: Net) -> nn.Module:
    model.inner = torch.compile(model.inner)
    model.head.compile()
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


@pytest.mark.parametrize("compile", [compiled, with_compiled_children, compiled_in_place])
@pytest.mark.parametrize("choosy", [False, True])
def test_compiled_modules_are_taken_for_what_they_were_compiled_from(
    compile: Callable[[Any], Any], choosy: bool
) -> None:
    model = randomise(Net(choosy)).eval()
    keys, y = list(model.state_dict()), model(IMAGES)
    given = compile(model)
    prepared = dspfx.prepare(given, IMAGES)
    assert list(gated_layers(prepared)) == ["inner.0.a", "inner.0.b", "inner.2"]
    assert [key for key in prepared.state_dict() if "gate" not in key] == keys
    assert_equal(y, prepared(IMAGES), tolerance=0)
    assert not any("_orig_mod" in name for name, _ in prepared.named_modules())
    assert ("_orig_mod" in str(given)) == ("Optimized" in str(given))  # as it was


def test_a_compiled_forward_belongs_to_the_original() -> None:
    model = Net()
    model.inner.forward = torch.compile(model.inner.forward)
    with pytest.raises(
        dspfx.PrepareError, match="'forward' of 'inner', a Sequential, was replaced"
    ):
        dspfx.prepare(model, IMAGES)


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (IMAGES,)).module()


def traced(model: nn.Module) -> Any:
    with warnings.catch_warnings(action="ignore"):  # it is deprecated, and used
        return torch.jit.trace(model, IMAGES)


def scripted(model: nn.Module) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(model)


@pytest.mark.parametrize("make", [exported, scripted, traced])
def test_models_without_code_are_refused(make: Callable[[Any], Any]) -> None:
    given = make(nn.Sequential(Net().inner[2:], nn.Conv2d(3, 3, 1))[1].eval())
    for model in (given, nn.Sequential(given, nn.Flatten(), nn.ReLU())):
        with pytest.raises(dspfx.PrepareError, match="the module that it was made from"):
            dspfx.prepare(model, IMAGES)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of scripted modules
@pytest.mark.parametrize("make", [scripted, traced])
def test_modules_without_code_are_called_whole_and_named(make: Callable[[Any], Any]) -> None:
    inner = make(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval())
    model = nn.Sequential(inner, nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)).eval()
    prepared = dspfx.prepare(model, IMAGES)
    assert "3" in gated_layers(prepared)
    assert "and called whole; to prune it" in " ".join(str(dspfx.report(prepared)).split())
    dspfx.set_masks(prepared, random_masks(prepared))
    assert_equal(prepared(IMAGES), dspfx.convert(prepared)(IMAGES), 1e-5)


@pytest.mark.parametrize("method", ["fuse", "reparameterize"])
@pytest.mark.parametrize("choosy", [False, True])
def test_prepared_modules_do_not_rebuild_themselves(method: str, choosy: bool) -> None:
    """In models with a graph and in parts, copies and those that were converted."""
    model = randomise(Net(choosy)).eval()
    prepared = dspfx.prepare(model, IMAGES)
    for twin in (prepared, copy.deepcopy(prepared)):
        blocks = [m for m in twin.modules() if isinstance(m, Branches)]
        assert blocks
        for block in blocks:
            with pytest.raises(dspfx.PrepareError, match="before dspfx"):
                getattr(block, method)()
        assert_equal(model(IMAGES), twin(IMAGES), tolerance=0)
    getattr(model.inner[0], method)()
    rebuilt = dspfx.prepare(model, IMAGES)
    assert "inner.0.one" in gated_layers(rebuilt)
    assert_equal(prepared(IMAGES), rebuilt(IMAGES), tolerance=1e-4)


def test_parts_do_not_rebuild_themselves() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3)
            self.blocks = nn.ModuleList([Branches(), Branches()])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.blocks[1](self.blocks[0](x)) if x.abs().max() > 0 else x

    prepared = dspfx.prepare(Around(), IMAGES)
    for model in (prepared, dspfx.convert(prepared)):
        with pytest.raises(dspfx.PrepareError, match="before dspfx"):
            model.blocks[1].reparameterize()


def test_timm_does_not_rebuild_what_is_prepared() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("repvgg_a0", num_classes=4).eval()
    prepared = dspfx.prepare(model, torch.randn(2, 3, 32, 32))
    with pytest.raises(dspfx.PrepareError, match="before dspfx"):
        timm.utils.reparameterize_model(prepared)


class Named(nn.Module):
    """Whose children are called as other modules' methods are."""

    def __init__(self, last: str) -> None:
        super().__init__()
        self.a, self.fuse, self.b = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)
        setattr(self, last, nn.Conv2d(16, 4, 1))
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.last)(self.b(self.fuse(self.a(x))).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("last", ["c", "reparameterize", "switch_to_deploy"])
def test_children_may_be_called_like_methods_that_rebuild(last: str) -> None:
    model = randomise(Named(last)).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    prepared = dspfx.prepare(model, x)
    assert_equal(model(x), prepared(x), tolerance=0)
    dspfx.set_masks(prepared, random_masks(prepared))
    assert_equal(prepared(x), dspfx.convert(prepared)(x))
