"""Code that makes modules, variables and conversions as it goes is traced as what it computes."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, random_masks, randomise

SIZES = ((2, 3, 8, 8), (3, 3, 6, 12))


class Net(nn.Module):
    def __init__(self, code: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.n = nn.Sequential(
            nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Sigmoid()
        )
        self.register_buffer("mean", torch.linspace(-1, 1, 8)[:, None, None])
        self.scale = torch.linspace(0.5, 2, 8, dtype=torch.float64)[:, None, None]
        self.code = code

    def forward(self, x: Tensor) -> Any:
        return self.c(self.code(self, self.b(self.a(x)), x))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TorchScript announces its retirement

    @torch.jit.script
    def swish(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    @torch.jit.script
    def scripted(x: Tensor, times: float = 1.0) -> Tensor:
        return swish(x) * times + F.softplus(x)

    doubled = torch.jit.trace(lambda y: y * y.shape[0], torch.ones(2, 8, 6, 6))


def converts(s: Any, y: Tensor, x: Tensor) -> Tensor:
    s.mean = s.mean.type_as(x)
    return y - s.mean


def converts_twice(s: Any, y: Tensor, x: Tensor) -> Tensor:
    s.mean = s.mean.to(x.device).contiguous()
    y = y + s.mean
    s.mean = Variable(s.mean).to(dtype=x.dtype)
    return y * s.mean


def converts_attribute(s: Any, y: Tensor, x: Tensor) -> Tensor:
    s.scale = s.scale.to(x)
    return y * s.scale


def converts_attribute_in_training(s: Any, y: Tensor, x: Tensor) -> Tensor:
    if s.training:
        s.scale = s.scale.to(x.device, x.dtype)
    return y / s.scale


def in_slices(s: Any, y: Tensor, x: Tensor) -> Tensor:
    for layer in s.n[3:]:
        y = layer(y)
    return nn.Sequential(*s.n[:2])(y)


CODE: dict[str, Callable[..., Any]] = {
    "activation": lambda s, y, x: nn.ReLU()(y),
    "activation in place": lambda s, y, x: nn.Hardswish(inplace=True)(y),
    "pool": lambda s, y, x: nn.AdaptiveAvgPool2d(1)(y) * nn.AvgPool2d(3, 1, 1)(y),
    "dropout": lambda s, y, x: nn.Softmax(1)(nn.Dropout(0.0)(y)),
    "slice": lambda s, y, x: s.n[:4](y),
    "two slices": in_slices,
    "children in a new container": lambda s, y, x: nn.Sequential(s.n, nn.Tanh())(y),
    "scripted": lambda s, y, x: swish(y),
    "scripted of scripted": lambda s, y, x: scripted(y, times=2.0) + scripted(y),
    "variable": lambda s, y, x: y - Variable(s.mean),
    "variable of a value": lambda s, y, x: y * Variable(y.mean((2, 3), keepdim=True), False),
    "buffer to itself": converts,
    "buffer to itself, twice": converts_twice,
    "attribute to itself": converts_attribute,
    "attribute to itself in training": converts_attribute_in_training,
    "type of parameters": lambda s, y, x: y.to(next(s.parameters()).dtype),
    "type and device": lambda s, y, x: y + torch.ones(
        1, dtype=next(s.n.parameters()).dtype, device=next(s.parameters()).device
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CODE)
def test_is_traced(kind: str) -> None:
    model = randomise(Net(CODE[kind])).double()
    inputs = [torch.randn(size).double() for size in SIZES]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = dspfx.prepare(model, inputs[0])
    assert isinstance(prepared, dspfx.PreparedModule)
    assert {"b", "c"} <= gated_layers(prepared).keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.scale.dtype == torch.float64
    for x in inputs:
        for mode in (True, False):
            assert_equal(model.train(mode)(x), prepared.train(mode)(x), tolerance=0)
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    compact = dspfx.convert(prepared)
    for x in inputs:
        assert_equal(prepared(x), compact(x))


def test_gradients_go_where_they_do_in_the_original() -> None:
    for kind in ("variable of a value", "scripted of scripted", "buffer to itself, twice"):
        model, x = randomise(Net(CODE[kind])).double(), torch.randn(SIZES[0]).double()
        prepared = dspfx.prepare(model, x)
        for module in (model, prepared):
            module.train()(x).square().sum().backward()
        for name, parameter in prepared.named_parameters():
            gradient = model.get_parameter(name).grad
            assert (gradient is None) == (parameter.grad is None)
            if gradient is not None:
                assert_equal(gradient, parameter.grad, 1e-12)


def keeps(s: Any, y: Tensor, x: Tensor) -> Tensor:
    s.scale = s.scale.to(x) * 1.5
    return y * s.scale


def rounds(s: Any, y: Tensor, x: Tensor) -> Tensor:
    s.mean = (s.mean / 3).half().to(x)
    return y * s.mean


REFUSED: dict[str, Callable[..., Any]] = {
    "own weights": lambda s, y, x: nn.Conv2d(8, 8, 1).double()(y),
    "own statistics": lambda s, y, x: nn.BatchNorm2d(8, affine=False).double().train()(y),
    "traced for its example": lambda s, y, x: doubled(y),
    "another value": keeps,
    "another buffer": rounds,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_differs_from_call_to_call_is_not(kind: str) -> None:
    with pytest.raises(dspfx.TraceError):
        dspfx.prepare(randomise(Net(REFUSED[kind])).double(), torch.randn(SIZES[0]).double())
