"""All that a model does and has is counted, once, whatever code it is in: torch's count agrees."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.flop_counter import FlopCounterMode

import dspfx
from dspfx.passes.transforms.summary import NOT_PRUNABLE

IMAGE = torch.randn(2, 3, 8, 8)
TOKENS = torch.randn(2, 5, 16)


class Sequence(nn.Module):
    """Linear layers around `middle`, which takes and gives `[B, T, 16]`, or a tuple with that."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.b(F.relu(self.a(x))))
        return self.c(x[0] if isinstance(x, tuple) else x)


class Images(nn.Module):
    """Convolutions around `middle`, which takes and gives 8 channels."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.middle, self.c = middle, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.middle(F.relu(self.b(F.relu(self.a(x))))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


class Products(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scores = torch.einsum("btc,bsc->bts", x, x).softmax(-1)
        return torch.bmm(scores, x) + (x @ x.transpose(1, 2)) @ x


class Functional(nn.Module):
    """Its own parameter as a kernel, another module's, and a computed one."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.other = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel - self.kernel.mean(), padding=1)
        return F.conv2d(self.other(x), self.other.weight)


class OutputSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x, output_size=(16, 16))


class Hidden(nn.Module):
    """An opaque leaf with layers inside: what it does depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if bool(x.isfinite().all()) else self.other(x)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "GRU": lambda: (Sequence(nn.GRU(16, 16, batch_first=True)), TOKENS),
    "LSTM": lambda: (Sequence(nn.LSTM(16, 8, 2, batch_first=True, bidirectional=True)), TOKENS),
    "encoder layer": lambda: (
        Sequence(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)),
        TOKENS,
    ),
    "encoder": lambda: (
        Sequence(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 8), 2)),
        TOKENS,
    ),
    "attention": lambda: (Sequence(Attention()), TOKENS),
    "products": lambda: (Sequence(Products()), TOKENS),
    "functional": lambda: (Images(Functional()), IMAGE),
    "weight norm": lambda: (Images(weight_norm(nn.Conv2d(8, 8, 3, padding=1))), IMAGE),
    "spectral norm": lambda: (Images(spectral_norm(nn.Conv2d(8, 8, 1))), IMAGE),
    "output size": lambda: (Images(OutputSize()), IMAGE),
    "opaque": lambda: (Images(Hidden()), IMAGE),
    "PReLU and norms": lambda: (
        Images(nn.Sequential(nn.PReLU(), nn.GroupNorm(2, 8), nn.BatchNorm2d(8), nn.PReLU(8))),
        IMAGE,
    ),
}


LAYERS = ("weight norm", "spectral norm", "output size", "PReLU and norms")  # all can be pruned


def macs_of(model: nn.Module, x: Tensor) -> int:
    """As torch counts them where no kernel is used that it has no formula for."""
    twin, x = copy.deepcopy(model).double().eval(), x.double() if x.is_floating_point() else x
    twin.requires_grad_()  # encoder layers have a kernel of their own for what learns nothing
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        twin(x)
    return int(counter.get_total_flops()) // 2 // len(x)


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_all_that_a_model_does_is_counted(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model = model.eval()
    config = dspfx.PrepareConfig(opaque=(Hidden,) if name == "opaque" else ())
    prepared = dspfx.prepare(model, x, config=config)
    found = dspfx.report(prepared)
    assert found.before.macs == macs_of(model, x)
    assert found.before.parameters == parameters_of(model)
    assert sum(layer.before.macs for layer in found.layers) == found.before.macs
    dspfx.prune(prepared, dspfx.Budget(macs=0.9))
    compact = dspfx.convert(prepared)
    left = dspfx.report(compact)
    assert left.emitted.macs == macs_of(compact, x) <= 0.9 * found.before.macs
    if name != "functional":  # a parameter that is used directly is a constant of the graph
        assert left.emitted.parameters == parameters_of(compact)
    listed = any(layer.name.startswith(NOT_PRUNABLE) for layer in left.layers)
    assert listed == (name not in LAYERS)


@pytest.mark.parametrize("name", ["GRU", "opaque"])
def test_what_is_not_prunable_has_a_row_of_its_own(name: str) -> None:
    model, x = MODELS[name]()
    config = dspfx.PrepareConfig(opaque=(Hidden,) if name == "opaque" else ())
    found = dspfx.report(dspfx.prepare(model, x, config=config))
    (row,) = (layer for layer in found.layers if layer.name == f"{NOT_PRUNABLE}middle")
    assert row.before == row.after
    assert row.before.macs == macs_of(model, x) - sum(
        layer.before.macs for layer in found.layers if layer is not row
    )
    assert f"{NOT_PRUNABLE}middle" in str(found)


class Tied(nn.Module):
    """An embedding whose weight is that of the last layer, or two layers that share theirs."""

    def __init__(self, embedding: bool) -> None:
        super().__init__()
        self.first: nn.Module = nn.Embedding(20, 16) if embedding else nn.Linear(20, 16, bias=False)
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.last = nn.Linear(16, 20, bias=False)
        if embedding:
            self.last.weight = self.first.weight  # type: ignore[assignment]
        else:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(F.relu(self.a(F.relu(self.first(x))))))


TIED = {
    True: torch.arange(10).reshape(2, 5),
    False: torch.randn(2, 20, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("embedding", [True, False])
def test_tied_weights_count_once_and_stay_tied(embedding: bool) -> None:
    model = Tied(embedding).eval()
    prepared = dspfx.prepare(model, TIED[embedding])
    found = dspfx.report(prepared)
    assert found.before.parameters == parameters_of(model)
    compact = dspfx.convert(prepared)
    assert parameters_of(compact) == dspfx.report(compact).emitted.parameters
    assert parameters_of(compact) == parameters_of(model)
    assert not found.notes


@pytest.mark.parametrize("embedding", [True, False])
def test_ties_that_pruning_breaks_are_told(embedding: bool) -> None:
    prepared = dspfx.prepare(Tied(embedding).eval(), TIED[embedding])
    found = dspfx.prune_channels(prepared, dspfx.Budget(macs=0.6))
    (warning,) = (w for w in found.warnings if "share" in w)
    first, second = ("first", "last") if embedding else ("a", "b")
    assert f"{second}.weight" in warning
    assert f"{first}.weight" in warning
    compact = dspfx.convert(prepared)
    assert dspfx.report(compact).emitted.parameters == parameters_of(compact)
    assert any("share" in note for note in dspfx.report(prepared).notes)


class Frames(nn.Module):
    """Reads `[T, B, 16]`: what looks like the batch is time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(F.relu(self.b(F.relu(self.a(x)))))


class Proposals(nn.Module):
    """Reads `[N * R, 16]`, some proposals of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class InParts(nn.Module):
    """What it does depends on values; its part is given `arranged` inputs."""

    def __init__(self, part: nn.Module, arranged: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.part, self.arranged = part, arranged

    def forward(self, x: Tensor) -> Tensor:
        if float(x.abs().max()) > 1e9:
            x = x / x.abs().max()
        return self.part(self.arranged(x))


@pytest.mark.parametrize(
    ("part", "arranged"),
    [
        (Frames, lambda x: x.transpose(0, 1)),
        (Proposals, lambda x: x.flatten(0, 1)),
    ],
)
def test_parts_count_for_whole_samples(
    part: type[nn.Module], arranged: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    """A part is prepared for two frames, or two proposals; a sample has more of them."""
    torch.manual_seed(0)
    model, x = InParts(part(), arranged).eval(), torch.randn(2, 30, 16)
    prepared = dspfx.prepare(model, x)
    assert not isinstance(prepared, dspfx.PreparedModule)
    assert dspfx.report(prepared).before.macs == macs_of(model, x)
    dspfx.prune(prepared, dspfx.Budget(macs=0.6))
    compact = dspfx.convert(prepared)
    assert dspfx.report(compact).emitted.macs == macs_of(compact, x)
    dspfx.save(prepared, tmp_path / "model.safetensors")
    again = dspfx.load(tmp_path / "model.safetensors", InParts(part(), arranged).eval())
    assert dspfx.report(again).before == dspfx.report(prepared).before
