"""What user code may do between two layers: equal at other sizes, in training, or refused."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dspfx
from helpers import assert_equal, macs, randomise

Between = Callable[[Tensor, Tensor], Tensor]
X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


class Net(nn.Module):
    """Two convolutions and a norm, what a test puts in between, and two convolutions."""

    def __init__(self, between: Between, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.n = norm or nn.BatchNorm2d(8)
        self.c, self.d, self.between = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1), between

    def forward(self, x: Tensor) -> Tensor:
        u = self.a(x).relu()
        v = self.n(self.b(u)).relu()
        return self.d(self.c(self.between(u, v)).relu())


def column(x: Tensor) -> Tensor:
    return x.view(-1, 1, 1, 1)


def masked(between: Between, layer: str = "b", first: int = 3, **options: Any) -> nn.Module:
    """A prepared network, some filters of one layer dead."""
    prepared = dspfx.prepare(randomise(Net(between, **options)).double(), X).eval()
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[:first] = False
    dspfx.set_masks(prepared, {layer: mask})
    return prepared


def halved_and_back(v: Tensor) -> Tensor:
    return F.interpolate(F.avg_pool2d(v, 2), scale_factor=2)


def crop(u: Tensor, v: Tensor) -> Tensor:
    y = halved_and_back(v)
    return u.narrow(2, 0, y.size(2)).narrow(3, 0, y.size(3)) + y


def pad_with_ones(u: Tensor, v: Tensor) -> Tensor:
    y = halved_and_back(v)
    pads = (0, u.size(3) - y.size(3), 0, u.size(2) - y.size(2))
    return F.pad(y, pads, value=1.0).softmax(1)


def pooled(u: Tensor, v: Tensor) -> Tensor:
    scale = F.adaptive_avg_pool2d(v, 2).sigmoid().flatten(1).mean(1)
    return u * column(scale)


@pytest.mark.parametrize("size", [(2, 3, 8, 8), (2, 3, 16, 16), (3, 3, 9, 9)])
@pytest.mark.parametrize(
    "between",
    [
        pytest.param(lambda u, v: v - column(v.flatten(1).mean(1)), id="mean"),
        pytest.param(lambda u, v: v / column(v.flatten(1).norm(dim=1)), id="norm"),
        pytest.param(lambda u, v: v * v.flatten(1).size(1) ** -0.5, id="size"),
        pytest.param(lambda u, v: v / column(v.view(v.size(0), -1).std(1)), id="std"),
        pytest.param(lambda u, v: v.flatten(1).softmax(1).view_as(v), id="softmax"),
        pytest.param(
            lambda u, v: v * column(F.cosine_similarity(u.flatten(1), v.flatten(1))), id="cosine"
        ),
        pytest.param(lambda u, v: v.narrow(2, 0, 8), id="narrow"),
        pytest.param(lambda u, v: v.split(8, 2)[0], id="split"),
        pytest.param(lambda u, v: v.chunk(1, 2)[0], id="chunk"),
        pytest.param(lambda u, v: v.repeat(1, 1, v.size(2) // 8, 1), id="repeat"),
        pytest.param(lambda u, v: v.index_select(2, torch.arange(8)), id="index_select"),
        pytest.param(lambda u, v: v[torch.arange(2)], id="batch"),
        pytest.param(lambda u, v: v[:2], id="slice of the batch"),
        pytest.param(crop, id="crop"),
        pytest.param(pad_with_ones, id="pad"),
        pytest.param(pooled, id="pooled"),
    ],
)
def test_what_does_nothing_to_the_example_may_do_something(
    between: Between, size: tuple[int, ...]
) -> None:
    """Proved for the example alone, compact models computed something else for other images."""
    prepared = masked(between)
    compact = dspfx.convert(prepared)
    x = torch.randn(size, dtype=torch.float64)
    with torch.no_grad():
        assert_equal(prepared(x), compact(x))


def test_flattened_channels_are_pruned_before_a_linear_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Flatten(), nn.Dropout(), nn.Linear(8 * 16, 8), nn.ReLU(), nn.Linear(8, 3)),
    )
    prepared = dspfx.prepare(model, X.float())
    dspfx.prune_channels(prepared, dspfx.Budget(macs=0.4))
    assert dspfx.convert(prepared).get_submodule("2").out_channels < 8


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(lambda u, v: v.contiguous(memory_format=torch.channels_last), id="contiguous"),
        pytest.param(lambda u, v: v.to(memory_format=torch.channels_last), id="to"),
        pytest.param(lambda u, v: v.clone(memory_format=torch.channels_last), id="clone"),
    ],
)
def test_layouts(between: Between) -> None:
    prepared = masked(between)
    assert_equal(prepared(X), dspfx.convert(prepared)(X))
    assert dspfx.convert(prepared).get_submodule("b").out_channels == 5


def writes_a_slice(u: Tensor, v: Tensor) -> Tensor:
    v = v.clone()
    v[:, :4].add_(u[:, 4:])
    return v


def writes_a_view(u: Tensor, v: Tensor) -> Tensor:
    v.view(v.shape[0], -1).mul_(2)
    return v


def reads_a_view(u: Tensor, v: Tensor) -> Tensor:
    w = v[:, :4]
    v.mul_(2)
    return torch.cat([w, u[:, 4:]], 1)


@pytest.mark.parametrize("between", [writes_a_slice, writes_a_view, reads_a_view])
def test_what_is_written_by_way_of_a_view_is_refused(between: Between) -> None:
    """Its readers did not know, and masks were closed that should have stayed open."""
    with pytest.raises(dspfx.TraceError, match="which shares its memory, was overwritten"):
        masked(between)


def writes_a_part(u: Tensor, v: Tensor) -> Tensor:
    v = v * 2
    a, b = v[:, :4], v[:, 4:]
    return torch.cat([a.sigmoid_(), b], 1) + u


def test_parts_that_do_not_overlap_may_be_written() -> None:
    prepared = masked(writes_a_part)
    assert_equal(prepared(X), dspfx.convert(prepared)(X))


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(lambda u, v: F.channel_shuffle(v, 2).detach() + u, id="function"),
        pytest.param(
            lambda u, v: (
                v.view(len(v), 2, 4, *v.shape[2:]).detach().transpose(1, 2).reshape(v.shape) + u
            ),
            id="in a shuffle",
        ),
        pytest.param(
            lambda u, v: torch.stack([t.detach() for t in v.unbind(1)][::-1], 1) + u, id="unbound"
        ),
    ],
)
def test_what_is_detached_stays_so_in_a_narrow_model(between: Between) -> None:
    prepared = masked(between, "c")
    narrow = dspfx.narrow(prepared)
    for model in (prepared, narrow):
        model(X).square().sum().backward()
        assert model.get_submodule("b").weight.grad is None
    assert_equal(
        prepared.get_submodule("a").weight.grad.norm(), narrow.get_submodule("a").weight.grad.norm()
    )


class Frozen(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        given = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *given, False, 0.0, self.eps)


class OfTheBatch(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        given = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *given, True, 0.0, self.eps)


@pytest.mark.parametrize("kind", [Frozen, OfTheBatch])
def test_norms_with_a_mode_of_their_own(kind: type[nn.Module]) -> None:
    prepared = masked(lambda u, v: v + u, norm=kind(8))
    compact = dspfx.convert(prepared)
    assert_equal(prepared(X), compact(X))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class AlikeNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.enc = nn.Conv2d(3, 8, 3, padding=1), Block()
        self.conv, self.enc_norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.out = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.enc_norm(self.conv(self.enc(self.stem(x).relu()))).relu())


def test_norms_of_nearly_the_same_name_have_gates_of_their_own() -> None:
    """`enc.norm` and `enc_norm` shared one: the dead channels of one were dead after both."""
    prepared = dspfx.prepare(randomise(AlikeNames()).double(), X)
    mask = torch.ones(12, 8, dtype=torch.bool)
    mask[:4] = False
    dspfx.set_masks(prepared, {"conv": mask})
    compact = dspfx.convert(prepared)
    assert compact.get_submodule("enc.conv").out_channels == 8
    assert compact.get_submodule("conv").out_channels == 8


class Levels(nn.Module):
    """A head that reads more levels in training, and a norm that has another convolution there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head, self.other = Block(), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        u = self.a(x).relu()
        v = self.b(u).relu()
        more = []
        if self.training:
            more = [self.out(self.head.norm(self.other(u)).relu()), self.out(self.head(u))]
        return [self.out(self.head(v)), self.other(u), *more]


def test_calls_of_a_norm_that_training_has_besides() -> None:
    """They are gated by what they read, not by their number."""
    prepared = dspfx.prepare(randomise(Levels()).double(), X)
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[:4] = False
    dspfx.set_masks(prepared, {"head.conv": mask})
    alive: list[bool] = []
    prepared.get_submodule("out").register_forward_pre_hook(
        lambda _, args: alive.append(bool(args[0][:, :4].any()))
    )
    prepared.train()(X)
    assert sorted(alive) == [False, False, True]  # of the other convolution
    alive.clear()
    prepared.eval()(X)
    assert alive == [False]


class LeavesOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(lambda u, v: v)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.net.n(self.net.b(self.net.a(x).relu()))
        return self.net.d(self.net.c(x if mask is None else x * mask))


def test_pickled_without_an_argument_that_may_be_left_out() -> None:
    """Unpickled, the check that it is None was answered at once, and failed."""
    model = LeavesOut().double()
    del model.net.between
    prepared = dspfx.prepare(model, X)
    for own in (prepared, dspfx.convert(prepared), dspfx.narrow(prepared)):
        again = pickle.loads(pickle.dumps(own.eval()))
        assert_equal(own(X), again(X))
        with pytest.raises(AssertionError, match="mask=None"):
            again(X, X)


class OwnGate(nn.Conv2d):
    def __init__(self, gate: Any) -> None:
        super().__init__(8, 8, 3, padding=1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, padding=1)
        return self.gate(y) if isinstance(self.gate, nn.Module) else y * self.gate


@pytest.mark.parametrize("gate", [nn.Parameter(torch.ones(1)), nn.Sigmoid()])
def test_a_layer_with_a_gate_of_its_own_is_left_alone(gate: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), OwnGate(gate), nn.Conv2d(8, 4, 1)).double()
    prepared = dspfx.prepare(model, X)
    assert_equal(model(X), prepared(X))
    assert_equal(prepared(X), dspfx.convert(prepared)(X))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=4)
        self.c, self.d = nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


def prune_twice(prepared: nn.Module) -> None:
    for budget in (0.8, 0.4):
        torch.manual_seed(int(10 * budget))
        for parameter in prepared.parameters():
            nn.init.normal_(parameter)
        dspfx.cluster_groups(prepared)
        dspfx.prune(prepared, dspfx.Budget(macs=budget), drop_filters=False)


@pytest.mark.parametrize(
    "prune", [lambda p: dspfx.prune(p, dspfx.Budget(macs=0.5)), prune_twice], ids=["once", "twice"]
)
def test_masks_that_a_model_has_can_be_set(prune: Callable[[nn.Module], Any]) -> None:
    """Grouped convolutions, and groups that were found again, have more different rows."""
    prepared = dspfx.prepare(Grouped().double(), X, config=dspfx.PrepareConfig(groups=2))
    prune(prepared)
    average = torch.optim.swa_utils.AveragedModel(prepared)
    masks = dspfx.get_masks(prepared)
    for model in (prepared, average):
        dspfx.set_masks(model, masks)
        found = dspfx.get_masks(model)
        assert all(torch.equal(mask, found[name]) for name, mask in masks.items())
    many = torch.rand(16, 16) < 0.5
    with pytest.raises(dspfx.MaskError, match="different inputs"):
        dspfx.set_masks(dspfx.prepare(Grouped().double(), X), {"c": many})


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(self.filter)
        self.w = nn.Parameter(torch.randn(8, 1, 1, dtype=torch.cfloat))

    def filter(self, u: Tensor, v: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(v) * self.w, s=v.shape[-2:]).to(u)

    def forward(self, x: Tensor) -> Tensor:
        u = self.net.a(x).relu()
        return self.net.d(self.net.c(self.filter(u, self.net.b(u))))


def test_complex_weights_stay_complex_in_files_of_another_type(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = Spectral()
        del model.net.between
        return model

    prepared = dspfx.prepare(build().double(), X).eval()
    dspfx.save(prepared, tmp_path / "m.safetensors")
    loaded = dspfx.load(tmp_path / "m.safetensors", build())
    assert_equal(prepared(X), loaded.eval()(X))


class Scripted(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.inner = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 3), activation))
        self.b, self.c = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.inner(self.a(x).relu())).relu())


@pytest.mark.filterwarnings("ignore:.*jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # deepcopy of TorchScript
def test_torchscript_is_known_by_its_code(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    prepared = dspfx.prepare(Scripted(nn.ReLU()).double(), X).eval()
    compact = dspfx.convert(prepared)
    assert_equal(prepared(X), dspfx.narrow(prepared)(X))
    for saved in (prepared, compact):
        dspfx.save(saved, path)
        assert_equal(compact(X), dspfx.load(path, Scripted(nn.ReLU()).double()).eval()(X))
        with pytest.raises(dspfx.LoadError, match="TorchScript"):
            dspfx.load(path, Scripted(nn.Sigmoid()).double())


def test_what_is_no_model_is_named() -> None:
    for given in ((None, X), (nn.ReLU(), X, {"groups": 2})):
        model, x, *config = given
        with pytest.raises(
            dspfx.PrepareError, match=r"takes a torch\.nn\.Module and a PrepareConfig"
        ):
            dspfx.prepare(model, x, config=config[0] if config else None)


class Frames(nn.Module):
    """Frames of a film are a batch for its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.last = Net(lambda u, v: v), nn.Conv1d(4, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        return self.last(self.net(x.flatten(0, 1)).mean((2, 3)).view(n, t, -1).transpose(1, 2))


class LengthFirst(nn.Module):
    """Linear layers over `[length, batch, channels]`."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.last = Net(lambda u, v: v), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.net(x).flatten(2).permute(2, 0, 1))


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize(("kind", "shape"), [(Frames, (4, 3, 8, 8)), (LengthFirst, (3, 8, 8))])
def test_macs_are_those_of_a_sample(
    kind: type[nn.Module], shape: tuple[int, ...], batch: int
) -> None:
    """Those of one frame, or one position of all samples, were counted."""
    x = torch.randn(batch, *shape)
    prepared = dspfx.prepare(kind(), x)
    dspfx.prune(prepared, dspfx.Budget(macs=0.6))
    compact = dspfx.convert(prepared.eval())
    found = dspfx.report(compact)
    assert (found.before.macs, found.after.macs) == (macs(kind(), x), macs(compact, x))
