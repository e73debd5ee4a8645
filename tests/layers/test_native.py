"""The project's own kernel: equal to torch's convolutions, and safe against damaged indices."""

import contextlib
import copy
import math
import operator
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    added_to,
    any_lists,
    calls,
    damage,
    expected,
    for_winograd,
    laid_out,
    layer,
    moved,
    runs,
    with_weight,
)
from torch import Tensor, nn

import dspfx
from dspfx.engines import race
from dspfx.engines.torch_call import TorchCall
from dspfx.errors import EquivalenceError
from dspfx.layers import native
from dspfx.layers.group_conv import (
    Added,
    FilterGroup,
    GroupConv2d,
    group_conv_like,
)
from dspfx.layers.group_conv_run import GroupConvRun, pool_numbers
from dspfx.layers.native import packing, reference
from dspfx.passes.lowering.classifier import join_classifiers
from dspfx.passes.lowering.fuse import fuse
from dspfx.passes.lowering.runs import join_runs
from dspfx.passes.lowering.sites import relowered, sites
from helpers import assert_equal

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="module")
def _built() -> None:
    assert native.built()


@pytest.fixture(scope="module")
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@settings(max_examples=300, deadline=None)
@given(calls())
@pytest.mark.usefixtures("_threads")
def test_equal_to_convolutions(call: dict[str, Any]) -> None:
    torch.set_num_threads(call["threads"])
    own, conv = layer(call["conv"], call["groups"], call["seed"])
    own = own.remade(activation=call["activation"])
    generator = torch.Generator().manual_seed(call["seed"])
    x = torch.randn(call["batch"], conv.in_channels, *call["size"], generator=generator)
    given_too, residual = [x], None
    if call["residual"]:
        y = conv(x)
        residual = torch.randn(len(x), call["residual"], *y.shape[2:], generator=generator)
        added = added_to(y.shape[1], call["residual"], call["seed"])
        own, given_too = own.remade(added=added), [x, residual]
        residual = moved(residual, added)
    wanted = expected(conv, x, residual, call["activation"])
    assert_equal(wanted, own(*given_too), 1e-5)
    assert torch.equal(own.whole(), conv.weight.float())
    buffers: Any = (own.weight, own.bias, own.indices)
    numbers = packing.as_text([own.numbers(0, len(given_too) * 2 - 3)])
    (portable,) = reference.run(given_too, *buffers, numbers, [len(given_too)])
    assert_equal(wanted, portable, 1e-5)


@settings(max_examples=150, deadline=None)
@given(any_lists())
@pytest.mark.usefixtures("_threads")
def test_equal_to_the_reference_for_any_lists(call: dict[str, Any]) -> None:
    torch.set_num_threads(call["threads"])
    generator = torch.Generator().manual_seed(0)
    groups = [with_weight(g, call["settings"][0], generator) for g in call["groups"]]
    bias = torch.randn(call["filters"], generator=generator)
    own = GroupConv2d(call["settings"], groups, call["size"][1], call["filters"], bias)
    x = torch.randn(call["size"], generator=generator)
    buffers: Any = (own.weight.double(), own.bias.double(), own.indices)
    (wanted,) = reference.run([x.double()], *buffers, packing.as_text([own.numbers(0, -1)]), [1])
    assert_equal(wanted.float(), own(laid_out(x, call["layout"])), 1e-5)


@settings(max_examples=300, deadline=None)
@given(for_winograd())
@pytest.mark.usefixtures("_threads")
def test_winograd_is_equal_to_the_reference(call: dict[str, Any]) -> None:
    torch.set_num_threads(call["threads"])
    generator = torch.Generator().manual_seed(0)
    kernel = call["settings"][0]
    groups = []
    for group in call["groups"]:
        g = with_weight(group, kernel, generator)
        scale = max(1, len(g.inputs) * math.prod(kernel)) ** 0.5
        groups.append(FilterGroup(g.filters, g.inputs, g.weight / scale))
    bias = torch.randn(call["filters"], generator=generator)
    sizes = call["size"][1], call["filters"]
    own = GroupConv2d(call["settings"], groups, *sizes, bias, call["activation"], call["added"])
    x = torch.randn(call["size"], generator=generator)
    inputs = [x]
    if call["added"] is not None:
        size = reference.out_size(x.shape[2:], *call["settings"])
        inputs.append(torch.randn(len(x), call["residual"], *size, generator=generator))
    last = len(inputs)
    run = GroupConvRun([own], [(0, 2 * last - 3)], last, [last])
    buffers: Any = (run.weight.double(), run.bias.double(), run.indices)
    doubles = [given.double() for given in inputs]
    (wanted,) = reference.run(doubles, *buffers, run.layers, run.outputs)
    assert run.transformable() == [0]
    fast = run.transformed([0])
    for _ in range(2):  # the second call finds the memory of the first
        (result,) = fast(*(laid_out(given, call["layout"]) for given in inputs))
        assert_equal(wanted.float(), result, 1e-5)
    (portable,) = reference.run(inputs, fast.weight, fast.bias, fast.indices, fast.layers, [last])
    assert_equal(wanted.float(), portable, 1e-5)


@settings(max_examples=300, deadline=None)
@given(runs())
@pytest.mark.usefixtures("_threads")
def test_runs_are_equal_to_their_layers(case: dict[str, Any]) -> None:
    torch.set_num_threads(case["threads"])
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(case["batch"], *size, generator=generator) for size in case["inputs"]]
    layers, reads = [own for own, *_ in case["layers"]], [tuple(r) for _, *r in case["layers"]]
    run = GroupConvRun(layers, reads, len(inputs), case["outputs"])
    run = run.transformed(case["winograd"].intersection(run.transformable()))
    values = list(inputs)
    for own, source, residual in case["layers"]:
        values.append(own(values[source], *([] if residual < 0 else [values[residual]])))
    wanted = [values[number] for number in case["outputs"]]
    for _ in range(2):  # the second call finds the memory of the first
        assert_equal(wanted, run(*inputs), 1e-5)
    buffers: Any = (run.weight, run.bias, run.indices)
    assert_equal(wanted, reference.run(inputs, *buffers, run.layers, run.outputs), 1e-5)


ABSENT = """
import torch
from torch import nn
from dspfx.layers.group_conv import Added
from dspfx.layers.group_conv_run import GroupConvRun
from kernel_cases import layer
torch.set_num_threads(4)
own, convs = zip(*(layer(nn.Conv2d(8, 8, 3, padding=1), 3, seed) for seed in range(3)))
first, *others = own
layers = [first, *(each.remade(added=Added(8, list(range(8)))) for each in others)]
run = GroupConvRun(layers, [(0, -1), (1, 0), (2, 1)], 1, [3])
a, b, c = convs
for batch in (0, 1, 3, 4, 5, 21, 22):
    x = torch.randn(batch, 8, 20, 20)
    y = a(x)
    torch.testing.assert_close(run(x), [c(b(y) + x) + y], rtol=1e-5, atol=1e-5)
"""


@pytest.mark.parametrize("limit", [1, 3])
def test_members_of_a_team_that_never_come(limit: int) -> None:
    """The others do their tasks."""
    environment = os.environ | {"OMP_THREAD_LIMIT": str(limit), "PYTHONPATH": str(TESTS)}
    folder = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", ABSENT], cwd=folder, env=environment, check=True, timeout=300
    )


@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "size", "batch"),
    [
        (40, 70, 1, 56, 1),
        (300, 33, 1, 7, 2),
        (64, 64, 3, 56, 1),
        (130, 20, 3, 14, 2),
        (9, 9, 7, 90, 1),
    ],
)
def test_sizes_that_are_cut_into_strips(
    channels: int, filters: int, kernel: int, size: int, batch: int
) -> None:
    own, conv = layer(nn.Conv2d(channels, filters, kernel, padding=kernel // 2), 2, seed=0)
    x = torch.randn(batch, channels, size, size)
    assert_equal(expected(conv, x, None, "none"), own(x), 1e-5)


@pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.AvgPool2d])
def test_pools_of_many_pixels(kind: Any) -> None:
    """Products are summed up in parts; a pool is not one of them."""
    own, _ = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    x, pool = torch.randn(2, 6, 20, 20), kind(15, 2, 3)
    run = GroupConvRun([own, pool], [(0, -1), (1, -1)], 1, [2])
    assert_equal([pool(own(x))], run(x), 1e-6)


def test_slices_and_other_layouts() -> None:
    own, conv = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    own = own.remade(activation="relu", added=Added(5, np.arange(5)))
    wide, added = torch.randn(2, 9, 8, 8), torch.randn(2, 7, 8, 8)
    for x in (wide[:, 2:8], wide[:, :6].contiguous(memory_format=torch.channels_last)):
        wanted = expected(conv, x, added[:, 1:6], "relu")
        assert_equal(wanted, own(x, added[:, 1:6]), 1e-5)


def test_the_operators_are_such_that_torch_can_work_with_them() -> None:
    own, _ = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    adding = own.remade(added=Added(5, np.arange(5)))
    x, residual = torch.randn(2, 6, 8, 8), torch.randn(2, 5, 8, 8)
    for conv, added in ((own, None), (adding, residual)):
        args = (x, conv.weight, conv.bias, conv.indices, added, len(conv.sizes), conv.count)
        torch.library.opcheck(torch.ops.dspfx.group_conv2d.default, (*args, *conv.settings, 1))
    run = GroupConvRun([own, adding], [(0, -1), (0, 1)], 1, [2])
    torch.library.opcheck(
        torch.ops.dspfx.group_conv_run.default,
        ([x], run.weight, run.bias, run.indices, run.layers, run.outputs),
    )


def test_it_compiles_and_exports() -> None:
    own, conv = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    model, x = nn.Sequential(own, nn.Sigmoid()).eval(), torch.randn(2, 6, 8, 8)
    wanted = torch.sigmoid(expected(conv, x, None, "none"))
    with torch.no_grad():
        assert_equal(wanted, torch.compile(model)(x), 1e-5)
        assert_equal(wanted, torch.export.export(model, (x,)).module()(x), 1e-5)


def test_it_is_called_from_cpp() -> None:
    """What the operator is given must be such that inductor can write it down in C++."""
    own, _ = layer(nn.Conv2d(6, 6, 3, padding=1), 2, seed=0)
    run = GroupConvRun([own, own], [(0, -1), (1, -1)], 1, [2])
    module, x = traced(Calls(run)), torch.randn(2, 6, 8, 8)
    with torch._inductor.config.patch(cpp_wrapper=True):
        assert_equal(module(x), TorchCall(module)(x), 1e-5)


class Calls(nn.Module):
    def __init__(self, run: nn.Module) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.run(x)[0])


def test_copies_and_pickles(tmp_path: Path) -> None:
    own, _ = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    x = torch.randn(2, 6, 8, 8)
    assert torch.equal(copy.deepcopy(own)(x), own(x))
    (tmp_path / "layer").write_bytes(pickle.dumps((own, x, own(x))))
    program = (
        "import pickle, sys, torch; own, x, y = pickle.load(open(sys.argv[1], 'rb')); "
        "torch.testing.assert_close(own(x), y)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "layer")], check=True)


def test_it_is_not_for_training() -> None:
    own, _ = layer(nn.Conv2d(3, 4, 1), 2, seed=0)
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="for inference"):
        own(x).sum().backward()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("indices", lambda t: t[:-1]),
        ("indices", lambda t: torch.cat([t, t[-1:]])),
        ("indices", lambda t: t.float()),
        ("indices", lambda t: t[:0]),
        ("weight", lambda t: t[:-1]),
        ("weight", lambda t: t.double()),
        ("bias", lambda t: t[:-1]),
        ("bias", lambda t: t.double()),
        ("sizes", lambda s: s[:1]),
        ("count", lambda n: n + 1),
        ("count", lambda n: -n),
        ("settings", lambda s: [[0, 3], *s[1:]]),
        ("settings", lambda s: [s[0], [0, 1], *s[2:]]),
        ("settings", lambda s: [s[0], s[1], [-1, 1], s[3]]),
        ("settings", lambda s: [[99, 99], *s[1:]]),
    ],
)
def test_a_damaged_plan_raises(name: str, change: Any) -> None:
    own, _ = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    setattr(own, name, change(getattr(own, name)))
    with pytest.raises(RuntimeError):
        own(torch.randn(2, 6, 8, 8))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_to_a_plan_raises_or_stays_inside(data: st.DataObject) -> None:
    """Each number of the indices is changed in turn: no memory outside is touched."""
    own, _ = layer(nn.Conv2d(6, 9, 3, padding=1), 2, seed=0)
    run = GroupConvRun(
        [own, own.remade(added=Added(9, np.arange(9)))], [(0, -1), (0, 1)], 1, [1, 2]
    )
    run = run.transformed(data.draw(st.sets(st.sampled_from([0, 1]))))
    layers = damage(data, run)
    with contextlib.suppress(RuntimeError):
        for result in run(torch.randn(2, 6, 8, 8)):
            assert result.shape[:2] in {(2, 6), (2, 9), (2, layers[0][4]), (2, layers[1][4])}


@pytest.mark.parametrize("layers", ["", "x", "0 0", "99999999999999999999", "\0", "0 0 -1\n2"])
def test_text_that_describes_no_layers_raises(layers: str) -> None:
    own, _ = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    run = GroupConvRun([own], [(0, -1)], 1, [1])
    run.layers = layers
    with pytest.raises(RuntimeError):
        run(torch.randn(2, 6, 8, 8))


@pytest.mark.parametrize("batch", [1, 4])
def test_layers_of_a_run_are_timed(batch: int) -> None:
    own, _ = layer(nn.Conv2d(6, 6, 3, padding=1), 2, seed=0)
    run = GroupConvRun([own, nn.MaxPool2d(2), own], [(0, -1), (1, -1), (2, -1)], 1, [3])
    seconds = run.seconds(torch.randn(batch, 6, 20, 20))
    assert seconds.shape == (3,)
    assert (seconds > 0).all()


def test_many_sizes_one_after_the_other() -> None:
    """Only the last few are remembered; all are computed."""
    own, conv = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    for _ in range(2):
        for size in range(3, 12):
            x = torch.randn(2, 6, size, size)
            assert_equal(expected(conv, x, None, "none"), own(x), 1e-5)
            conv.float()


def test_a_plan_that_changed_is_read_again() -> None:
    own, conv = layer(nn.Conv2d(6, 5, 3, padding=1), 1, seed=0, keep=1)
    x = torch.randn(2, 6, 8, 8)
    before = own(x)
    own.indices[-6:] = torch.tensor([1, 0, 2, 3, 4, 5])
    swapped = expected(conv, x[:, [1, 0, 2, 3, 4, 5]], None, "none")
    assert not torch.equal(before, own(x))
    assert_equal(swapped, own(x), 1e-5)


def test_an_input_that_does_not_fit_raises() -> None:
    own, _ = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    for x in (torch.randn(2, 3, 8, 8), torch.randn(6, 8, 8), torch.randn(2, 6, 8, 8).double()):
        with pytest.raises(RuntimeError):
            own(x)
    wide, numbers = torch.randn(2, 7, 8, 8), packing.as_text([own.numbers(0, -1)])
    for call in (
        own,
        lambda x: reference.run([x], own.weight, own.bias, own.indices, numbers, [1]),
    ):
        with pytest.raises(RuntimeError, match="an input of 6 channels, got 7"):
            call(wide)
    adding, x = own.remade(added=Added(5, np.arange(5))), torch.randn(2, 6, 8, 8)
    with pytest.raises(RuntimeError, match="residual"):
        adding(x, torch.randn(2, 5, 7, 8))
    numbers = packing.as_text([adding.numbers(0, 1)])
    buffers = (adding.weight, adding.bias, adding.indices, numbers, [2])
    for call in (adding, lambda *inputs: reference.run(list(inputs), *buffers)):
        with pytest.raises(RuntimeError, match="a residual of 5 channels, got 9"):
            call(x, torch.randn(2, 9, 8, 8))  # its first ones were added


def test_empty_batches() -> None:
    own, _ = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    assert own(torch.randn(0, 6, 8, 8)).shape == (0, 5, 8, 8)


WITHOUT_COMPILER = """
import warnings
import torch
from torch import nn
import dspfx
from dspfx.layers import native
from dspfx.errors import EquivalenceError
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert not native.built() and not native.built()
(warning,) = [w for w in caught if "cannot be built" in str(w.message)]
print(warning.message)
from kernel_cases import expected, layer
own, conv = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
x = torch.randn(2, 6, 8, 8)
torch.testing.assert_close(own(x), expected(conv, x, None, "none"))
"""


def test_without_a_compiler_torch_computes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER],
        env={
            **os.environ,
            "CXX": "/nowhere/c++",
            "DSPFX_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": str(TESTS),
        },
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "dspfx's own CPU kernel cannot be built" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_processes_that_build_at_once_do_not_meet(tmp_path: Path) -> None:
    program = (
        "from dspfx.layers import native; assert native.built(); print(native.filters_in_a_block())"
    )
    quick = f"{os.environ.get('DSPFX_NATIVE_FLAGS', '')} -O0"  # to build, not to run
    environment = {**os.environ, "DSPFX_CACHE_DIR": str(tmp_path), "DSPFX_NATIVE_FLAGS": quick}
    command = [sys.executable, "-c", program]
    at_once: list[Any] = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)
    ]
    printed = {process.communicate()[0] for process in at_once}
    assert [process.returncode for process in at_once] == [0, 0]
    assert printed == {f"{native.filters_in_a_block()}\n".encode()}


class Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, Block | Shared)


def traced(root: nn.Module) -> torch.fx.GraphModule:
    return torch.fx.GraphModule(root, Tracer().trace(root))


class Block(nn.Module):
    def __init__(self, *convs: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = convs
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.a(x))
        z = torch.relu(self.b(y) + x)
        return self.c(z) + z.mean((2, 3), keepdim=True)


class Shared(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return torch.relu(y), y


def test_sums_and_activations_are_fused() -> None:
    convs = [layer(nn.Conv2d(6, 6, 3, padding=1), 2, seed=i) for i in range(3)]
    x = torch.randn(2, 6, 5, 5)
    wanted = Block(*(conv for _, conv in convs)).double()(x.double()).float()
    module = traced(Block(*(own for own, _ in convs)))
    assert fuse(module, (x,))
    assert [n.name for n in module.graph.nodes] == [
        *("x", "a", "b", "c", "mean", "add_1", "output"),
    ]  # the last sum broadcasts: it stays
    assert [getattr(module, name).activation for name in "abc"] == ["relu", "relu", "none"]
    assert_equal(wanted, module(x), 1e-5)
    assert not fuse(module, (x,))


class Broadcasts(nn.Module):
    """Sums of equal sizes only as long as there is one image, or one pixel."""

    def __init__(self, *convs: nn.Module) -> None:
        super().__init__()
        self.a, self.b = convs
        self.register_buffer("position", torch.randn(1, 6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.position.expand(-1, -1, x.size(2), x.size(3))
        return self.b(y) + y.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("size", [(1, 6, 1, 1), (1, 6, 5, 5)])
def test_a_sum_that_may_broadcast_stays(size: tuple[int, ...]) -> None:
    """The kernel refused images that were larger than the first ones, or more."""
    pairs = [layer(nn.Conv2d(6, 6, 3, padding=1), 2, seed=i) for i in range(2)]
    whole = Broadcasts(*(conv for _, conv in pairs))
    module = traced(Broadcasts(*(own for own, _ in pairs)))
    module.position = whole.position.clone()
    fuse(module, (torch.randn(size),))
    x = torch.randn(2, 6, 5, 5)
    with torch.no_grad():
        assert_equal(whole.double()(x.double()).float(), module(x), 1e-5)


class AddsTruth(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + (x > 0)


def test_a_sum_with_another_type_stays() -> None:
    """The kernel was given truth values for a residual, and refused them."""
    own, conv = layer(nn.Conv2d(6, 6, 3, padding=1), 2, seed=0)
    x = torch.randn(2, 6, 5, 5)
    module = traced(AddsTruth(own))
    assert not fuse(module, (x,))
    assert_equal(AddsTruth(conv)(x), module(x), 1e-5)


class ReadsNothing(nn.Module):
    """What the convolution reads is of a value, but all of it is zero."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(torch.narrow(x, 1, 0, 1), (0, 0, 0, 0, 5, 1)))


def test_a_convolution_that_would_read_nothing_stays() -> None:
    """There were no weights to pack."""
    conv = nn.Conv2d(7, 6, 3, padding=1).requires_grad_(False)
    conv.weight[:, 5:] = 0
    own = group_conv_like(conv, [(np.arange(6), np.arange(5))], conv.weight, conv.bias)
    x = torch.randn(2, 6, 5, 5)
    module = traced(ReadsNothing(own))
    assert not fuse(module, (x,))
    assert_equal(ReadsNothing(conv)(x), module(x), 1e-5)


class Pyramid(nn.Module):
    """A convolution is called with two sizes, and other operators follow it."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.head = nn.ModuleList([conv])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        small = x[..., ::2, ::2]
        return torch.relu(self.head[0](x)), self.head[0](small) + small, self.head[0](small)


def test_calls_of_one_convolution_are_fused_each_by_itself() -> None:
    own, plain = layer(nn.Conv2d(6, 6, 3, padding=1), 2, seed=0)
    x = torch.randn(2, 6, 8, 8)
    wanted = [y.float() for y in Pyramid(plain).double()(x.double())]
    model = traced(Pyramid(own))
    assert fuse(model, (x,))
    convs = [model.get_submodule(str(n.target)) for n in model.graph.find_nodes(op="call_module")]
    assert [(conv.activation, conv.adds) for conv in convs] == [
        *(("relu", False), ("none", True), ("none", False)),
    ]
    assert convs[2] is own  # nothing is stored twice for nothing
    assert_equal(wanted, list(model(x)), 1e-5)
    assert join_runs(model)
    assert_equal(wanted, list(model(x)), 1e-5)


class Moving(nn.Module):
    """Channels are moved before and after a convolution, and before its residual."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.skip = conv, nn.Identity()
        self.register_buffer("places", torch.tensor([5, 0, 1, 2, 5, 3, 4]))
        self.register_buffer("others", torch.tensor([6, 0, 5, 5, 2, 1, 3]))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(torch.narrow(x, 1, 2, 6))
        nothing = torch.zeros_like(torch.narrow(y, 1, 0, 1))
        z = torch.index_select(torch.cat([y, nothing], 1), 1, self.places)
        return torch.relu(z + torch.index_select(self.skip(x), 1, self.others))


def test_moved_channels_are_fused() -> None:
    own, conv = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    x = torch.randn(2, 8, 5, 5)
    wanted = Moving(conv).double()(x.double()).float()
    module = traced(Moving(own))
    assert fuse(module, (x,))
    assert [n.op for n in module.graph.nodes] == ["placeholder", "call_module", "output"]
    assert_equal(wanted, module(x), 1e-5)


class Padding(nn.Module):
    """Zero channels are put beside those of a convolution, and beside its residual."""

    def __init__(self, conv: nn.Module, pads: tuple[int, ...], *mode: Any) -> None:
        super().__init__()
        self.conv, self.pads, self.mode = conv, pads, mode

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.conv(x), self.pads, *self.mode)
        return torch.relu(y + F.pad(torch.narrow(x, 1, 1, 7), (0, 0, 0, 0, 0, 1)))


@pytest.mark.parametrize("mode", [(), ("constant",), ("constant", 0.0), ("constant", None)])
def test_channels_that_are_padded_are_fused(mode: tuple[Any, ...]) -> None:
    own, conv = layer(nn.Conv2d(8, 5, 3, padding=1), 2, seed=0)
    pads, x = (0, 0, 0, 0, 2, 1), torch.randn(2, 8, 5, 5)
    wanted = Padding(conv, pads, *mode).double()(x.double()).float()
    module = traced(Padding(own, pads, *mode))
    assert fuse(module, (x,))
    assert [n.op for n in module.graph.nodes] == ["placeholder", "call_module", "output"]
    assert_equal(wanted, module(x), 1e-5)


def test_a_block_that_adds_to_some_channels_of_the_stream_is_one_run() -> None:
    """Compaction pads what the block writes; once that was computed between two runs."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.a(x))
            return torch.relu(self.c(torch.relu(self.b(y) + y)))

    x = torch.randn(2, 6, 5, 5)
    prepared = dspfx.prepare(Residual(), x)
    with torch.no_grad():
        prepared.b.weight[:2] = 0
        prepared.b.bias[:2] = 0
    masks = {name: torch.ones_like(m) for name, m in dspfx.get_masks(prepared).items()}
    masks["b"][:2] = False  # and its bias is zero
    dspfx.set_masks(prepared, masks)
    compact = dspfx.convert(prepared)
    assert F.pad in [n.target for n in compact.graph.nodes]
    own = {site: site.emit_native() for site in sites(compact, (x,))}
    joined = relowered(compact, own)
    fuse(joined, (x,))
    join_runs(joined)
    assert [n.op for n in joined.graph.nodes if n.target is not operator.getitem] == [
        *("placeholder", "call_module", "output")
    ]
    assert_equal(compact(x), joined(x), 1e-5)


@pytest.mark.parametrize(
    ("channels", "pads", "mode"),
    [(5, (0, 0, 0, 0, 2, 1), ("constant", 1.0)), (9, (0, 0, 0, 0, 0, -1), ()), (8, (0, 0), ())],
)
def test_other_pads_are_not_fused(
    channels: int, pads: tuple[int, ...], mode: tuple[Any, ...]
) -> None:
    own, _ = layer(nn.Conv2d(8, channels, 3, padding=1), 2, seed=0)
    model, x = Padding(own, pads, *mode), torch.randn(2, 8, 5, 5)
    module = traced(model)
    fuse(module, (x,))
    assert F.pad in [n.target for n in module.graph.nodes]
    assert_equal(model(x), module(x), 1e-6)


def test_channels_that_go_to_two_places_are_not_fused() -> None:
    own, _ = layer(nn.Conv2d(6, 6, 3, padding=1), 2, seed=0)
    moving = Moving(own)
    x = torch.randn(2, 8, 5, 5)
    wanted = moving(x)
    module = traced(moving)
    fuse(module, (x,))
    assert torch.index_select in [n.target for n in module.graph.nodes]
    assert_equal(wanted, module(x), 1e-6)


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_is_fused(affine: bool) -> None:
    own, conv = layer(nn.Conv2d(6, 5, 3, bias=affine), 2, seed=0)
    norm = nn.BatchNorm2d(5, affine=affine).eval()
    for tensor in (*norm.parameters(), norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    nn.init.uniform_(norm.running_mean, -0.5, 0.5)  # else the activation leaves nothing
    x = torch.randn(2, 6, 5, 5)
    wanted = nn.ReLU6()(copy.deepcopy(norm).double()(conv.double()(x.double()))).float()
    module = traced(nn.Sequential(own, norm, nn.ReLU6()))
    assert fuse(module, (x,))
    assert [n.op for n in module.graph.nodes] == ["placeholder", "call_module", "output"]
    assert_equal(wanted, module(x), 1e-5)
    training = traced(nn.Sequential(own, copy.deepcopy(norm).train()))
    assert not fuse(training, (x,))


def test_a_depthwise_convolution_is_emitted_and_read_back() -> None:
    depthwise = nn.Conv2d(20, 40, 3, stride=2, padding=1, groups=20)
    model = nn.Sequential(depthwise).eval()
    x = torch.randn(2, 20, 9, 9)
    (site,) = sites(model, (x,))
    own = site.emit_native()
    assert own is not None
    twin = relowered(model, {site: own})
    with torch.no_grad():
        assert_equal(model(x), twin(x), 1e-5)
        own.weight.mul_(2)
    with pytest.raises(EquivalenceError):
        relowered(model, {site: own})


def test_what_reads_a_run_within_it_is_moved_behind() -> None:
    """A sum of two results stands between convolutions of one run."""

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (layer(nn.Conv2d(6, 6, 3), 2, seed=i)[0] for i in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            pooled = y.mean((2, 3), keepdim=True)
            return self.c(self.b(y)) + pooled

    model = Between()
    x = torch.randn(3, 6, 9, 9)
    wanted = model(x)
    module = traced(model)
    assert join_runs(module)
    assert not join_runs(module)
    (run,) = [m for m in module.modules() if isinstance(m, GroupConvRun)]
    assert len(run.descriptions) == 3
    assert_equal(wanted, module(x), 1e-6)


def test_a_pool_joins_only_behind_a_convolution() -> None:
    own = [layer(nn.Conv2d(6, 6, 3), 2, seed=i)[0] for i in range(2)]
    pools = [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.MaxPool2d(2, ceil_mode=True)]
    model = nn.Sequential(pools[0], own[0], pools[1], own[1], pools[2])
    x = torch.randn(3, 6, 21, 21)
    module = traced(model)
    assert join_runs(module)
    assert [type(m).__name__ for m in module.children()] == [
        *("MaxPool2d", "MaxPool2d", "GroupConvRun"),
    ]
    assert_equal(model(x), module(x), 1e-6)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, padding=1, count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=3),
        nn.AdaptiveAvgPool2d(2),
        nn.MaxPool2d(2, return_indices=True),
        nn.LPPool2d(2, 2),
    ],
)
def test_pools_that_the_kernel_does_not_know(pool: nn.Module) -> None:
    assert pool_numbers(pool, 0) is None


class Classifier(nn.Module):
    """`pool` and `flat` say how."""

    def __init__(self, pool: Any, flat: Any, channels: int = 6) -> None:
        super().__init__()
        self.conv = layer(nn.Conv2d(6, channels, 3), 2, seed=0)[0]
        self.pool, self.flat = pool, flat
        self.linear = nn.Linear(channels, 10).requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return self.linear(self.flat(self.pool(self.conv(x))))


@pytest.mark.parametrize(
    "pool",
    [
        nn.AdaptiveAvgPool2d(1),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: F.adaptive_avg_pool2d(x, output_size=(1, 1)),
    ],
)
@pytest.mark.parametrize("flat", [lambda x: torch.flatten(x, 1), lambda x: x.flatten(1)])
def test_a_small_classifier_joins_the_run(pool: Any, flat: Any) -> None:
    model, x = Classifier(pool, flat), torch.randn(3, 6, 9, 9)
    module = traced(model)
    assert join_classifiers(module)
    assert join_runs(module)
    assert [type(m).__name__ for m in module.children()] == ["GroupConvRun"]
    assert_equal(model(x), module(x), 1e-6)
    small = x[..., :3, :4]
    assert_equal(model(small), module(small), 1e-6)


@pytest.mark.parametrize(
    ("pool", "flat", "channels"),
    [
        (nn.AdaptiveAvgPool2d((1, 2)), lambda x: x.flatten(1)[:, :6], 6),
        (nn.AdaptiveAvgPool2d(1), lambda x: x.mean((2, 3)), 6),
        (nn.AdaptiveAvgPool2d(1), lambda x: x.flatten(1), 4000),
        (nn.MaxPool2d(7), lambda x: x.flatten(1), 6),
        (lambda x: F.adaptive_avg_pool2d(x, [1, 1]), lambda x: x.flatten(1), 6),
        (nn.Identity(), lambda x: x.mean((2, 3)).flatten(1), 6),
    ],
)
def test_other_classifiers_are_left(pool: Any, flat: Any, channels: int) -> None:
    model, x = Classifier(pool, flat, channels), torch.randn(3, 6, 9, 9)
    module = traced(model)
    assert not join_classifiers(module)
    join_runs(module)
    assert_equal(model(x), module(x), 1e-6)


def test_what_others_read_is_not_fused() -> None:
    own, _ = layer(nn.Conv2d(6, 6, 3, padding=1), 2, seed=0)
    module = traced(Shared(own))
    assert not fuse(module, (torch.randn(2, 6, 5, 5),))
    assert module.conv.activation == "none"


@pytest.mark.usefixtures("own_cache")
def test_compile_races_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "block", lambda *_: 1.0)
    monkeypatch.setattr(
        race, "in_blocks", lambda calls: {c: 1.0 + (c.form != "native") for c in calls}
    )
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    prepared = dspfx.prepare(model, torch.randn(2, 3, 12, 12)).eval()
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[::2, :5] = True
    mask[1::2, 3:] = True
    dspfx.set_masks(prepared, {"2": mask})
    compact = dspfx.convert(prepared)
    x = torch.randn(2, 3, 12, 12)
    fast = dspfx.compile(compact, x, engines=["own"])
    assert fast.report.chosen.form == "native"
    (run,) = [m for m in fast.model.modules() if isinstance(m, GroupConvRun)]
    assert all("activation=relu" in layer for layer in run.descriptions)
    assert_equal(compact(x), fast(x), 1e-5)
    assert_equal(compact(x[:1]), fast(x[:1]), 1e-5)  # another batch than it was compiled for
