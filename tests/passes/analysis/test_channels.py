"""The channel analysis: which channels are one, what moves them, what is declined."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import dspfx
from dspfx.passes.analysis.channel_ops import (
    ChannelAnalysis,
    Channelwise,
    Elementwise,
    FullWidth,
    Gather,
    Mix,
    Op,
)
from dspfx.passes.analysis.channels import analyse
from helpers import assert_equal, random_masks, randomise

X = torch.randn(2, 6, 4, 5)


class Applies(nn.Module):
    """A convolution, some function of its output, and a convolution."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.function = nn.Conv2d(6, 8, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x))


def analysed(model: nn.Module, x: Tensor = X) -> tuple[fx.GraphModule, ChannelAnalysis]:
    module = fx.symbolic_trace(model).eval()
    return module, analyse(module, (x,))


def last_op(function: Callable[[Tensor], Tensor]) -> Op:
    _, analysis = analysed(Applies(function))
    return list(analysis.ops.values())[-2]  # before the output


@pytest.mark.parametrize(
    ("function", "index"),
    [
        (lambda x: x[:, 2:5], [2, 3, 4]),
        (lambda x: x[:, ::3], [0, 3, 6]),
        (lambda x: x.chunk(2, 1)[1], [4, 5, 6, 7]),
        (lambda x: torch.split(x, [3, 5], dim=1)[1], [3, 4, 5, 6, 7]),
        (lambda x: x.narrow(1, 1, 2), [1, 2]),
        (lambda x: x.flip(1), [7, 6, 5, 4, 3, 2, 1, 0]),
        (lambda x: x.roll(2, 1), [6, 7, 0, 1, 2, 3, 4, 5]),
        (lambda x: torch.cat([x, x[:, :2]], 1), [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), [-1, 0, 1, 2, 3, 4, 5, 6, 7, -1, -1]),
        (
            lambda x: x.view(2, 2, 4, 4, 5).transpose(1, 2).reshape(2, 8, 4, 5),
            [0, 4, 1, 5, 2, 6, 3, 7],
        ),
        (lambda x: F.channel_shuffle(x, 4), [0, 2, 4, 6, 1, 3, 5, 7]),
    ],
)
def test_moving_channels_is_a_gather(function: Callable[[Tensor], Tensor], index: list) -> None:
    op = last_op(function)
    assert isinstance(op, Gather)
    assert op.index.tolist() == index


@pytest.mark.parametrize(
    ("function", "repeat"),
    [
        (lambda x: x.permute(0, 2, 3, 1), 1),
        (lambda x: x.flatten(2), 1),
        (lambda x: x.view(x.size(0), 8, -1), 1),
        (lambda x: x[:, :, ::2, 1], 1),
        (lambda x: F.pad(x, (1, 1, 0, 0)), 1),
        (lambda x: x[:, :, None], 1),
        (lambda x: F.pixel_unshuffle(x[..., :4], 2), 4),
        (lambda x: x.mean((2, 3)), 1),
        (lambda x: F.max_pool2d(x, 2), 1),
    ],
)
def test_moving_positions_is_channelwise(function: Callable[[Tensor], Tensor], repeat: int) -> None:
    op = last_op(function)
    assert isinstance(op, Channelwise)
    assert op.repeat == repeat
    assert op.keeps_zero.all()


@pytest.mark.parametrize("flat", [nn.Flatten(), lambda x: x.view(2, -1), lambda x: x.flatten(1)])
def test_positions_become_channels_for_a_linear_layer_alone(
    flat: Callable[[Tensor], Tensor],
) -> None:
    class Flattens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.applies, self.last = Applies(flat), nn.Linear(160, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.applies(x).relu())

    *_, op, relu, _, _ = analysed(Flattens())[1].ops.values()
    assert isinstance(op, Channelwise)
    assert (op.repeat, op.keeps_zero.all()) == (20, True)
    assert isinstance(relu, Elementwise)
    alone = last_op(flat)  # another image has more of them
    assert isinstance(alone, FullWidth)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(2, 4, 2, 4, 5),
        lambda x: x.softmax(1),
        lambda x: x.view(2, 4, 40).permute(0, 2, 1),
        lambda x: x.mean(1, keepdim=True),
        lambda x: F.pixel_shuffle(x.transpose(1, 2), 2),
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 1), value=1.0),
        lambda x: x.view(2, 20, 8, 1),
        lambda x: x.reshape(1, 16, 4, 5),
    ],
)
def test_what_takes_channels_apart_is_declined(function: Callable[[Tensor], Tensor]) -> None:
    _, analysis = analysed(Applies(function))
    assert isinstance(list(analysis.ops.values())[-2], FullWidth)
    assert analysis.declined
    assert all(d.reason for d in analysis.declined)


@pytest.mark.parametrize(
    ("function", "keeps_zero", "absorbing"),
    [
        (torch.relu, True, False),
        (torch.sigmoid, False, False),
        (lambda x: x + 1, False, False),
        (lambda x: x * 3, True, True),
        (lambda x: x.clamp(min=0.1), False, False),
        (lambda x: x.clamp(-1, 1), True, False),
        (lambda x: x + x.relu(), True, False),
        (lambda x: x * x.sigmoid(), True, True),
        (lambda x: x - x.sigmoid(), True, False),
    ],
)
def test_zeros_are_found_by_running(
    function: Callable[[Tensor], Tensor], keeps_zero: bool, absorbing: bool
) -> None:
    op = last_op(function)
    assert isinstance(op, Elementwise)
    assert (op.keeps_zero, op.absorbing) == (keeps_zero, absorbing)


def test_residual_streams_are_one_class_and_branches_are_not() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
            self.c = nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.c(x)
            return x + self.b(self.a(x).relu())

    module, analysis = analysed(Block())
    nodes = {n.name: n for n in module.graph.nodes}
    stream = analysis.class_of(nodes["c"])
    assert np.array_equal(stream, analysis.class_of(nodes["b"]))
    assert len(set(stream)) == 6
    assert not set(stream) & set(analysis.class_of(nodes["a"]))


def test_layers_are_described() -> None:
    _, analysis = analysed(
        nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1, groups=2), nn.Flatten(), nn.Linear(48, 3))
    )
    ops = {n.name: op for n, op in analysis.ops.items()}
    conv, linear = ops["_0"], ops["_2"]
    assert isinstance(conv, Mix)
    assert (conv.filters, conv.channels, conv.structural_groups) == (8, 6, 2)
    assert (conv.taps, conv.positions) == (9, 2 * 3)
    assert isinstance(linear, Mix)
    assert (linear.filters, linear.channels, linear.full_width) == (3, 48, False)


def test_a_batch_of_one_is_not_mistaken_for_channels() -> None:
    """Flattening batch and channels together moves whole channels, if there is one sample."""
    x = X[:1]
    fold = Applies(lambda x: x.reshape(1, -1, 4, 5))
    assert isinstance(list(analysed(fold, x)[1].ops.values())[-2], Gather | Channelwise)
    _, analysis = analysed(fold, X)
    assert isinstance(list(analysis.ops.values())[-2], FullWidth)


def test_the_analysis_changes_nothing() -> None:
    module = fx.symbolic_trace(Applies(lambda x: x.view(2, -1).relu_())).eval()
    before, state = module.code, {k: v.clone() for k, v in module.state_dict().items()}
    analyse(module, (X,))
    assert module.code == before
    assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat([x, x[:, :0]], 1),
        lambda x: x + x[:, :, :0].sum(2, keepdim=True),
        lambda x: x[:, torch.arange(x.shape[1]).flip(0)],
        lambda x: x[:, :, torch.arange(x.shape[2]).flip(0).long()],
        lambda x: torch.where((x > 0) & (x < 1), x, -x),
    ],
)
def test_what_once_crashed_the_analysis(function: Callable[[Tensor], Tensor]) -> None:
    """Empty slices, indices that are computed, and operators of Python that end in `_`."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Applies(function), nn.LazyConv2d(2, 1)).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    model(x)
    prepared = dspfx.prepare(randomise(model).eval(), x)
    dspfx.set_masks(prepared, random_masks(prepared, keep=0.4, drop=0.2))
    assert_equal(prepared(x), dspfx.convert(prepared)(x))


def test_one_channel_of_many_positions_is_not_unfolded() -> None:
    """An attention map of one head, transposed, once took n^3 numbers: here 128 GB."""

    class Map(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(2, 3)).transpose(1, 2)

    _, analysis = analysed(Map(), torch.zeros(2, 1, 2000, 1))
    node, op = list(analysis.ops.items())[-2]
    assert isinstance(op, Channelwise)
    assert (op.repeat, analysis.values[node].dim) == (1, 2)
