"""`convert` and `compile`: what comes out can be used like any inference graph."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, ResNet

import dspfx
from dspfx.passes.transforms import compact as compact_pass
from dspfx.passes.transforms.plan import LayerPlan
from helpers import assert_equal, macs, random_masks, randomise, unchanged


@pytest.fixture(scope="module")
def pair() -> tuple[dspfx.PreparedModule, dspfx.CompactModule]:
    model = randomise(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7))
    prepared = dspfx.prepare(model, torch.randn(2, 3, 64, 64)).eval()
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.2))
    return prepared, dspfx.convert(prepared)


class OperatorNames(TorchDispatchMode):
    """Collects the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_it_is_an_evaluation_graph_of_its_own(
    pair: tuple[dspfx.PreparedModule, dspfx.CompactModule],
) -> None:
    prepared, compact = pair
    assert isinstance(compact, torch.fx.GraphModule)
    assert not any(module.training for module in compact.modules())
    kinds = {type(module).__module__.split(".")[0] for module in compact.modules()}
    assert kinds <= {"torch", "dspfx"}
    inner = [m for m in compact.modules() if m is not compact]
    assert {type(m).__module__.split(".")[0] for m in inner} <= {"torch", "dspfx"}
    with OperatorNames() as called:
        compact(X)
    assert {name.split("::")[0] for name in called.names} == {"aten"}
    mine = {t.data_ptr() for t in (*compact.parameters(), *compact.buffers())}
    theirs = {t.data_ptr() for t in (*prepared.parameters(), *prepared.buffers())}
    assert not mine & theirs
    assert not any(isinstance(m, nn.BatchNorm2d) for m in compact.modules())


def test_copies_and_pickles(pair: tuple[dspfx.PreparedModule, dspfx.CompactModule]) -> None:
    prepared, compact = pair
    expected = prepared(X)
    for twin in (copy.deepcopy(compact), pickle.loads(pickle.dumps(compact))):
        assert isinstance(twin, dspfx.CompactModule)
        assert_equal(compact(X), twin(X), tolerance=0)
        assert str(dspfx.report(twin)) == str(dspfx.report(compact))
    assert_equal(expected, compact(X), tolerance=1e-4)


def test_exports_and_traces(pair: tuple[dspfx.PreparedModule, dspfx.CompactModule]) -> None:
    prepared, compact = pair
    expected = prepared(X).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace announces its retirement
        assert_equal(expected, torch.jit.trace(compact, X)(X), 1e-4)
        assert_equal(expected, torch.export.export(compact, (X,)).module()(X), 1e-4)


def test_compiles() -> None:
    """The stem, a block with a shortcut of its own and the head: each stage takes long."""
    whole = randomise(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7))
    stem = (whole.conv1, whole.bn1, whole.relu, whole.maxpool)
    head = (whole.avgpool, nn.Flatten(), nn.Linear(128, 7))
    model = nn.Sequential(*stem, whole.layer2, *head)
    prepared = dspfx.prepare(model, X).eval()
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.2))
    fast = dspfx.compile(dspfx.convert(prepared), X, engines=["own", "inductor"])
    assert_equal(prepared(X).detach(), fast(X), 1e-4)
    assert not fast(X).requires_grad
    assert_equal(prepared(X[:1]).detach(), fast(X[:1]), 1e-4)


def test_other_batch_and_image_sizes(
    pair: tuple[dspfx.PreparedModule, dspfx.CompactModule],
) -> None:
    prepared, compact = pair
    for shape in ((1, 3, 64, 64), (5, 3, 96, 80), (0, 3, 64, 64)):
        x = torch.randn(shape)
        if len(x):
            assert_equal(prepared(x), compact(x), 1e-4)
        else:
            assert compact(x).shape == (0, 7)


def test_without_pruning_it_is_the_original_function() -> None:
    model = randomise(torchvision.models.mobilenet_v2(weights=None, num_classes=3)).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with unchanged(model):
        compact = dspfx.convert(dspfx.prepare(model, x))
    assert_equal(model(x), compact(x))
    assert macs(compact, x) == macs(model, x)
    gathers = [n for n in compact.graph.nodes if n.target in (torch.index_select, torch.narrow)]
    assert gathers == []


def test_a_residual_stream_shrinks_where_every_writer_is_dead() -> None:
    prepared = dspfx.prepare(torchvision.models.resnet18(weights=None), torch.randn(2, 3, 32, 32))
    masks = {}
    for name in ("layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"):
        mask = dspfx.get_masks(prepared)[name]
        mask[:40] = False
        masks[name] = mask
    dspfx.set_masks(prepared, masks)
    compact = dspfx.convert(prepared)
    assert compact.get_submodule("layer2.0.conv2").out_channels == 88
    assert compact.get_submodule("layer3.0.conv1").in_channels == 88
    assert compact.get_submodule("layer3.0.downsample.0").in_channels == 88


def test_groups_of_equal_size_are_one_grouped_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, padding=1))
    prepared = dspfx.prepare(model, torch.randn(2, 3, 5, 5))
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[0::2, :4] = True
    mask[1::2, 4:] = True
    dspfx.set_masks(prepared, {"1": mask})
    compact = dspfx.convert(prepared, cost_model=dspfx.FEWEST_WEIGHTS)
    assert [n.op for n in compact.graph.nodes].count("call_function") == 0
    conv = compact.get_submodule("1.0")
    assert (conv.groups, conv.in_channels, conv.out_channels) == (2, 8, 6)


def test_a_norm_that_is_not_alone_is_not_folded() -> None:
    class TwoReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(self.stem(x))
            return self.norm(y) + y

    model = randomise(TwoReaders()).eval()
    x = torch.randn(2, 3, 4, 4)
    compact = dspfx.convert(dspfx.prepare(model, x))
    assert any(isinstance(m, nn.BatchNorm2d) for m in compact.modules())
    assert_equal(model(x), compact(x), 1e-5)


@pytest.mark.parametrize("early", [True, False])
def test_norms_that_synchronise_are_folded(early: bool) -> None:
    layers = (nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1))
    model = nn.Sequential(*layers, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    x = torch.randn(2, 3, 4, 4)
    plain = randomise(model).eval()
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)) if early else plain
    prepared: Any = dspfx.prepare(model, x)
    if not early:
        prepared = nn.SyncBatchNorm.convert_sync_batchnorm(prepared)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in prepared.modules())
    assert_equal(plain(x), prepared(x), 1e-6)
    dspfx.set_masks(prepared, random_masks(prepared))
    compact = dspfx.convert(prepared)
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in compact.modules())
    assert_equal(prepared(x), compact(x), 1e-5)


def test_modules_called_twice_are_compacted_call_by_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(2):
                x = torch.relu(self.norm(self.conv(x)))
            return x

    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    prepared = dspfx.prepare(randomise(Twice()).double(), x)
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.4))
    assert_equal(prepared.eval()(x), dspfx.convert(prepared)(x))


class PositionsTwice(nn.Module):
    """A depthwise layer for tokens, whose channels nobody can follow, and an image, as in CoaT."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1)
        self.a = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.positions = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        tokens = x.flatten(2).transpose(1, 2).sort(1)[0].reshape(len(x), -1)
        first = self.positions(tokens.view(len(x), 8, 6, 6))
        return self.head(first + self.positions(self.a(x)))


def test_a_gate_stands_behind_the_call_that_it_was_planned_for() -> None:
    """Calls were counted in two ways where one of a layer's has channels that are not followed."""
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    prepared = dspfx.prepare(randomise(PositionsTwice()).double(), x)
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.5))
    assert_equal(prepared.eval()(x), dspfx.convert(prepared)(x))


class AsksForSizes(nn.Module):
    """As timm's norms do, and its convolutions that pad as TensorFlow does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pad = self.a.weight.shape[-1] // 2
        y = self.a(F.pad(x, (pad, pad, pad, self.a.weight.dim() - 3)))
        torch._assert(y.ndim == 4, f"an image has 4 dimensions, not {y.ndim}")
        rows = y.size(2)
        return self.head(torch.relu(self.norm(y)))[:, :, : rows // 2]


def test_who_asks_for_sizes_does_not_keep_norms_and_weights() -> None:
    """Norms were not folded, and dense weights kept, where code read no more than a shape."""
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    prepared = dspfx.prepare(randomise(AsksForSizes()).double(), x)
    dspfx.prune(prepared, dspfx.Budget(macs=0.5))
    compact = dspfx.convert(prepared)
    assert not list(compact.buffers())
    for other in (x, torch.randn(3, 3, 9, 10, dtype=torch.float64)):
        assert_equal(prepared.eval()(other), compact(other))
    with pytest.raises(AssertionError, match="other inputs"):
        compact(x[0])


class Pyramid(nn.Module):
    """One head for images of two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(3, 16, 1) for _ in range(2))
        layers = (nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.PReLU(16))
        self.head = nn.Sequential(*layers, nn.Conv2d(16, 4, 3, padding=1), nn.GroupNorm(2, 4))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.head(stem(x[..., ::n, ::n])) for n, stem in enumerate(self.stems, 1)]


def test_calls_that_are_left_alike_share_one_module(tmp_path: Path) -> None:
    """A network whose trunk has two inputs came out larger than it went in."""
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    prepared = dspfx.prepare(randomise(Pyramid()).double(), x)
    dspfx.cluster_groups(prepared)
    dspfx.prune(prepared, dspfx.Budget(macs=0.5))
    compact = dspfx.convert(prepared)
    assert_equal(prepared.eval()(x), compact(x))
    calls = [str(node.target) for node in compact.graph.find_nodes(op="call_module")]
    twice = {"head.0", "head.2", "head.3", "head.4"}  # the norm is folded
    assert sorted(calls) == sorted([*twice, *twice, "stems.0", "stems.1"])
    layers = [m for m in compact.modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == 4
    reported = dspfx.report(compact).emitted.parameters
    assert sum(p.numel() for p in compact.parameters()) <= reported
    dspfx.save(compact, tmp_path / "compact.dspfx")
    assert_equal(compact(x), dspfx.load(tmp_path / "compact.dspfx", Pyramid().double())(x), 0)


@pytest.mark.parametrize(("first_reads", "emitted"), [(8, [8, 8]), (16, [16])])
def test_calls_that_keep_other_channels_do_not(first_reads: int, emitted: list[int]) -> None:
    """The stems have different halves, so that the head reads less; not if that makes it larger."""
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    prepared = dspfx.prepare(randomise(Pyramid()).double(), x)
    masks = {name: dspfx.get_masks(prepared)[name] for name in ("stems.0", "stems.1")}
    masks["stems.0"][: 16 - first_reads] = False
    masks["stems.1"][8:] = False
    dspfx.set_masks(prepared, masks)
    compact = dspfx.convert(prepared)
    assert_equal(prepared.eval()(x), compact(x))
    first = {str(n.target) for n in compact.graph.nodes if str(n.target).startswith("head.0")}
    assert [compact.get_submodule(name).weight.shape[1] for name in sorted(first)] == emitted


def test_a_wrong_plan_is_caught_and_located(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = dspfx.prepare(
        randomise(torchvision.models.resnet18(weights=None)), torch.randn(2, 3, 32, 32)
    )
    dspfx.set_masks(prepared, random_masks(prepared))
    folded = compact_pass.folded_weight

    def wrong(source: Any, layer: Any, plan: LayerPlan, *rest: Any) -> tuple[Tensor, Any]:
        weight, bias = folded(source, layer, plan, *rest)
        if plan.norm is not None and plan.norm.target == "layer2.1.bn1":
            bias[0] += 1
        return weight, bias

    monkeypatch.setattr(compact_pass, "folded_weight", wrong)
    with pytest.raises(dspfx.EquivalenceError, match="first at call_module 'layer2_1_bn1'"):
        dspfx.convert(prepared)
    dspfx.convert(prepared, verify=False)


def test_a_model_in_another_type() -> None:
    model = randomise(torchvision.models.resnet18(weights=None)).eval()
    prepared = dspfx.prepare(model, torch.randn(2, 3, 32, 32))
    dspfx.set_masks(prepared, random_masks(prepared))
    x = torch.randn(2, 3, 32, 32)
    expected = prepared(x)
    compact = dspfx.convert(prepared.to(torch.bfloat16))
    assert {p.dtype for p in compact.parameters()} == {torch.bfloat16}
    assert_equal(expected, compact(x.bfloat16()).float(), 0.1)


def test_equality_holds_where_a_model_insists_on_float32() -> None:
    class Insists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.tanh(self.stem(x)).float())

    prepared = dspfx.prepare(Insists(), torch.randn(2, 3, 5, 5))
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    x = torch.randn(2, 3, 5, 5)
    compact = dspfx.convert(prepared)
    assert compact.difference is not None
    assert compact.difference[1] == torch.float64
    assert_equal(prepared(x), compact(x), 1e-5)


def test_layers_that_round_to_float32_inside_are_verified_in_float64() -> None:
    """Values that differ by rounding in float64 may differ by much more in float32."""

    class Rounds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sin(1e5 * self.conv(torch.tanh(self.stem(x))))
            return y.float().to(x.dtype)

    prepared = dspfx.prepare(randomise(Rounds()), torch.randn(2, 3, 16, 16))
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    compact = dspfx.convert(prepared)
    assert compact.difference is not None
    assert compact.difference[1] == torch.float64


def test_a_crop_that_does_nothing_to_the_example_still_crops_larger_images() -> None:
    """It was taken for moving whole channels, and left out."""

    class Crops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)
            self.down, self.b = nn.Conv2d(6, 6, 2, stride=2), nn.Conv2d(12, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(self.stem(x))
            y = nn.functional.interpolate(self.down(x), scale_factor=2.0)
            y = nn.functional.pad(y, (0, 0 * y.shape[3], 0, 0, 1, -1))
            return self.b(torch.cat([x[:, :, : y.shape[2], : y.shape[3]], y], 1))

    prepared = dspfx.prepare(randomise(Crops()).double(), torch.randn(2, 3, 8, 8).double())
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    compact = dspfx.convert(prepared)
    for shape in ((2, 3, 8, 8), (1, 3, 9, 11)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_equal(prepared(x), compact(x))


class Shifts(nn.Module):
    """Something narrower is added to what may be all dead."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 4, 1),
        )
        self.pooled = nn.Conv2d(3, 8, 1)
        self.register_buffer("shift", torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "buffer":
                shift = self.shift
            case "numbers":
                shift = torch.arange(8, device=x.device).view(1, 8, 1, 1) * 0.1
            case _:
                shift = self.pooled(x.mean((2, 3), keepdim=True))
        return self.c((self.b(self.a(x)) + shift).relu())


@pytest.mark.parametrize("pixels", [1, 6])
@pytest.mark.parametrize("kind", ["buffer", "numbers", "pooled"])
def test_what_is_dead_still_gives_a_sum_its_shape_and_type(kind: str, pixels: int) -> None:
    """It was left out, and the sum was as narrow as what was added."""
    x = torch.randn(2, 3, pixels, pixels, dtype=torch.float64)
    prepared = dspfx.prepare(randomise(Shifts(kind)).double(), x).eval()
    masks = dspfx.get_masks(prepared)
    masks["b"][:] = False
    dspfx.set_masks(prepared, masks)
    compact = dspfx.convert(prepared)
    for size in (x, torch.randn(2, 3, 9, 9, dtype=torch.float64)):
        assert_equal(prepared(size), compact(size))
