"""Models in parts, as wholes: the code around the parts does what it did."""

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, random_masks, randomise

IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.manual_seed(0))


class Block(nn.Module):
    scale = 3.0

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, 8, 3, padding=1)
        self.b = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 7, 1), nn.ReLU(), nn.Conv2d(7, channels, 1))
        self.norm = nn.BatchNorm2d(8)
        self.scale, self.config = 0.5, {"width": 8}  # not that of the class

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.b(self.norm(self.a(x))) * self.scale
        return x + (y if mask is None else y * mask)

    def width(self) -> int:
        return self.config["width"]

    def extra_repr(self) -> str:
        return f"{self.a.out_channels} channels"


@functools.singledispatch
def weight_of(_: nn.Module) -> float:
    return 0.0


@weight_of.register
def _(block: Block) -> float:
    return block.scale * block.width()


class Untraceable(nn.Module):
    """Goes on by the values of its images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            [Block(), nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()), Block()]
        )

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.around(x) if torch.compiler.is_compiling() or x.abs().max() > 0 else x

    def around(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


class AsksIsInstance(Untraceable):
    def around(self, x: Tensor) -> Any:
        total = x.new_zeros(())
        for block in self.blocks:
            x = block(x)
            if isinstance(block, Block):
                total = total + x.mean()
        return x + total


class AsksInTraining(Untraceable):
    """Only where nobody looks who compares in evaluation mode."""

    def around(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
            match block:
                case Block(scale=scale) if self.training:
                    x = x * scale
        return x


class Dispatches(Untraceable):
    def around(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x) + weight_of(block)
        return x


class LooksIntoClass(Untraceable):
    def around(self, x: Tensor) -> Any:
        kinds = {Block: 2.0, nn.Sequential: 1.0}
        for block in self.blocks:
            x = block(x) * kinds.get(type(block), 0.5)
        return x


class AsksForTheType(Untraceable):
    def around(self, x: Tensor) -> Any:
        return sum(block(x) for block in self.blocks if type(block) is Block)


class Refines(nn.Module):
    """Runs layers, each followed by a head that is not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, heads: Any) -> Tensor:
        total = x.new_zeros(())
        for layer, head in zip(self.layers, heads, strict=True):
            x = layer(x)
            total = total + head(x)
        return total


class GivesModules(Untraceable):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Refines(), nn.ModuleList([Block(), Block()])])

    def around(self, x: Tensor) -> Any:
        return self.blocks[0](x, self.blocks[1])


class GivesFunctions(GivesModules):
    """That call modules, and nobody sees which."""

    def around(self, x: Tensor) -> Any:
        return self.blocks[0](x, [functools.partial(head) for head in self.blocks[1]])


class Enters(Untraceable):
    """Calls what is inside a block, too."""

    def around(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x + self.blocks[2].norm(self.blocks[2].a(x)).mean()


class CountsItems(Untraceable):
    def around(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x) * (len(block) if isinstance(block, nn.Sequential) else 1)
        return x


def prepared_parts(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, dspfx.PreparedModule)}


def check(model: nn.Module) -> nn.Module:
    """`model`, prepared: equal in both modes, and equal to the compact model once it is pruned."""
    prepared = dspfx.prepare(model.eval(), IMAGES)
    assert_equal(model(IMAGES), prepared(IMAGES), tolerance=0)
    twins = copy.deepcopy(model).train(), copy.deepcopy(prepared).train()
    assert_equal(twins[0](IMAGES), twins[1](IMAGES), tolerance=1e-12)
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    assert_equal(prepared(IMAGES[:, :, :6]), dspfx.convert(prepared)(IMAGES[:, :, :6]))
    return prepared


@pytest.mark.parametrize("kind", [AsksIsInstance, AsksInTraining, Dispatches])
def test_code_that_asks_for_the_class_of_a_part_is_answered_as_before(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    model = randomise(kind()).double()
    prepared = check(model)
    assert prepared_parts(prepared) == {"blocks.0", "blocks.1", "blocks.2"}
    dspfx.save(prepared, tmp_path / "model.safetensors")
    for twin in (
        *(copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))),
        *(dspfx.convert(prepared), dspfx.narrow(prepared)),
        dspfx.load(tmp_path / "model.safetensors", kind().double()),
    ):
        first, second, _ = copy.deepcopy(twin).blocks
        assert isinstance(first, Block)
        assert isinstance(second, nn.Sequential)
        assert first.scale == 0.5  # not that of the class
        assert first.width() == 8
        assert second  # it has no length, and is not false
        assert_equal(prepared(IMAGES), twin.eval()(IMAGES))


def test_what_code_sets_on_a_part_is_copied_with_it() -> None:
    prepared = dspfx.prepare(AsksIsInstance().double(), IMAGES)
    prepared.blocks[0].scale = 7.0
    for twin in (copy.deepcopy(prepared), dspfx.convert(prepared)):
        assert twin.blocks[0].scale == 7.0


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (LooksIntoClass, {"blocks.0.a", "blocks.0.b", "blocks.1.0", "blocks.2.a", "blocks.2.b"}),
        (AsksForTheType, {"blocks.0.a", "blocks.0.b", "blocks.2.a", "blocks.2.b"}),
        (Enters, {"blocks.0", "blocks.1", "blocks.2.a", "blocks.2.b"}),
        (CountsItems, {"blocks.0", "blocks.1.0", "blocks.2"}),
    ],
)
def test_a_part_that_makes_a_difference_stays_as_it_was(
    kind: type[nn.Module], names: set[str]
) -> None:
    """Parts are looked for inside it."""
    prepared = check(randomise(kind()).double())
    assert prepared_parts(prepared) == names
    assert "left as it is: blocks." in " ".join(str(dspfx.report(prepared)).split())


@pytest.mark.parametrize("kind", [GivesModules, GivesFunctions])
def test_code_that_is_given_modules_of_the_model_to_call_is_no_part(
    kind: type[nn.Module], tmp_path: Path
) -> None:
    """What it computes depends on how they are converted, which is by themselves."""
    model = randomise(kind()).double()
    prepared = check(model)
    inside = {"blocks.0.layers.0", "blocks.0.layers.1"}
    assert prepared_parts(prepared) == {*inside, "blocks.1.0", "blocks.1.1"}
    said = " ".join(str(dspfx.report(prepared)).split())
    assert "left as it is: blocks.0, since it is given or calls 'blocks.1" in said
    dspfx.save(prepared, tmp_path / "model.safetensors")
    loaded = dspfx.load(tmp_path / "model.safetensors", kind().double())
    assert_equal(prepared(IMAGES), loaded(IMAGES), tolerance=0)


def test_a_model_that_differs_from_itself_is_refused() -> None:
    calls = []

    class Counts(Untraceable):
        def around(self, x: Tensor) -> Any:
            calls.append(x)
            return super().around(x) + len(calls)

    with pytest.raises(dspfx.DspfxError, match="two runs of it with the same inputs differ"):
        dspfx.prepare(Counts().double(), IMAGES)


class ReadsAWeight(Untraceable):
    def around(self, x: Tensor) -> Any:
        return super().around(x) + self.blocks[0].a.weight.square().sum()


class ReadsAStatistic(Untraceable):
    def around(self, x: Tensor) -> Any:
        return {"y": super().around(x), "mean": [self.blocks[2].norm.running_mean.sum()]}


@pytest.mark.parametrize("kind", [ReadsAWeight, ReadsAStatistic])
def test_code_that_reads_a_weight_of_a_part_is_found_when_it_is_converted(
    kind: type[nn.Module],
) -> None:
    prepared = dspfx.prepare(randomise(kind()).double(), IMAGES)
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    with pytest.raises(dspfx.EquivalenceError, match="the code around them differs"):
        dspfx.convert(prepared)


def test_hooks_of_children_are_called_with_the_values_that_they_had() -> None:
    """As libraries put them there, by class, before or after, and once for all or for a call."""
    seen: dict[str, list[Tensor]] = {"before": [], "after": []}
    model = randomise(Untraceable()).double().eval()
    hooked = copy.deepcopy(model)
    for block in [m for m in hooked.modules() if isinstance(m, Block)]:
        block.register_forward_hook(lambda _, __, y: seen["before"].append(y))
    prepared = dspfx.prepare(hooked, IMAGES)
    for block in [m for m in prepared.modules() if isinstance(m, Block)]:
        block.register_forward_hook(lambda _, __, y: seen["after"].append(y))
    for twin in (prepared, copy.deepcopy(prepared), dspfx.convert(prepared)):
        for outputs in seen.values():
            outputs.clear()
        y = twin(IMAGES)
        assert [len(outputs) for outputs in seen.values()] == [2, 2]
        assert_equal(y, seen["before"][1])
        assert_equal(seen["before"], seen["after"])


def test_a_name_that_prepared_modules_use_is_refused() -> None:
    class Named(Block):
        def __init__(self) -> None:
            super().__init__()
            self.graph = "a picture"

    model = Untraceable()
    model.blocks[0] = Named()
    prepared = check(model.double())
    assert prepared.blocks[0].graph == "a picture"
    assert prepared_parts(prepared) == {"blocks.0.a", "blocks.0.b", "blocks.1", "blocks.2"}


class Layers(nn.Module):
    """Calls layers one by one, the last one for nobody else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.own = nn.Conv2d(3, 6, 3), Standardised(6, 8, 3)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.encoder = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7))
        self.left, self.right = nn.Linear(7, 4), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.up(self.own(self.conv(x)).relu())
        x = self.encoder(x.mean((2, 3))) if x.abs().max() > 0 else x.mean((2, 3))
        return self.left(x), self.right(x)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def test_single_layers_are_parts_and_only_what_comes_last_in_the_whole_is_last() -> None:
    model = randomise(Layers()).double()
    prepared = check(model)
    assert list(gated_layers(prepared)) == [
        *("own.gated", "up.gated", "encoder.0", "encoder.2"),  # not `conv`, which reads images
    ]
    assert isinstance(prepared.own, Standardised)
    assert prepared.up.out_channels == 6
    assert [k for k in prepared.state_dict() if "gate" not in k] == list(model.state_dict())
    assert len(list(prepared.parameters())) == len(list(model.parameters()))
    ignoring = dspfx.PrepareConfig(ignore=("up", "encoder.0"))
    prepared = dspfx.prepare(model, IMAGES, config=ignoring)
    assert list(gated_layers(prepared)) == ["own.gated", "encoder.2"]


def test_a_model_of_single_layers_is_refused_with_the_reason() -> None:
    model = Layers()
    model.encoder = nn.Identity()
    model.left, model.right = nn.Linear(6, 4), nn.Linear(6, 3)
    with pytest.raises(dspfx.TraceError, match="control flow depends on the values of"):
        dspfx.prepare(model, IMAGES.float())


def test_single_layers_are_saved_and_trained(tmp_path: Path) -> None:
    prepared = check(randomise(Layers()).double())
    dspfx.save(prepared, tmp_path / "model.safetensors")
    loaded = dspfx.load(tmp_path / "model.safetensors", Layers().double())
    assert_equal(prepared(IMAGES), loaded(IMAGES), tolerance=0)
    model = Layers()
    model.own = nn.Conv2d(6, 8, 3)  # no narrow model has weights that are computed
    prepared = check(randomise(model).double())
    narrow = dspfx.narrow(prepared).train()
    sum(y.square().sum() for y in narrow(IMAGES)).backward()
    torch.optim.SGD(narrow.parameters(), lr=0.01).step()
    dspfx.widen(narrow, prepared)
    assert_equal(narrow.eval()(IMAGES), prepared.eval()(IMAGES))


def test_exports_and_compiles_where_a_part_is_an_instance_of_its_class(tmp_path: Path) -> None:
    compact = dspfx.convert(dspfx.prepare(AsksIsInstance().eval(), IMAGES.float()))
    dspfx.export(compact, IMAGES.float(), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert_equal(compact(IMAGES.float()), program(IMAGES.float()), 1e-5)
    assert_equal(compact(IMAGES.float()), torch.compile(compact)(IMAGES.float()), 1e-5)


class Reparametrised(nn.Module):
    """Writes the weight of a layer each time before it calls it."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.learned, self.merged = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.learned(x)
        self.merged.weight.data = self.learned.weight.data.clone()
        self.merged.bias.data = self.learned.bias.data.clone()
        return self.merged(x)


class Weighed(nn.Module):
    """Reads the weight of a layer that it calls."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() > 1e6:
            raise ValueError
        return self.conv(x) / self.conv.weight.abs().mean()


class AroundLayers(nn.Module):
    def __init__(self, inner: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 6, 3), nn.ModuleList(inner(6) for _ in range(2))
        self.head = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.abs().max() > 1e6:
            raise ValueError
        for layer in self.inner:
            x = layer(x).relu()
        return self.head(x)


@pytest.mark.parametrize(("inner", "layer"), [(Reparametrised, "merged"), (Weighed, "conv")])
def test_layers_whose_weights_the_code_around_them_uses_are_no_parts(
    inner: type[nn.Module], layer: str
) -> None:
    model = randomise(AroundLayers(inner)).double().eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.manual_seed(0))
    prepared = dspfx.prepare(model, x)
    for block in prepared.inner:
        assert type(block.get_submodule(layer)) is nn.Conv2d
    assert list(gated_layers(prepared)) == ["head.0", "head.2"]
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    compact = dspfx.convert(prepared)
    assert_equal(prepared(x), compact(x))
