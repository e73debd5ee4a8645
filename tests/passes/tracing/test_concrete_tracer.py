"""Code that counts, compares and iterates over shapes is traced; code that reads values is not."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, random_masks, randomise


class Convs(nn.Module):
    """Three convolutions, between which each test puts something awkward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 4, 1)


class AsksForSizes(Convs):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        height, width = x.shape[-2:]
        if height % 2 and x.size(1) > 3:
            x = nn.functional.pad(x, (0, 0, 0, int(height) % 2))
        for _ in range(len(x.shape) - 3):
            x = x + x.new_ones(1) * round(width / 2)
        return self.b(x[:, :, : max(height, width)])


class MakesTensorsOfSizes(Convs):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        columns = torch.arange(x.shape[3], dtype=x.dtype)
        return self.b(x + columns + torch.zeros(x.shape[2], 1, dtype=x.dtype))


class Iterates(Convs):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        halves = list(x.chunk(2, dim=1))
        kept = {"first": halves[0], "second": halves[1]}
        return self.b(torch.cat([v * 2 for v in kept.values()], 1))


class Optional(Convs):
    def forward(self, x: Tensor, scale: float = 2.0, extra: Tensor | None = None) -> Tensor:
        x = self.a(self.stem(x)) * scale
        if extra is not None:
            x = x + extra
        return self.b(x)


class HoldsATensor(Convs):
    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.full((8, 1, 1), 0.5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.stem(x)) + self.offset)


class NamesItsResults(Convs):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        return self.b(x.sort(dim=3).values + x.cummax(dim=2).indices)


X = torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "kind",
    [AsksForSizes, MakesTensorsOfSizes, Iterates, Optional, HoldsATensor, NamesItsResults],
)
def test_awkward_code_goes_through(kind: type[Convs]) -> None:
    model = randomise(kind()).double()
    prepared = dspfx.prepare(model, X)
    assert list(gated_layers(prepared)) == ["a", "b"]
    assert_equal(model(X), prepared(X), tolerance=0)
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    compact = dspfx.convert(prepared)
    assert_equal(prepared(X), compact(X))
    assert_equal(prepared(X[:1]), compact(X[:1]))
    assert_equal(prepared(X), copy.deepcopy(prepared)(X), tolerance=0)
    assert [k for k in prepared.state_dict() if "gate" not in k] == list(model.state_dict())


class AsksForItems(Convs):
    """Takes any number of images, named or not, among them how often to double them."""

    def forward(self, images: Any, *more: Tensor) -> Tensor:
        if isinstance(images, dict):
            kept = [x for name, x in images.items() if name not in ("large", "times")]
            kept += [images["large"][..., ::2]] if "large" in images else []
            x = kept[0] if images.get("only first") is not None else sum(kept)
            for _ in range(images.get("times", 1)):
                x = x * 2
        elif isinstance(images, Tensor):
            x = images
        else:
            x = sum(images) if len(images) > 1 else images[0]
        for image in more:
            x = x + image
        return self.b(self.a(self.stem(x)))


ITEMS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "list": (([X, X],), ([X],), ([X, X, X],)),
    "tuple": (((X, X),), ((X,),), ((X, X, X),)),
    "positional": ((X, X, X), (X, X), (X, X, X, X), (X,)),
    "mapping": (({"a": X, "b": X},), ({"a": X},), ({"a": X, "c": X},), ({"b": X, "a": X},)),
    "number": (({"a": X, "times": 2},), ({"a": X, "times": 3},), ({"a": X},)),
}


@pytest.mark.parametrize("kind", ITEMS)
def test_items_of_inputs_are_checked_at_every_call(kind: str) -> None:
    """Items that the example did not have were ignored, without a word."""
    inputs, *others = ITEMS[kind]
    model = randomise(AsksForItems()).double()
    prepared = dspfx.prepare(model, inputs)
    assert_equal(model(*inputs), prepared(*inputs), tolerance=0)
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    compact = dspfx.convert(prepared)
    pickled = [pickle.loads(pickle.dumps(module)) for module in (prepared, compact)]
    for module in (prepared, compact, *pickled):
        assert_equal(prepared(*inputs), module(*inputs))
        for other in others:
            with pytest.raises(AssertionError, match="other inputs"):
                module(*other)


def test_a_key_that_code_asks_for_is_checked_and_others_are_not() -> None:
    class Masked(Convs):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            y = self.b(self.a(self.stem(batch["image"])))
            return y * batch["mask"] if "mask" in batch else y

    model, mask = randomise(Masked()).double(), torch.zeros(2, 1, 1, 1).double()
    prepared = dspfx.prepare(model, ({"image": X},))
    named = {"image": X, "label": mask}
    assert_equal(model(named), prepared(named), tolerance=0)
    with pytest.raises(AssertionError, match=r"other inputs.*if"):
        prepared({"image": X, "mask": mask})


class Picky(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > 0 else -self.conv(x)


def test_a_submodule_that_reads_values_is_an_opaque_leaf() -> None:
    class HasPicky(Convs):
        def __init__(self) -> None:
            super().__init__()
            self.picky = Picky()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.picky(self.stem(x))))

    model = randomise(HasPicky()).double()
    prepared = dspfx.prepare(model, X)
    assert list(gated_layers(prepared)) == ["a", "b"]
    for x in (X, -X):
        assert_equal(model(x), prepared(x), tolerance=0)
    report = " ".join(str(dspfx.report(prepared)).split())
    assert "opaque, since it cannot be traced: picky: " in report
    assert "control flow depends on the values of 'gt'" in report
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    compact = dspfx.convert(prepared)
    for x in (X, -X):
        assert_equal(prepared(x), compact(x))


def test_a_root_that_reads_values_is_refused() -> None:
    class Reads(Convs):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(self.stem(x))
            return self.b(x) if x.sum() > 0 else x

    with pytest.raises(dspfx.TraceError, match="depends on the values of 'gt'"):
        dspfx.prepare(Reads().double(), X)


READING: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda y: y.mean().item() > 0,
    "list": lambda y: max(y[0, 0, 0].tolist()) > 0,
    "equal": lambda y: torch.equal(y, y.abs()),
    "float": lambda y: round(y.sum().item() / y.shape[0]) > 0,
    "contained": lambda y: 0.0 in y,
    "new tensor": lambda y: y.new_tensor(1).item() > 0,
}


@pytest.mark.parametrize("question", READING)
def test_code_that_reads_numbers_out_of_tensors_is_refused(question: str) -> None:
    """What it did for the example was taken for what it always does, without a word."""
    with pytest.raises(dspfx.TraceError, match="depends on the values of"):
        dspfx.prepare(randomise(Asks(READING[question])).double(), X)


def test_numbers_that_are_read_and_passed_on_are_computed_in_every_call() -> None:
    model = randomise(PassesOn(lambda y: y * y.mean().item() + y[0, 0, 0].tolist()[0])).double()
    prepared = dspfx.prepare(model, X)
    for x in (X, -X):
        assert_equal(model(x), prepared(x), tolerance=0)


@pytest.mark.parametrize(
    "inputs", [{"x": X, "scale": 3.0}, {"x": X}, (X, 3.0), {"extra": X[:1, :1, :1, :1], "x": X}]
)
def test_inputs_by_name_and_by_position(inputs: Any) -> None:
    model = randomise(Optional()).double()
    prepared = dspfx.prepare(model, inputs)
    named = inputs if isinstance(inputs, dict) else dict(zip(("x", "scale"), inputs, strict=True))
    assert_equal(model(**named), prepared(**named), tolerance=0)
    dspfx.set_masks(prepared, random_masks(prepared))
    assert_equal(prepared(**named), dspfx.convert(prepared)(**named))


def test_tracing_leaves_torch_as_it_was() -> None:
    factories = {name: getattr(torch, name) for name in ("arange", "zeros", "ones")}
    dspfx.prepare(MakesTensorsOfSizes().double(), X)
    assert all(getattr(torch, name) is factory for name, factory in factories.items())
    dspfx.prepare(nn.Sequential(*AsksForSizes().children(), nn.Dropout()).double().train(), X)


def test_flags_are_checked_at_every_call() -> None:
    """What the code branched on is part of the graph: another value is refused, never ignored."""

    class Flags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, mode: str = "plain", twice: bool = False) -> Tensor:
            x = self.b(self.a(x))
            x = self.b(x) if twice else x
            return x if mode == "plain" else -x

    model = randomise(Flags()).double()
    prepared = dspfx.prepare(model, {"x": X, "twice": True})
    for module in (prepared, dspfx.convert(prepared)):
        assert_equal(model(X, twice=True), module(X, twice=True), 1e-12)
        assert_equal(model(X, "plain", True), module(X, "plain", True), 1e-12)
        with pytest.raises(AssertionError, match="prepared with mode='plain'"):
            module(X, mode="negative", twice=True)
        with pytest.raises(AssertionError, match="prepared with twice=True"):
            module(X)


class BranchesOnSizes(nn.Module):
    """Large images are pooled; which of a number's kind they are does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        h = y.shape[-2:][0]
        if max(h, 8) > 8:
            y = F.avg_pool2d(y, 2)
        if x.dtype == torch.float64 and not x.is_cuda:
            y = y + 0
        z = self.b(y)
        assert z.shape == y.shape
        return self.c(z + y)


def test_sizes_that_code_branches_on_are_checked_at_every_call() -> None:
    """Other sizes were computed as the example was: wrong, without a word."""
    model, large = randomise(BranchesOnSizes()).double(), torch.randn(2, 3, 12, 20).double()
    prepared = dspfx.prepare(model, large)
    dspfx.prune(prepared, dspfx.Budget(macs=0.5))
    compact = dspfx.convert(prepared)
    assert compact.a.weight.shape[0] < 8  # who compares shapes does not keep channels
    told = r"(?s)other inputs.*test_concrete_tracer.py:\d+: if max"
    refused = AssertionError, torch._dynamo.exc.TorchRuntimeError  # the latter while it compiles
    fast = dspfx.compile(compact, large, engines=["inductor"])
    for module in (prepared, compact, dspfx.narrow(prepared), fast):
        assert_equal(prepared(large[..., 2:]), module(large[..., 2:]), 1e-12)
        assert_equal(prepared(large[:1, :, 1:]), module(large[:1, :, 1:]), 1e-12)
        with pytest.raises(refused, match=told):
            module(large[..., :8, :8])
        assert_equal(prepared(large), module(large), 1e-12)
    compact.float()(large.float())


TELLING: dict[str, Callable[[Tensor], Any]] = {
    "size": lambda y: y.size(2) > 8,
    "size by name": lambda y: y.size(dim=-1) > 8,
    "equal sizes": lambda y: y.shape[-2:] == (8, 8),
    "contained": lambda y: 8 in y.shape[2:],
    "product": lambda y: math.prod(y.shape[2:]) > 64,
    "numel of an image": lambda y: y.shape[2:].numel() > 64,
    "rounded": lambda y: math.ceil(y.shape[2] / 3) > 3,
    "largest": lambda y: max(y.shape) > 8,
    "iterated": lambda y: sum(1 for _ in range(y.shape[3])) > 8,
}
PASSING: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda y: torch.reshape(y, (y.shape[0], 4, y.shape[2], y.shape[3])),
    "narrow": lambda y: torch.narrow(y, 2, 0, y.shape[2] // 2),
    "roll": lambda y: torch.roll(y, (y.shape[2] // 2, 1), (2, 3)),
    "pool": lambda y: y * F.avg_pool2d(y, (y.shape[2], y.shape[3])),
    "pool of a shape": lambda y: y * F.avg_pool2d(y, y.size()[2:]),
    "unflatten": lambda y: torch.unflatten(y.flatten(2), 2, (y.shape[2], y.shape[3])),
    "index": lambda y: y[:, :, y.shape[2] // 2 :],
    "scalar": lambda y: torch.add(y, y.shape[2], alpha=y.shape[3]),
    "interpolate": lambda y: F.interpolate(y, size=(y.shape[2] * 2, y.shape[3])),
}


class Asks(Convs):
    def __init__(self, question: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.question = question

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(self.stem(x)))
        return -y if self.question(y) else y


class PassesOn(Asks):
    def forward(self, x: Tensor) -> Any:
        return self.question(self.b(self.a(self.stem(x))))


@pytest.mark.parametrize("question", TELLING)
def test_whatever_code_is_told_of_sizes_is_checked(question: str) -> None:
    """The convolutions take two rows and two columns away."""
    model, x = randomise(Asks(TELLING[question])).double(), torch.randn(2, 3, 10, 10).double()
    prepared = dspfx.prepare(model, x).eval()
    assert_equal(model(x), prepared(x), 1e-12)
    with pytest.raises(AssertionError, match="other inputs"):
        prepared(torch.randn(2, 3, 12, 14).double())


@pytest.mark.parametrize("question", PASSING)
def test_sizes_that_are_passed_on_are_not_checked(question: str) -> None:
    """Torch looks at the numbers among its arguments before it sees that one is a proxy."""
    model, x = randomise(PassesOn(PASSING[question])).double(), torch.randn(2, 3, 10, 10).double()
    prepared = dspfx.prepare(model, x).eval()
    for other in (x, torch.randn(3, 3, 16, 20).double(), torch.randn(1, 3, 12, 13).double()):
        assert_equal(model(other), prepared(other), 1e-12)


def test_counts_that_code_makes_are_checked_at_every_call() -> None:
    class PerSample(Convs):
        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(self.stem(x)))
            return torch.stack([y[i] * (i + 1) for i in range(x.shape[0])])

    prepared = dspfx.prepare(PerSample().double(), X)
    assert_equal(prepared(X), dspfx.convert(prepared)(X))
    with pytest.raises(AssertionError, match=r"other inputs.*for i in range"):
        prepared(torch.cat([X, X]))
