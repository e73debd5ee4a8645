"""Norms over channels, and parameters that are added to a stream: channels of it go, exactly."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dspfx
from dspfx.layers.narrow_norm import NarrowLayerNorm, layer_norm, rms_norm
from dspfx.model.analysed import analyse_prepared
from dspfx.passes.analysis.channel_ops import Elementwise, Gate, Statistics
from helpers import assert_equal, randomise
from random_positions import NORMS, ChannelNorm, ClassToken, NextBlock

WIDTH, LEFT = 12, 7  # channels of the stream, before and after


class Stream(nn.Module):
    """A convolution, blocks that add to what it makes, and a layer that reads the sum."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 4, 1), nn.Conv2d(4, WIDTH, 3, padding=1)
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.first(self.stem(x))).mean((2, 3)))


def narrowed(model: nn.Module, writers: list[str], readers: list[str]) -> tuple[Any, Any, Tensor]:
    """The prepared model without the stream's last channels, the compact one, and an input."""
    randomise(model)
    model.double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    prepared = dspfx.prepare(model, x)
    with torch.no_grad():
        assert_equal(model(x), prepared(x), tolerance=0)
    masks = dspfx.get_masks(prepared)
    for name in writers:
        masks[name][LEFT:] = False
    for name in readers:
        masks[name][:, LEFT:] = False
    dspfx.set_masks(prepared, masks)
    compact = dspfx.convert(prepared)
    for size in (8, 11):
        other = torch.randn(3, 3, size, size, dtype=torch.float64)
        with torch.no_grad():
            assert_equal(prepared(other), compact(other))
    return prepared, compact, x


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("how", NORMS)
def test_channels_of_a_normed_stream_go(how: str, scaled: bool) -> None:
    model = Stream(NextBlock(WIDTH, 20, how, scaled), NextBlock(WIDTH, 9, how, scaled))
    blocks = ["blocks.0", "blocks.1"]
    writers = ["first", *(f"{block}.down" for block in blocks)]
    _, compact, _ = narrowed(model, writers, [f"{block}.up" for block in blocks])
    assert compact.get_submodule("first").out_channels == LEFT
    assert compact.get_submodule("blocks.0.depthwise").groups == LEFT
    assert compact.get_submodule("blocks.1.up").in_features == LEFT
    assert compact.get_submodule("head").in_features == LEFT


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("embedded", [False, True])
def test_channels_of_a_stream_with_a_class_token_go(repeat: bool, embedded: bool) -> None:
    model = Stream(ClassToken(WIDTH, 10, "function", repeat, embedded))
    prepared, compact, _ = narrowed(model, ["first", "blocks.0.down"], ["blocks.0.up"])
    assert compact.get_submodule("first").out_channels == LEFT
    assert compact.get_submodule("head").in_features == LEFT
    widths = {tuple(b.shape) for name, b in compact.named_buffers() if "token" in name}
    assert widths == {(1, 1, LEFT)}
    gates = [op for op in analyse_prepared(prepared).ops.values() if isinstance(op, Gate)]
    assert len(gates) == 2 + embedded  # the token, the embedding, the norm


def test_another_width_is_another_function() -> None:
    x = torch.randn(4, LEFT, dtype=torch.float64)
    whole = F.pad(x, (0, WIDTH - LEFT))
    expected = F.layer_norm(whole, (WIDTH,))[:, :LEFT]
    assert_equal(expected, layer_norm(x, WIDTH, None, None, 1e-5))
    assert float((expected - F.layer_norm(x, (LEFT,))).abs().max()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("left", [1, LEFT, WIDTH])
def test_norms_of_what_is_left(left: int, dtype: torch.dtype) -> None:
    x = (torch.randn(2, 5, left, dtype=torch.float64) * 3 + 20).to(dtype)
    whole = F.pad(x, (0, WIDTH - left))
    weight, bias = torch.rand(WIDTH).to(dtype), torch.randn(WIDTH).to(dtype)
    eps = 4 * torch.finfo(dtype).eps
    for own, given in ((weight, bias), (None, None)):
        cut = [None if t is None else t[:left] for t in (own, given)]
        expected = F.layer_norm(whole, (WIDTH,), own, given, 1e-5)[..., :left].double()
        found = layer_norm(x, WIDTH, *cut, 1e-5)
        assert found.dtype == dtype
        assert float((expected - found.double()).abs().max()) <= eps * 8
        expected = F.rms_norm(whole, (WIDTH,), own, None)[..., :left].double()
        found = rms_norm(x, WIDTH, cut[0], None)
        assert found.dtype == dtype
        assert float((expected - found.double()).abs().max()) <= eps * 8


def test_a_channel_that_is_read_by_nobody_still_counts_while_it_is_not_zero() -> None:
    model = Stream(NextBlock(WIDTH, 20, "module", False))
    _, compact, _ = narrowed(model, [], ["blocks.0.up"])
    assert compact.get_submodule("blocks.0.norm.norm").normalized_shape == (WIDTH,)
    assert compact.get_submodule("blocks.0.up.0").in_features == LEFT


def test_the_norm_says_of_how_many_it_is() -> None:
    model = Stream(NextBlock(WIDTH, 20, "module", False))
    _, compact, _ = narrowed(model, ["first", "blocks.0.down"], ["blocks.0.up"])
    norm = compact.get_submodule("blocks.0.norm.norm")
    assert isinstance(norm, NarrowLayerNorm)
    assert norm.weight is not None
    assert norm.weight.shape == (LEFT,)
    assert str(norm) == f"NarrowLayerNorm(of {WIDTH}, eps=1e-05)"


@pytest.mark.parametrize("how", ["module", "function", "rms"])
def test_narrow_training_gives_the_gradients_of_the_masked_model(how: str) -> None:
    model = Stream(NextBlock(WIDTH, 20, how, False))
    prepared, _, x = narrowed(model, ["first", "blocks.0.down"], ["blocks.0.up"])
    narrow = dspfx.narrow(prepared.train())
    prepared(x).square().sum().backward()
    narrow(x).square().sum().backward()
    wide = dict(prepared.named_parameters())
    name = next(name for name in wide if name.endswith("norm.weight"))
    expected = wide[name].grad
    (own,) = [p for n, p in narrow.named_parameters() if "norm" in n and "weight" in n]
    assert expected is not None
    assert own.grad is not None
    assert_equal(expected[:LEFT], own.grad)
    assert not expected[LEFT:].any()


def test_parameters_of_functional_norms_are_counted_as_they_are_cut() -> None:
    counts = []
    for how in ("module", "function"):
        torch.manual_seed(0)
        model = Stream(NextBlock(WIDTH, 20, how, False))
        prepared, compact, _ = narrowed(model, ["first", "blocks.0.down"], ["blocks.0.up"])
        report = dspfx.report(prepared)
        assert report.before.parameters == sum(p.numel() for p in model.parameters())
        counts.append((report.before, report.after, report.emitted))
        held = {**dict(compact.named_parameters()), **dict(compact.named_buffers())}
        assert report.emitted.parameters == sum(
            tensor.numel() for tensor in held.values() if tensor.is_floating_point()
        )
    assert counts[0] == counts[1]


def test_norms_that_are_called_twice_and_norms_of_other_shapes_stay_right() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.square = nn.LayerNorm(WIDTH), nn.LayerNorm((8, 8))
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            y = self.square(x).permute(0, 2, 3, 1)
            y = self.norm(self.fc(self.norm(y)))
            return x + y.permute(0, 3, 1, 2)

    model = Stream(Odd())
    randomise(model).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    prepared = dspfx.prepare(model, x)
    kinds = [type(op) for op in analyse_prepared(prepared).ops.values()]
    assert kinds.count(Statistics) == 2
    masks = dspfx.get_masks(prepared)
    masks["blocks.0.fc"][:, LEFT:] = False
    masks["blocks.0.fc"][LEFT:] = False
    dspfx.set_masks(prepared, masks)
    compact = dspfx.convert(prepared)
    with torch.no_grad():
        assert_equal(prepared(x), compact(x))


def test_a_parameter_added_in_place_keeps_the_stream_whole() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.rand(WIDTH, 1, 1))
            self.conv = nn.Conv2d(WIDTH, WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y += self.shift
            return y.relu()

    _, compact, _ = narrowed(Stream(Added()), ["first", "blocks.0.conv"], ["blocks.0.conv"])
    assert compact.get_submodule("head").in_features == WIDTH


def test_images_that_are_joined_along_the_batch_share_their_channels() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat([self.a(x).relu(), self.b(x).relu()], 2)
            return both[:, :, : x.shape[2]] + both[:, :, x.shape[2] :]

    prepared, compact, _ = narrowed(Stream(Joined()), ["blocks.0.a", "blocks.0.b"], [])
    ops = analyse_prepared(prepared).ops.values()
    assert any(isinstance(op, Elementwise) and len(op.operands) == 2 for op in ops)
    assert compact.get_submodule("head").in_features == LEFT


def test_saved_and_loaded(tmp_path: Any) -> None:
    model = Stream(
        NextBlock(WIDTH, 20, "function", True), ClassToken(WIDTH, 9, "module", True, True)
    )
    blank = copy.deepcopy(model)
    writers = ["first", "blocks.0.down", "blocks.1.down"]
    prepared, compact, x = narrowed(model, writers, ["blocks.0.up", "blocks.1.up"])
    dspfx.save(compact, tmp_path / "small.dspfx")
    loaded = dspfx.load(tmp_path / "small.dspfx", blank.double().eval())
    with torch.no_grad():
        assert torch.equal(loaded(x), compact(x))
    dspfx.save(prepared, tmp_path / "prepared.dspfx")


def test_exported(tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Stream(NextBlock(WIDTH, 20, "module", True), ChannelLast("rms"))
    writers = ["first", "blocks.0.down"]
    _, compact, _ = narrowed(model, writers, ["blocks.0.up"])
    compact = compact.float()
    x = torch.randn(2, 3, 8, 8)
    dspfx.export(compact, x, tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    given = torch.randn(5, 3, 8, 8)
    (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    with torch.no_grad():
        assert_equal(compact(given), torch.from_numpy(found), tolerance=1e-4)


class ChannelLast(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm = ChannelNorm(WIDTH, how)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
