"""What code overwrites under another name: it is followed, left untraced, or refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aliasing_code import Runs, Writes, X, snippets
from hypothesis import given, settings
from test_properties import COUNT, EXAMPLES
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from dspfx.model.module import PreparedModule
from helpers import assert_equal, random_masks, randomise


def half_then_whole(y: Tensor) -> Any:
    y[:, :2].sigmoid_()
    return y


def half_then_nested(y: Tensor) -> Any:
    y[:, 1:].mul_(2)
    return {"list": [(1, y)]}


def half_then_other_half(y: Tensor) -> Any:
    z = y[:, 2:]
    y[:, 1:3].exp_()
    return z


def piece_of_chunk(y: Tensor) -> Any:
    y.split(2, 1)[0].tanh_()
    return y


def every_piece(y: Tensor) -> Any:
    for piece in y.unbind(2):
        piece.mul_(3)
    return y


def view_of_a_layer(y: Tensor) -> Any:
    torch.nn.Flatten(2).forward(y).sigmoid_()
    return y


def detached(y: Tensor) -> Any:
    y.detach().mul_(2)
    return y


def data(y: Tensor) -> Any:
    y.data.mul_(2)
    return y


def augmented(y: Tensor) -> Any:
    z = y[:, :2]
    z += 1
    return y


def expanded(y: Tensor) -> Any:
    m = y.mean(1, keepdim=True)
    e = m.expand(-1, 6, -1, -1)
    m.mul_(2)
    return e + y


def given_out(y: Tensor) -> Any:
    z = torch.empty_like(y)
    torch.add(y, 1, out=z)
    return z


def item_again(y: Tensor) -> Any:
    pieces = y.chunk(2, 1)
    pieces[0].exp_()
    return pieces[0] + pieces[1]


def transposed(y: Tensor) -> Any:
    y.permute(0, 2, 3, 1).relu_()
    return y


STALE: tuple[Callable[[Tensor], Any], ...] = (
    *(half_then_whole, half_then_nested, half_then_other_half, piece_of_chunk, every_piece),
    *(view_of_a_layer, detached, data, augmented, expanded, given_out, item_again, transposed),
)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


class Ends(Body):
    """The root itself returns what the code makes."""

    def __init__(self, code: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.code = code

    def forward(self, x: Tensor) -> Any:
        return self.code(super().forward(x))


@pytest.mark.parametrize("code", STALE)
def test_a_root_that_returns_stale_values_is_refused_before_it_is_trained(
    code: Callable[[Tensor], Any],
) -> None:
    """`convert` said so, after training."""
    with pytest.raises(dspfx.TraceError, match=r"overwritten under|overwritten; |'out='"):
        dspfx.prepare(randomise(Ends(code)).double(), X)


@pytest.mark.parametrize("code", STALE)
def test_a_root_that_returns_stale_values_is_prepared_in_parts(
    code: Callable[[Tensor], Any],
) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Body()

        def forward(self, x: Tensor) -> Any:
            return code(self.body(x))

    model = randomise(Root()).double()
    prepared = dspfx.prepare(model, X)
    assert isinstance(prepared.body, PreparedModule)
    assert_prunes(model, prepared, X)


@pytest.mark.parametrize("code", STALE)
def test_the_module_that_overwrites_is_an_opaque_leaf(code: Callable[[Tensor], Any]) -> None:
    """Not the one around it, which reads the value later, nor the whole model."""

    class Post(nn.Module):
        def forward(self, y: Tensor) -> Any:
            return code(y)

    class Root(Body):
        def __init__(self) -> None:
            super().__init__()
            self.post = Post()

        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return self.post(y), y * 2

    model = randomise(Root()).double()
    prepared = dspfx.prepare(model, X)
    assert isinstance(prepared, PreparedModule)
    assert "opaque, since it cannot be traced: post" in str(dspfx.report(prepared))
    assert_prunes(model, prepared, X)


def assert_prunes(model: nn.Module, prepared: nn.Module, x: Any) -> None:
    """Equal in both modes, and after conversion, at another size too."""
    for mode in (True, False):
        twins = copy.deepcopy(model).train(mode), copy.deepcopy(prepared).train(mode)
        with torch.no_grad():
            given = [copy.deepcopy(x) for _ in twins]
            results = [twin(inputs) for twin, inputs in zip(twins, given, strict=True)]
        assert_equal(*results, tolerance=0)
        assert_equal(*given, tolerance=0)
    dspfx.set_masks(prepared.eval(), random_masks(prepared, keep=0.6, drop=0.3))
    compact = dspfx.convert(prepared)
    for other in (x, torch.cat([x, x])[..., 1:] if isinstance(x, Tensor) else x):
        given = [copy.deepcopy(other) for _ in range(2)]
        with torch.no_grad():
            assert_equal(prepared(given[0]), compact(given[1]))
        assert_equal(*given, tolerance=0)


class Augments(nn.Module):
    """The value is one, under two names."""

    def forward(self, y: Tensor) -> Tensor:
        z = y
        z += 1
        z -= y.mean()
        z *= 2
        z /= 3
        return y


class WritesInputs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        x.sub_(x.mean())
        return x.clamp(max=1)


class ReluFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x) + x


@pytest.mark.parametrize("kind", [Augments, WritesInputs, ReluFirst])
def test_inputs_that_are_overwritten_are_so_for_the_caller_of_the_compact_model(
    kind: type[nn.Module],
) -> None:
    """The caller reads them after the call: `x + block(x)`."""

    class Net(Body):
        def __init__(self) -> None:
            super().__init__()
            self.pre = kind()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.pre(x))

    model = randomise(Net()).double()
    prepared = dspfx.prepare(model, X)
    assert isinstance(prepared, PreparedModule)
    assert {"b", "c"} <= gated_layers(prepared).keys()
    assert_prunes(model, prepared, X)


def test_inputs_that_are_overwritten_are_so_when_it_is_compiled() -> None:
    """But not the example."""

    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    prepared, example = dspfx.prepare(randomise(Net()).double(), X), X.clone()
    compiled = dspfx.compile(dspfx.convert(prepared.eval()), example, engines=["own", "inductor"])
    assert_equal(example, X, tolerance=0)
    x = X.clone()
    compiled(x)
    assert_equal(x, 2 * X)


def test_an_item_of_an_input_that_is_overwritten_is_so_for_the_caller() -> None:
    class Net(Body):
        def forward(self, batch: dict[str, Any]) -> Any:  # type: ignore[override]
            images = batch["images"][0]
            images.sub_(0.5)
            return super().forward(images), batch["scale"]

    batch = {"images": [X.clone(), X.clone()], "scale": 2.0}
    model = randomise(Net()).double()
    assert_prunes(model, dspfx.prepare(model, ({"images": batch["images"], "scale": 2.0},)), batch)


def test_inputs_that_are_overwritten_by_way_of_a_view_are_refused() -> None:
    class Net(Body):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            x[:, :1].zero_()
            return y

    class Reshapes(Body):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y.mean() + x.unsqueeze_(1).mean()

    with pytest.raises(dspfx.TraceError, match=r"'x' is read or returned after"):
        dspfx.prepare(Net().double(), X)
    with pytest.raises(dspfx.TraceError, match="the shape of the input 'x' is changed"):
        dspfx.prepare(Reshapes().double(), X)


class Keyword(nn.Module):
    """An opaque module that overwrites what it is given by name, in a list, or both."""

    def forward(self, *, y: Tensor, more: list[Tensor]) -> None:
        if bool((y > 1e9).any()):
            raise ValueError
        y[:, 1:].mul_(2)
        more[0][:, :3].exp_()


def test_what_an_opaque_module_overwrites_is_followed_wherever_it_lies() -> None:
    """Arguments by name, and items of lists, were thought to be read only."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 6, 3)
            self.writes = Keyword()

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            z = self.b(y)
            self.writes(y=y, more=[z, x * 2])
            return self.c(z).mean() + y

    model = randomise(Net()).double()
    prepared = dspfx.prepare(model, X)
    assert isinstance(prepared, PreparedModule)
    assert_prunes(model, prepared, X)


@settings(EXAMPLES, max_examples=COUNT // 2)
@given(code=snippets(), where=Runs.anywhere())
def test_random_code_that_overwrites_is_right_or_refused(
    code: Writes, where: Callable[[Writes], nn.Module]
) -> None:
    """The oracle is the model itself, in both modes; nothing but a `TraceError` is raised."""
    model = randomise(where(code)).double()
    try:
        with torch.no_grad():
            model.eval()(X.clone())
    except (RuntimeError, IndexError):
        return  # no model of anybody's
    try:
        prepared = dspfx.prepare(model, X)
    except dspfx.TraceError:
        return
    assert_prunes(model, prepared, X)
