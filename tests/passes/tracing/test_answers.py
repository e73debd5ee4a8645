"""Whatever code is told of its inputs is so in every call, or the call is refused."""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, random_masks, randomise

X = torch.randn(5, 3, 10, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TWO = X[:2]


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.register_buffer("keep", torch.arange(8)[:, None, None] % 2 == 0)
        self.register_buffer("scale", torch.ones(1, 8, 1, 1))

    def net(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class Asks(Convs):
    def __init__(self, code: Callable[..., Any]) -> None:
        super().__init__()
        self.does = code

    def forward(self, *args: Any) -> Any:
        return self.does(self, *args)


class Pair(NamedTuple):
    image: Tensor
    mask: Tensor | None = None


@dataclass
class Record:
    image: Tensor
    mask: Tensor | None = None


def spread(self: Convs, image: Tensor, mask: Tensor | None = None) -> Tensor:
    return self.net(image) if mask is None else -self.net(image)


def each(pieces: Callable[[Tensor], Any]) -> Callable[..., Any]:
    return lambda self, x: torch.cat([self.net(piece) for piece in pieces(x)])


# code, the example, and calls for which it does something else
TOLD: dict[str, tuple[Any, ...]] = {
    "list or tensor": (
        lambda s, x: sum(s.net(i) for i in x) if isinstance(x, list | tuple) else s.net(x),
        *(([TWO, TWO],), (TWO,), ([TWO],)),
    ),
    "list or tuple": (
        lambda s, x: s.net(x[0]) if isinstance(x, list) else -s.net(x[0]),
        *(([TWO],), ((TWO,),)),
    ),
    "plain or ordered": (
        lambda s, x: s.net(x["i"]) if isinstance(x, OrderedDict) else -s.net(x["i"]),
        *(({"i": TWO},), (OrderedDict(i=TWO),)),
    ),
    "int or float": (
        lambda s, x, n: s.net(x) * n if isinstance(n, int) else -s.net(x),
        *((TWO, 2), (TWO, 2.0)),
    ),
    "tensor or number": (
        lambda s, x, n: s.net(x) * n if torch.is_tensor(n) else -s.net(x),
        *((TWO, torch.tensor(2.0)), (TWO, 2.0)),
    ),
    "spread": (
        lambda s, d: spread(s, **d),
        *(({"image": TWO},), ({"image": TWO, "mask": TWO},)),
    ),
    "copied": (
        lambda s, d: sum(s.net(i) for i in dict(d).values()),
        *(({"image": TWO},), ({"image": TWO, "mask": TWO},)),
    ),
    "merged": (
        lambda s, d: sum(s.net(i) for i in {**d, "own": TWO}.values()),
        *(({"image": TWO},), ({"image": TWO, "mask": TWO},)),
    ),
    "found": (
        lambda s, d: -s.net(d["image"]) if d.get("mask") is not None else s.net(d["image"]),
        *(({"image": TWO, "mask": TWO},), ({"image": TWO},), ({"image": TWO, "mask": None},)),
    ),
    "not found": (
        lambda s, d: -s.net(d["image"]) if d.get("mask") is not None else s.net(d["image"]),
        *(({"image": TWO},), ({"image": TWO, "mask": TWO},)),
    ),
    "named field": (
        lambda s, d: spread(s, d.image, d.mask),
        *((Pair(TWO, TWO),), (Pair(TWO),)),
    ),
    "no field": (lambda s, d: spread(s, d.image, d.mask), (Record(TWO),), (Record(TWO, TWO),)),
    "no item": (
        lambda s, d: sum(s.net(i) for i in d if i is not None),
        *(([TWO, None],), ([TWO, TWO],)),
    ),
    "any": (lambda s, x, d: -s.net(x) if d else s.net(x), (TWO, [TWO]), (TWO, [])),
    "table": (
        lambda s, x: s.net(x) * {10: 2.0, 8: 3.0}.get(x.shape[2], 1.0),
        *((TWO,), (TWO[:, :, 2:],), (TWO[:, :, 1:],)),
    ),
    "set": (
        lambda s, x: s.net(x) if s.net(x).shape[3] in {5, 7} else -s.net(x),
        *((TWO,), (TWO[..., 1:],)),
    ),
    "channels of an input": (
        lambda s, x, m: s.net(x) if m.shape[1] > 1 else -s.net(x),
        *((TWO, TWO), (TWO, TWO[:, :1])),
    ),
    "size of an input": (
        lambda s, x, m: s.net(x) if m.size(1) > 1 else -s.net(x),
        *((TWO, TWO), (TWO, TWO[:, :1])),
    ),
    "shapes of inputs": (
        lambda s, x, m: s.net(x) if m.shape == x.shape else -s.net(x),
        *((TWO, TWO), (TWO, TWO[:, :1])),
    ),
    "elements of an input": (
        lambda s, x, m: s.net(x) if m.numel() else -s.net(x),
        *((TWO, TWO), (TWO, TWO[:0])),
    ),
    "rank": (
        lambda s, x, m: s.net(x) if len(m.shape) > 3 else -s.net(x),
        *((TWO, TWO), (TWO, TWO[0])),
    ),
    "unbound": (each(lambda x: x[:, None].unbind(0)), (TWO,), (X,)),
    "split": (each(lambda x: torch.split(x, 1)), (TWO,), (X,)),
    "chunks": (each(lambda x: x.chunk(2, dim=0)), (TWO,), (X[:1],)),
    "rows": (each(lambda x: x.unflatten(0, (-1, 1))), (TWO,), (X,)),
}


@pytest.mark.parametrize("kind", TOLD)
def test_what_code_was_told_is_checked_at_every_call(kind: str) -> None:
    """For other inputs it was computed as for the example: wrong, without a word."""
    code, inputs, *others = TOLD[kind]
    model = randomise(Asks(code)).double()
    prepared = dspfx.prepare(model, inputs)
    assert_equal(model(*inputs), prepared(*inputs), tolerance=0)
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    compact = dspfx.convert(prepared)
    modules = [prepared, compact, *(pickle.loads(pickle.dumps(m)) for m in (prepared, compact))]
    for module in modules:
        assert_equal(prepared(*inputs), module(*inputs))
        for other in others:
            with pytest.raises(AssertionError, match="other inputs"):
                module(*other)


class Swish(torch.autograd.Function):
    """Saves memory, and is called from C."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.sigmoid() * (1 + x * (1 - x.sigmoid())))


# code that torch has always let through, the example, and other calls
FREE: dict[str, tuple[Any, ...]] = {
    "unpacked": (
        lambda s, x: s.net(torch.cat([p[:, :1] for p in _unpacked(x)], 1)),
        *((TWO,), (X,), (X[..., 1:],)),
    ),
    "never None": (lambda s, x: s.net(x) if s.net(x) != None else x, (TWO,), (X,)),  # noqa: E711
    "masked by a buffer": (
        lambda s, x: s.b(torch.where(s.keep, s.a(x), 0.0)),
        *((TWO,), (X,), (X[..., 1:],)),
    ),
    "expanded buffer": (
        lambda s, x: s.b(s.a(x) * s.scale.expand(len(x), -1, x.shape[2] - 2, x.shape[3] - 2)),
        *((TWO,), (X[:2, :, 1:],)),
    ),
    "numpy": (lambda s, x: s.net(x) / np.prod(x.shape[2:]), (TWO,), (X,)),
    "pairs": (lambda s, x: F.avg_pool2d(s.net(x), _pair(x.shape[1] - 1)), (TWO,), (X,)),
    "a function of autograd": (lambda s, x: s.b(Swish.apply(s.a(x))), (TWO,), (X,)),
    "largest number": (
        lambda s, x: s.net(x).clamp(max=torch.finfo(x.dtype).max),
        *((TWO,), (X,), (X[..., 1:],)),
    ),
    "tensor of sizes": (
        lambda s, x: s.net(x) / torch.tensor([x.shape[2], x.shape[3]]).prod(),
        *((TWO,), (X,), (X[..., 1:],)),
    ),
    "filled": (
        lambda s, x: s.b(s.a(x).new_zeros(s.a(x).shape).copy_(s.a(x))),
        *((TWO,), (X,), (X[..., 1:],)),
    ),
    "without gradients": (
        lambda s, x: s.net(x) if not torch.is_grad_enabled() else -s.net(x),
        *((TWO,), (X,), (X[..., 1:],)),
    ),
    "minus infinity": (
        lambda s, x: s.net(x).masked_fill(s.net(x) > 0, float("-inf")),
        *((TWO,), (X,), (X[..., 1:],)),
    ),
    "device": (
        lambda s, x: s.net(x) if x.device.type == "cpu" else x,
        *((TWO,), (X,), (X[..., 1:],)),
    ),
}


def _unpacked(x: Tensor) -> tuple[Tensor, ...]:
    first, second, third = x.split(1, 1)
    return third, second, first


def _pair(x: Any) -> Any:
    return tuple(x) if isinstance(x, list | tuple) else (x, x)


@pytest.mark.parametrize("kind", FREE)
def test_common_code_goes_through(kind: str) -> None:
    code, *calls = FREE[kind]
    model = randomise(Asks(code)).double().eval()
    with torch.no_grad():
        prepared = dspfx.prepare(model, calls[0])
        for inputs in calls:
            assert_equal(model(*inputs).exp(), prepared(*inputs).exp(), tolerance=0)
        dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
        compact = dspfx.convert(prepared)
        for inputs in calls:
            assert_equal(prepared(*inputs).exp(), compact(*inputs).exp())


def test_gradients_flow_through_functions_of_autograd() -> None:
    """Torch runs their code without recording it."""
    model = randomise(Asks(FREE["a function of autograd"][0])).double()
    prepared = dspfx.prepare(model, (TWO,))
    for module in (model, prepared):
        module(TWO).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert_equal(parameter.grad, prepared.get_parameter(name).grad, tolerance=1e-12)


class Rounds(torch.autograd.Function):
    """Lets gradients through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def overwritten(y: Tensor) -> Tensor:
    total = torch.zeros(2, dtype=torch.float64)  # no value of the graph
    total[0] = y.mean()
    return y * total.sum()


UNTRACEABLE: dict[str, Callable[[Tensor], Any]] = {
    "an estimator": Rounds.apply,
    "vmap": torch.vmap(lambda t: t * 2),
    "a constant that is overwritten": overwritten,
    "a count of values": lambda y: y * (y > 0).nonzero().shape[0] if len(y.unique()) else y,
}


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_what_cannot_be_traced_is_an_opaque_leaf(kind: str) -> None:
    """None of it may end the process, or be computed for the example only."""

    class Leaf(nn.Module):
        def forward(self, y: Tensor) -> Any:
            return UNTRACEABLE[kind](y)

    class Outer(Convs):
        def __init__(self) -> None:
            super().__init__()
            self.leaf = Leaf()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.leaf(self.a(x)))

    model = randomise(Outer()).double().eval()
    prepared = dspfx.prepare(model, TWO)
    assert "opaque, since it cannot be traced: leaf" in str(dspfx.report(prepared))
    compact = dspfx.convert(prepared)
    for x in (TWO, X, -X):
        assert_equal(model(x), prepared(x), tolerance=0)
        assert_equal(model(x), compact(x))
    for module in (model, prepared):
        module(TWO).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert_equal(parameter.grad, prepared.get_parameter(name).grad, tolerance=1e-12)


def test_layers_that_see_one_image_without_a_batch_are_left_alone() -> None:
    """Their channels lie elsewhere; pruning them crashed."""

    class Each(Convs):
        def __init__(self) -> None:
            super().__init__()
            self.c, self.d = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            first, second = x.unbind(0)
            return self.d(self.c(torch.stack([self.net(first), self.net(second)])))

    prepared = dspfx.prepare(randomise(Each()).double(), TWO)
    assert list(gated_layers(prepared)) == ["c", "d"]
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    assert_equal(prepared(TWO), dspfx.convert(prepared)(TWO))
