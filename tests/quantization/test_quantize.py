"""`quantize`: numbers of 8 bits, in torch and in the runtimes that read the exported file."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from detector import IMAGES, Detector
from groups import grouped
from runtimes import runtimes
from small import Small, X, pruned
from torch import Tensor, nn

import dspfx
from helpers import assert_equal, randomise, unchanged

pytest.importorskip("torchao")

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = list(torch.randn(64, 3, 10, 10, generator=GENERATOR).split(16))
IMAGES_SEEN = torch.cat(BATCHES)


class Net(nn.Module):
    """A stem that is pooled, a block whose shortcut is a layer, groups and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.a, self.b = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 20, 3, padding=1)
        self.shortcut = nn.Conv2d(16, 20, 1)
        self.depthwise = nn.Sequential(nn.Conv2d(20, 20, 3, groups=20), nn.BatchNorm2d(20))
        self.act, self.last = nn.Hardswish(), nn.Conv2d(20, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.b(torch.relu(self.a(x))) + self.shortcut(x))
        x = torch.relu(self.last(self.act(self.depthwise(x))))
        return self.head(x.mean((2, 3)))


def compact_of(model: nn.Module, groups: int = 1) -> nn.Module:
    return dspfx.convert(pruned(model)) if groups == 1 else grouped(model)


def assert_close(expected: Tensor, actual: Tensor, share: float) -> None:
    """Equal but for what rounding makes of it, as a share of the largest value."""
    assert float((expected - actual).abs().max()) < share * float(expected.abs().max())


def integers(quantized: nn.Module) -> list[Tensor]:
    return [b for name, b in quantized.named_buffers() if name.endswith("_int8")]


@pytest.mark.parametrize("trained", [False, True])
def test_pairs_of_products_with_weights_of_7_bits_fit_into_16(trained: bool) -> None:
    compact = compact_of(Net(), 2)
    if trained:
        trainable = dspfx.fake_quantize(compact, BATCHES, weight_bits=7).train()
        trainable(BATCHES[0]).square().mean().backward()
        quantized = dspfx.quantize(trainable.eval())
    else:
        quantized = dspfx.quantize(compact, BATCHES, weight_bits=7)
        assert_close(compact(IMAGES_SEEN), quantized(IMAGES_SEEN), 0.1)
    weights = integers(quantized)
    assert weights
    for weight in weights:
        assert int(weight.abs().max()) == 63
        assert 2 * 255 * int(weight.abs().max()) < 2**15
    assert any(int(w.abs().max()) > 63 for w in integers(dspfx.quantize(compact, BATCHES)))


@pytest.mark.parametrize("bits", [4, 9])
def test_weights_of_another_number_of_bits(bits: Any) -> None:
    compact = compact_of(Net())
    with unchanged(compact), pytest.raises(dspfx.QuantizeError, match="8 bits, or of 7"):
        dspfx.quantize(compact, BATCHES, weight_bits=bits)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [Small, Net])
def test_close_to_float32(kind: type[nn.Module], groups: int) -> None:
    compact = compact_of(kind(), groups)
    with unchanged(compact):
        quantized = dspfx.quantize(compact, BATCHES)
    assert isinstance(quantized, dspfx.CompactModule)
    assert not quantized.training
    for size in (1, 3):
        x = torch.randn(size, 3, 13, 11, generator=GENERATOR)
        assert_close(compact(x), quantized(x), 0.1)
        assert not torch.equal(compact(x), quantized(x))
    weights = [t for t in quantized.state_dict().values() if t.dtype == torch.int8]
    assert len(weights) == len(quantized.quantization.places.layers)
    assert all(int(w.abs().max()) == 127 for w in weights if w.any())
    floats = [p for p in quantized.parameters() if p.dim() > 1]
    assert not floats, "the weights are there twice"


def test_weights_are_those_of_the_filters() -> None:
    compact = compact_of(Small())
    quantized = dspfx.quantize(compact, BATCHES)
    state = quantized.state_dict()
    for name in (name.removesuffix("_int8") for name in state if name.endswith("_int8")):
        expected = compact.get_parameter(name)
        scale = state[f"{name}_scale"].reshape(-1, *[1] * (expected.dim() - 1))
        actual = state[f"{name}_int8"] * scale
        assert ((expected - actual).abs() <= scale / 2 + 1e-7).all()


def test_the_same_twice_and_in_copies(tmp_path: Path) -> None:
    import copy  # noqa: PLC0415

    compact = compact_of(Net())
    first, second = (dspfx.quantize(compact, BATCHES) for _ in range(2))
    assert first.quantization == second.quantization
    for other in (second, copy.deepcopy(first)):
        assert_equal(first(X), other(X), tolerance=0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [Small, Net])
def test_runtimes_compute_with_integers(kind: type[nn.Module], groups: int, tmp_path: Path) -> None:
    quantized = dspfx.quantize(compact_of(kind(), groups), BATCHES)
    found = runtimes(quantized, tmp_path)
    convolutions = sum(n.target is torch.conv2d for n in quantized.graph.nodes)
    assert found["onnxruntime's"]["QLinearConv"] == convolutions
    assert not found["onnxruntime's"]["Conv"]
    assert found["openvino's"]["Convolution", "u8"] == convolutions
    assert not found["openvino's"]["Convolution", "f32"]
    for size in (1, 5):
        x = torch.randn(size, 3, 14, 11, generator=GENERATOR)
        for name in ("onnxruntime", "openvino"):
            assert_close(quantized(x), found[name](x), 0.02)


class Widened(nn.Module):
    """A shortcut that lacks channels, which other numbers than 0 stand for zero in."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = nn.functional.pad(self.a(x), (0, 0, 0, 0, 0, 4))
        return self.c(torch.relu(wide + self.b(x)))


class Tokens(nn.Module):
    """Patches after a learned one, as a vision transformer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.a, self.b = nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 32), nn.Linear(32, 16)
        self.first = nn.Parameter(torch.randn(1, 1, 16) / 9)
        self.places = nn.Parameter(torch.randn(1, 40, 16) / 9)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        x = x + self.places[:, : x.shape[1]]
        x = x + self.b(nn.functional.gelu(self.a(self.norm(x))))
        return self.head(self.norm(x))


def test_concatenations_with_what_is_not_rounded(tmp_path: Path) -> None:
    """OpenVINO loads them, and computes the same."""
    torch.manual_seed(0)
    compact = dspfx.convert(dspfx.prepare(Tokens().eval(), X))
    quantized = dspfx.quantize(compact, BATCHES)
    assert_close(compact(X), quantized(X), 0.05)
    found = runtimes(quantized, tmp_path, dynamic_size=False)
    for name in ("onnxruntime", "openvino"):
        assert_close(quantized(IMAGES_SEEN), found[name](IMAGES_SEEN), 0.02)
    assert found["openvino's"]["FullyConnected", "u8"] == 3


class Framed(Widened):
    """The same with a frame around what is pooled."""

    def forward(self, x: Tensor) -> Tensor:
        wide = nn.functional.pad(self.a(x), (1, 1, 1, 1))
        wide = nn.functional.pad(nn.functional.max_pool2d(wide, 3, 1), (0, 0, 0, 0, 0, 4))
        return self.c(torch.relu(wide + self.b(x)))


@pytest.mark.parametrize("kind", [Widened, Framed])
@pytest.mark.parametrize("prune", [False, True])
def test_openvino_pads_no_integers(kind: type[nn.Module], prune: bool, tmp_path: Path) -> None:
    """It would pad with the integer 0, whatever integer stands for zero, or not load the model."""
    torch.manual_seed(0)
    prepared = dspfx.prepare(randomise(kind()).eval(), X)
    if prune:
        dspfx.prune(prepared, dspfx.Budget(macs=0.6))
    compact = dspfx.convert(prepared, cost_model=dspfx.FEWEST_WEIGHTS)
    quantized = dspfx.quantize(compact, BATCHES)
    found = runtimes(quantized, tmp_path)
    for name in ("onnxruntime", "openvino"):
        assert_close(quantized(IMAGES_SEEN), found[name](IMAGES_SEEN), 0.02)


def test_filters_without_weights_keep_their_bias(tmp_path: Path) -> None:
    """Runtimes round a bias to 32 bits, in units of the scale of a filter."""
    compact = dspfx.convert(dspfx.prepare(randomise(Small()).eval(), X))
    layer = compact.get_submodule("a")
    with torch.no_grad():
        layer.weight[1] = 0
        layer.weight[2] *= 1e-6
        layer.bias[1:3] = torch.tensor([50.0, 60.0])
    quantized = dspfx.quantize(compact, BATCHES)
    assert_close(compact(X), quantized(X), 0.1)
    found = runtimes(quantized, tmp_path)
    for name in ("onnxruntime", "openvino"):
        assert_close(quantized(X), found[name](X), 0.02)


def test_models_in_parts() -> None:
    images = [image.float() for image in IMAGES]
    prepared = pruned(Detector(), (images,))
    compact = dspfx.convert(prepared)
    quantized = dspfx.quantize(compact, [images, images], call=compact)
    parts = [m for m in quantized.modules() if isinstance(m, dspfx.CompactModule)]
    assert parts
    assert all(part.quantization is not None for part in parts)
    assert type(quantized) is Detector
    quantized(images)


BAD: dict[str, tuple[Sequence[Any], str]] = {
    "none": ([], "there is no batch"),
    "NaN": ([X, X * float("nan")], r"batch 1 holds values that are not finite"),
    "infinity": ([X / 0], r"batch 0 holds values that are not finite"),
    "overflow": ([X * 8e37], r"batch 0 leads to values that are not finite, first in '"),
    "one value": ([torch.ones(2, 3, 9, 9)] * 3, "all batches hold one value alone, 1, and"),
    "another shape": ([X, X[:, :2]], r"does not accept batch 1 .*\(2, 2, 10, 10\).*: .*channels"),
    "another type": ([X.double()], r"does not accept batch 0 .*float64"),
    "no images": (["cat.png"], "does not accept batch 0"),
}


@pytest.mark.parametrize("why", BAD)
def test_bad_batches(why: str) -> None:
    batches, message = BAD[why]
    compact = compact_of(Small())
    with unchanged(compact), pytest.raises(dspfx.QuantizeError, match=message):
        dspfx.quantize(compact, batches)


def test_batches_that_reach_nothing() -> None:
    with pytest.raises(dspfx.QuantizeError, match="do not reach all compact parts"):
        dspfx.quantize(compact_of(Small()), [X], call=lambda batch: batch)


def test_what_is_not_quantised() -> None:
    compact = compact_of(Small())
    quantized = dspfx.quantize(compact, [X])
    with pytest.raises(dspfx.QuantizeError, match="quantised already"):
        dspfx.quantize(quantized, [X])
    with pytest.raises(dspfx.QuantizeError, match=r"dspfx.convert makes of it"):
        dspfx.quantize(pruned(Small()), [X])
    with pytest.raises(dspfx.QuantizeError, match="not compact; quantize what"):
        dspfx.quantize(Small().eval(), [X])
    with pytest.raises(dspfx.QuantizeError, match=r"float64; quantize it in float32"):
        dspfx.quantize(dspfx.convert(pruned(Small().double(), X.double())), [X.double()])


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dspfx.quantization.pt2e", raising=False)
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(dspfx.QuantizeError, match=r"pip install 'dspfx\[deploy\]'"):
        dspfx.quantize(compact_of(Small()), [X])
