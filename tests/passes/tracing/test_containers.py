"""What a model returns comes back as itself: of its class, with its attributes and keys."""

import copy
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, random_masks, randomise

SIZES = ((2, 3, 16, 16), (4, 3, 12, 20))


class Output(OrderedDict):  # type: ignore[type-arg]
    """As transformers has it: fields that are None are no keys, but attributes."""

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        first = getattr(self, names[0])
        if not isinstance(first, Tensor | None):
            raise TypeError(f"{type(self).__name__} begins with a tensor")
        for name in names:
            if getattr(self, name) is not None:
                super().__setitem__(name, getattr(self, name))

    def __getitem__(self, key: Any) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.keys() and value is not None:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self[key] for key in self.keys())


@dataclass
class Features(Output):
    last: Any = None
    states: Any = None
    attentions: Any = None


@dataclass
class Classified(Output):
    loss: Any = None
    logits: Any = None
    features: Any = None


class Pair(NamedTuple):
    first: Any
    second: Any


class Bag(dict):  # type: ignore[type-arg]
    """A dict whose keys are attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Rows(list):  # type: ignore[type-arg]
    pass


@dataclass
class Record:
    value: Any
    name: str = "record"
    more: Any = None


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x).relu()
        y = self.b(x).relu()
        return Features(last=y, states=(x, y))


class Model(nn.Module):
    """The values travel between submodules in a container, too."""

    def __init__(self, pack: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Conv2d(12, 6, 1)
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        found = self.encoder(x)
        assert found.attentions is None
        assert "attentions" not in found
        last = found[0] + found["last"] + found.states[1]
        return self.pack(found, self.head(last))


def in_model_output(found: Any, y: Tensor) -> Any:
    return Classified(logits=y)


def nested(found: Any, y: Tensor) -> Any:
    return Classified(logits=y, features=(found, {"again": Features(last=y)}))


def ordered(found: Any, y: Tensor) -> Any:
    return OrderedDict(out=y, aux=OrderedDict(found))


def by_default(found: Any, y: Tensor) -> Any:
    packed: Any = defaultdict(list, {0: [y]})
    packed["states"] += found.states
    return packed


def named(found: Any, y: Tensor) -> Any:
    return Pair(y, [Pair(found.last, None)])


def bagged(found: Any, y: Tensor) -> Any:
    return Bag(y=y, rows=Rows(found.states))


def recorded(found: Any, y: Tensor) -> Any:
    return [Record(y, more={"a": Record(found.last, "b")})]


PACKED = (in_model_output, nested, ordered, by_default, named, bagged, recorded)


def tensors(found: Any) -> Iterator[Tensor]:
    """By way of what a container offers, and not by the code that is tested."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Output):
        yield from tensors(found.to_tuple())
    elif isinstance(found, dict):
        yield from tensors(list(found.values()))
    elif isinstance(found, Record):
        yield from tensors([found.value, found.more])
    else:
        for item in found or ():
            yield from tensors(item)


@pytest.mark.parametrize("pack", PACKED)
def test_a_container_comes_back_as_itself(pack: Callable[..., Any], tmp_path: Path) -> None:
    model = randomise(Model(pack)).double().eval()
    inputs = [torch.randn(size).double() for size in SIZES]
    prepared = dspfx.prepare(model, inputs[0])
    assert list(gated_layers(prepared)) == ["encoder.b", "head"]
    for mode in (True, False):
        for x in inputs:
            assert_equal(model.train(mode)(x), prepared.train(mode)(x), tolerance=0)
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    compact = dspfx.convert(prepared)
    dspfx.save(prepared, tmp_path / "prepared.safetensors")
    dspfx.save(compact, tmp_path / "compact.safetensors")
    loaded = [dspfx.load(tmp_path / f"{n}.safetensors", model) for n in ("prepared", "compact")]
    twins = [pickle.loads(pickle.dumps(copy.deepcopy(m))) for m in (prepared, compact)]
    for x in inputs:
        expected = prepared(x)
        before = list(tensors(expected))
        for module in (compact, *loaded, *twins):
            found = module(x)
            assert_equal(expected, found)
            after = list(tensors(found))
            assert len(before) == len(after) > 0
            assert all(torch.allclose(a, b) for a, b in zip(before, after, strict=True))


def test_a_model_output_keeps_attributes_and_keys() -> None:
    model = randomise(Model(in_model_output)).double().eval()
    x = torch.randn(SIZES[1]).double()
    found = dspfx.convert(dspfx.prepare(model, torch.randn(SIZES[0]).double()))(x)
    assert type(found) is Classified
    assert list(found) == ["logits"]
    assert found.loss is None
    assert found.features is None
    assert found["logits"] is found[0] is found.logits
    assert_equal(model(x).logits, found.logits)
    found.logits = found.logits * 2
    assert_equal(model(x)[0] * 2, found["logits"])


@pytest.mark.parametrize("pack", [ordered, by_default])
def test_containers_that_torch_knows_are_exported(pack: Callable[..., Any], tmp_path: Path) -> None:
    model, x = randomise(Model(pack)).double().eval(), torch.randn(SIZES[1]).double()
    compact = dspfx.convert(dspfx.prepare(model, torch.randn(SIZES[0]).double()))
    dspfx.export(compact, torch.zeros(SIZES[1]).double(), tmp_path / "model.pt2")
    program: Any = torch.export.load(tmp_path / "model.pt2")
    assert_equal(list(tensors(compact(x))), list(tensors(program.module()(x))))


def test_containers_that_torch_does_not_know_cannot_be_exported(tmp_path: Path) -> None:
    x = torch.randn(SIZES[0])
    for pack, name in ((bagged, "Bag"), (named, "Pair"), (in_model_output, "Classified")):
        compact = dspfx.convert(dspfx.prepare(randomise(Model(pack)).eval(), x))
        with pytest.raises(dspfx.ExportError, match=name):
            dspfx.export(compact, x, tmp_path / "model.pt2")


class Undecided(nn.Module):
    """Has no graph, and returns containers in which something is None."""

    def __init__(self, pack: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.pack, self.conv = pack, nn.Conv2d(16, 16, 1)

    def forward(self, given: Any) -> Any:
        x = given["x"]
        if x.sum() > 1e9:
            x = x * 2
        return self.pack(self.conv(x))


GIVEN: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Any]]] = {
    "model output": (lambda y: Features(last=y), lambda f: (f.last, f.states)),
    "tuple": (lambda y: (y, None), lambda f: f),
    "dict": (lambda y: OrderedDict(y=y), lambda f: (f["y"], f.get("aux"))),
    "record": (Record, lambda f: (f.value, f.more)),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_what_an_opaque_module_leaves_out_is_none(kind: str) -> None:
    """It was a value of the graph, which is never None to the code that asks."""
    pack, unpack = GIVEN[kind]

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.leaf = nn.Conv2d(3, 16, 3), Undecided(pack)
            self.b, self.c = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Any:
            y, more = unpack(self.leaf(OrderedDict(x=self.b(self.a(x)))))
            return self.c(y if more is None else y + more)

    model = randomise(Asks()).double().eval()
    inputs = [torch.randn(size).double() for size in SIZES]
    prepared = dspfx.prepare(model, inputs[0])
    dspfx.set_masks(prepared, {"c": random_masks(prepared)["c"]})
    compact = dspfx.convert(prepared)
    for x in inputs:
        assert_equal(prepared(x), compact(x))
    leaf: Any = prepared.get_submodule("leaf")
    leaf.pack = lambda y: Features(y, y) if kind == "model output" else (y, y)
    if kind in ("model output", "tuple"):
        with pytest.raises(AssertionError, match="other inputs"):
            prepared(inputs[0])


def test_code_that_makes_what_cannot_be_made_again_stays_code() -> None:
    class Odd(dict):  # type: ignore[type-arg]
        def __init__(self, first: Any, second: Any) -> None:
            super().__init__(first=first, second=second)

    for pack, why in (
        (lambda f, y: Odd(y, f.last), "Odd"),
        (lambda f, y: defaultdict(lambda: 0, y=y), "cannot be found by its name"),
    ):
        model, x = randomise(Model(pack)).double().eval(), torch.randn(SIZES[0]).double()
        prepared = dspfx.prepare(model, x)
        assert not isinstance(prepared, dspfx.PreparedModule)
        assert why in str(dspfx.report(prepared))
        assert_equal(model(x), prepared(x), tolerance=0)
