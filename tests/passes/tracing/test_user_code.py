"""What users write works, or is refused with a reason: never an error of torch."""

import copy
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

X = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LARGER = torch.randn(3, 3, 18, 22, dtype=torch.float64)


class Convs(nn.Module):
    """Three convolutions, and code between the last two that uses further layers."""

    def __init__(self, code: Callable[..., Tensor] | None = None, **layers: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.c, self.code = nn.Conv2d(16, 6, 1), code
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        return self.c(y if self.code is None else self.code(self, y))


def assert_prunes(model: nn.Module, *others: Tensor, example: Tensor = X) -> nn.Module:
    """Equal in both modes, and after conversion for the example and `others`; what was prepared."""
    prepared = dspfx.prepare(randomise(model).double(), example)
    for mode in (True, False):
        twins = copy.deepcopy(model).train(mode), copy.deepcopy(prepared).train(mode)
        assert_equal(*[twin(example) for twin in twins], tolerance=0)
    for drop in (0.0, 0.4):
        dspfx.set_masks(prepared.eval(), random_masks(prepared, keep=0.6, drop=drop))
        compact = dspfx.convert(prepared)
        for x in (example, *others):
            assert_equal(prepared(x), compact(x))
    return prepared


class ComputesItsStride(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride=x.shape[2] // 6)


class ComputesItsPadding(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=(x.shape[2] // 16, 1))


def depthwise(self: Any, y: Tensor) -> Tensor:
    return F.conv2d(y, self.kernel.expand(y.shape[1], 1, 3, 3), groups=y.shape[1])


def of_each_sample(self: Any, y: Tensor) -> Tensor:
    """Kernels that depend on the sample, as of a conditional convolution."""
    n, c, h, w = y.shape
    kernels = y.mean((2, 3)).reshape(n * c, 1, 1, 1) * self.kernel
    out = F.conv2d(y.reshape(1, n * c, h, w), kernels, groups=n * c, padding=1)
    return out.reshape(n, c, h, w)


def strided(self: Any, y: Tensor) -> Tensor:
    return F.conv2d(y, self.b.weight, stride=y.shape[2] // 6)


@pytest.mark.parametrize("code", [depthwise, of_each_sample, strided])
def test_functional_convolutions_may_compute_their_settings(code: Callable[..., Tensor]) -> None:
    kernel = nn.Parameter(torch.randn(1, 1, 3, 3))
    assert_prunes(Convs(code, kernel=kernel), LARGER)


@pytest.mark.parametrize("kind", [ComputesItsStride, ComputesItsPadding])
def test_subclasses_of_convolutions_may_compute_their_settings(kind: type[nn.Conv2d]) -> None:
    model = Convs(lambda self, y: self.own(y), own=kind(16, 16, 3, bias=kind is ComputesItsStride))
    assert list(gated_layers(assert_prunes(model, LARGER))) == ["b", "c"]


NORMALISED: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax of parts": lambda y: y.unflatten(1, (4, 4)).softmax(2).flatten(1, 2),
    "softmax over parts": lambda y: y.unflatten(1, (2, 8)).softmax(1).flatten(1, 2),
    "sorted parts": lambda y: y.reshape(y.shape[0], 4, 4, *y.shape[2:]).sort(2)[0].reshape(y.shape),
    "averages": lambda y: y.unflatten(1, (4, 4)).mean(2).repeat(1, 4, *[1] * (y.dim() - 2)),
}


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("kind", NORMALISED)
def test_norms_read_what_has_no_channels_of_its_own(kind: str, rank: int) -> None:
    """Their gates, of which the analysis knew before there were any, were of nothing after."""

    def code(self: Any, y: Tensor) -> Tensor:
        y = y.flatten(2) if rank == 3 else y.mean((2, 3)) if rank == 2 else y
        z = self.norm(NORMALISED[kind](y)).relu()
        return z[..., None] if rank == 3 else z[..., None, None] if rank == 2 else z

    norm = nn.BatchNorm2d(16) if rank == 4 else nn.BatchNorm1d(16)
    prepared = assert_prunes(Convs(code, norm=norm), LARGER)
    prepared.train()(X).square().mean().backward()


class Shadows(Convs):
    """A class attribute that the first call of an instance shadows, here and in a child."""

    scale: Any = None
    offset: Any = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None or self.training:
            self.scale = torch.full((16, 1, 1), 2.0, dtype=x.dtype)
        return self.c(self.b(self.a(x).relu()) * self.scale + self.offset)


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child, self.last = Shadows(), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.child(x))


@pytest.mark.parametrize("kind", [Shadows, Calls])
def test_tensors_of_an_instance_may_shadow_attributes_of_its_class(kind: type[nn.Module]) -> None:
    """Anything that was called before it is prepared keeps some."""
    model = randomise(kind()).double()
    model(X)
    own: Any = model.child if isinstance(model, Calls) else model
    own.offset = torch.full((16, 1, 1), 0.5, dtype=torch.float64)
    prepared = assert_prunes(model, LARGER)
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert_equal(prepared(X), twin(X), tolerance=0)


@pytest.mark.parametrize(
    "code",
    [
        lambda x, y: y if type(x) is Tensor else None,
        lambda x, y: y * 2 if type(y) in (Tensor, int) else y,
        lambda x, y: (y, {"kind": type(x).__name__}),
        lambda x, y: y if x.__class__ is Tensor else 1,
    ],
)
def test_code_that_compares_types_is_right_or_refused(code: Callable[..., Any]) -> None:
    class Compares(Convs):
        def forward(self, x: Tensor) -> Any:
            return code(x, super().forward(x))

    model = randomise(Compares()).double()
    try:
        prepared = dspfx.prepare(model, X)
    except dspfx.TraceError as error:
        assert "`isinstance`" in str(error)  # noqa: PT017 (either is right)
    else:
        assert_equal(model(X), prepared(X), tolerance=0)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool1d": lambda y: F.max_pool1d(y, 3, 1, 1),
    "MaxPool1d": nn.MaxPool1d(3, 1, 1),
    "AvgPool1d": nn.AvgPool1d(3, 1, 1),
    "AdaptiveAvgPool1d": nn.AdaptiveAvgPool1d(16),
    "LPPool1d": nn.LPPool1d(2, 3, 1),
    "InstanceNorm1d": nn.InstanceNorm1d(16),
    "pad": nn.ReflectionPad1d((1, 0)),
}


@pytest.mark.filterwarnings("ignore:input's size at dim=0")
@pytest.mark.parametrize("kind", POOLS)
def test_pools_that_take_the_batch_for_channels_mix_features(kind: str) -> None:
    """Of `[N, F]` they see N channels, F long."""

    def code(self: Any, y: Tensor) -> Tensor:
        z = self.pool(y.mean((2, 3)))
        return F.pad(z, (0, 16 - z.shape[1]))[:, :16, None, None]

    assert_prunes(Convs(code, pool=POOLS[kind]), LARGER)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 1, 1), nn.InstanceNorm2d(2)], ids=str)
@pytest.mark.filterwarnings("ignore:input's size at dim=0")
def test_pools_of_images_that_take_the_batch_for_channels_mix_positions(pool: nn.Module) -> None:
    """Of `[N, C, L]` they see N channels, images of C by L."""
    model = Convs(lambda self, y: self.pool(y.flatten(2)).unflatten(2, y.shape[2:]), pool=pool)
    assert_prunes(model, LARGER[:2])


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "expand": lambda y: torch.ones(1, 16, 1, 1).expand(y.shape[0], -1, -1, -1),
    "expand to numbers": lambda y: torch.arange(16.0)[:, None, None].expand(16, y.shape[2], 1),
    "roll": lambda y: torch.arange(16.0)[:, None, None].roll(y.shape[2] // 8, 0),
    "new": lambda y: torch.ones(1).new_ones(y.shape[0], 16, 1, y.shape[3]),
    "zeros": lambda y: torch.ones(1).new_zeros(y.shape[2], 1),
}


@pytest.mark.parametrize("kind", MADE)
def test_tensors_that_code_makes_take_sizes(kind: str) -> None:
    """Torch took a size for something else where the tensor itself was no traced one."""
    assert_prunes(Convs(lambda self, y: y * MADE[kind](y).to(y.dtype)), LARGER)
