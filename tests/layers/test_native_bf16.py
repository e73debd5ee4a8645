"""The own kernel in bfloat16: each layer is rounded once, whatever shares words with what."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import added_to, any_lists, damage, laid_out, layer, runs
from torch import Tensor, nn

from dspfx.layers import native
from dspfx.layers.group_conv import Added, FilterGroup, GroupConv2d
from dspfx.layers.group_conv_run import GroupConvRun
from dspfx.layers.native import packing, reference
from helpers import assert_equal

HALF_A_STEP = 2**-8  # of bfloat16, relative to what is rounded


@pytest.fixture(autouse=True, scope="module")
def _built() -> Iterator[None]:
    assert native.built()
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rounded(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).double()


def unrounded_result(own: GroupConv2d, inputs: list[Tensor]) -> Tensor:
    """What a layer computes of rounded inputs with rounded weights, in float64."""
    groups = [FilterGroup(g.filters, g.inputs, rounded(g.weight)) for g in own.groups()]
    twin = own.remade(groups=groups)
    numbers = packing.as_text([own.numbers(0, len(inputs) * 2 - 3)])
    bias: Any = own.bias
    buffers: Any = (twin.weight, None if bias is None else bias.double(), twin.indices)
    given = [rounded(x) for x in inputs]
    (result,) = reference.run(given, *buffers, numbers, [len(inputs)])
    return result


def alone(own: GroupConv2d, inputs: int) -> GroupConvRun:
    return GroupConvRun([own], [(0, inputs * 2 - 3)], inputs, [inputs])


@settings(max_examples=300, deadline=None)
@given(any_lists(), st.data())
def test_a_layer_is_equal_but_for_one_rounding(call: dict[str, Any], data: st.DataObject) -> None:
    torch.set_num_threads(call["threads"])
    generator = torch.Generator().manual_seed(0)
    groups = []
    for g in call["groups"]:  # the sum of the weights of a channel that is read twice is exact
        size = (len(g.filters), len(g.inputs), *call["settings"][0])
        weight = torch.randint(-16, 17, size, generator=generator) / 8
        groups.append(FilterGroup(g.filters, g.inputs, weight))
    bias = torch.randn(call["filters"], generator=generator)
    activation = data.draw(st.sampled_from(packing.ACTIVATIONS))
    residual = data.draw(st.integers(0, 9))
    added = added_to(call["filters"], residual, 0) if residual else None
    sizes = call["size"][1], call["filters"]
    own = GroupConv2d(call["settings"], groups, *sizes, bias, activation, added)
    inputs = [torch.randn(call["size"], generator=generator)]
    if added is not None:
        size = reference.out_size(call["size"][2:], *call["settings"])
        inputs.append(torch.randn(call["size"][0], residual, *size, generator=generator))
    wanted = unrounded_result(own, inputs)
    run = alone(own, len(inputs)).in_bf16()
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    for _ in range(2):  # the second call finds the memory of the first
        (result,) = run(*(laid_out(x, call["layout"]) for x in inputs))
        assert result.dtype == torch.float32
        difference = (result - wanted).abs()
        assert (difference <= HALF_A_STEP * wanted.abs() + 1e-5 * largest).all()
        assert torch.equal(result, result.to(torch.bfloat16).float())
    buffers: Any = (run.weight, run.bias, run.indices, run.layers, run.outputs)
    (portable,) = reference.run(inputs, *buffers)
    difference = (portable - wanted).abs()
    assert (difference <= HALF_A_STEP * wanted.abs() + 1e-5 * largest).all()


@settings(max_examples=300, deadline=None)
@given(runs())
def test_runs_are_equal_to_their_layers(case: dict[str, Any]) -> None:
    torch.set_num_threads(case["threads"])
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(case["batch"], *size, generator=generator) for size in case["inputs"]]
    layers, reads = [own for own, *_ in case["layers"]], [tuple(r) for _, *r in case["layers"]]
    run = GroupConvRun(layers, reads, len(inputs), case["outputs"])
    run = run.transformed(case["winograd"].intersection(run.transformable())).in_bf16()
    assert run.by_winograd() == []
    assert run.transformable() == []
    values = [rounded(x) for x in inputs]
    for own, source, residual in case["layers"]:
        read = [values[source], *([] if residual < 0 else [values[residual]])]
        pooled = not isinstance(own, GroupConv2d)
        values.append(rounded(own(*read) if pooled else unrounded_result(own, read)))
    wanted = [values[number].float() for number in case["outputs"]]
    for _ in range(2):  # the second call finds the memory of the first
        assert_equal(wanted, run(*inputs), 1e-2)
    buffers: Any = (run.weight, run.bias, run.indices)
    assert_equal(wanted, reference.run(inputs, *buffers, run.layers, run.outputs), 1e-2)


@pytest.mark.parametrize(
    ("channels", "filters", "kernel", "size", "batch"),
    [(40, 70, 1, 56, 1), (300, 33, 1, 7, 2), (64, 64, 3, 56, 1), (9, 9, 7, 90, 1)],
)
def test_sizes_that_are_cut_into_strips_are_equal(
    channels: int, filters: int, kernel: int, size: int, batch: int
) -> None:
    own, _ = layer(nn.Conv2d(channels, filters, kernel, padding=kernel // 2), 2, seed=0)
    x = torch.randn(batch, channels, size, size)
    wanted = unrounded_result(own, [x])
    (result,) = alone(own, 1).in_bf16()(x)
    bound = HALF_A_STEP * wanted.abs() + 1e-5 * wanted.abs().max()
    assert ((result - wanted).abs() <= bound).all()


@pytest.mark.parametrize("kind", [nn.MaxPool2d, nn.AvgPool2d])
def test_pools_of_many_pixels(kind: Any) -> None:
    own, _ = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    x, pool = torch.randn(2, 6, 20, 20), kind(15, 2, 3)
    run = GroupConvRun([own, pool], [(0, -1), (1, -1)], 1, [2]).in_bf16()
    assert_equal([pool(rounded(unrounded_result(own, [x]))).float()], run(x), HALF_A_STEP * 1.1)


def test_a_depthwise_layer_reads_each_word_once() -> None:
    """Filters whose channels share a word are one group."""
    weight = torch.randn(9, 1, 3, 3)
    groups = [FilterGroup(np.array([c]), np.array([c]), weight[c : c + 1]) for c in range(9)]
    own = GroupConv2d(([3, 3], [1, 1], [1, 1], [1, 1]), groups, 9, 9, None)
    run, x = alone(own, 1).in_bf16(), torch.randn(2, 9, 11, 13)
    assert run.weight.numel() == 9 * 9 * 2
    wanted = unrounded_result(own, [x])
    assert ((run(x)[0] - wanted).abs() <= HALF_A_STEP * wanted.abs() + 1e-5).all()


def test_channels_that_are_read_together_share_words() -> None:
    """The order of channels between layers is free; there, no zeros are multiplied."""
    first, _ = layer(nn.Conv2d(4, 16, 3), 1, seed=0, keep=1)
    settings = ([1, 1], [1, 1], [0, 0], [1, 1])
    lists = [np.arange(1, 16, 2), np.arange(0, 16, 4)]
    groups = [
        FilterGroup(np.arange(8) + 8 * i, read, torch.randn(8, len(read), 1, 1))
        for i, read in enumerate(lists)
    ]
    second = GroupConv2d(settings, groups, 16, 16, None)
    run = GroupConvRun([first, second], [(0, -1), (1, -1)], 1, [2]).in_bf16()
    assert run.weight.numel() == first.weight.numel() + second.weight.numel()
    assert alone(second, 1).in_bf16().weight.numel() == 2 * second.weight.numel()
    x = torch.randn(1, 4, 8, 8)
    wanted = rounded(unrounded_result(second, [rounded(unrounded_result(first, [x]))]))
    assert_equal(wanted.float(), run(x)[0], 1e-2)


def test_what_an_earlier_call_left_in_a_word_is_not_multiplied() -> None:
    """A channel that fills up the last word is zero, not what was there before, times zero."""
    wide, _ = layer(nn.Conv2d(2, 6, 1), 1, seed=0, keep=1)
    odd, _ = layer(nn.Conv2d(6, 5, 1), 1, seed=1, keep=1)
    last, _ = layer(nn.Conv2d(5, 3, 1), 1, seed=2, keep=1)
    reads = [(0, -1), (1, -1), (2, -1)]
    run = GroupConvRun([wide, odd, last], reads, 1, [3]).in_bf16()
    x = torch.randn(1, 2, 6, 6)
    (before,) = run(x)
    assert not run(torch.full_like(x, torch.inf))[0].isfinite().all()
    assert torch.equal(before, run(x)[0])


def test_the_operators_are_such_that_torch_can_work_with_them() -> None:
    own, _ = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    adding = own.remade(added=Added(5, np.arange(5)))
    x, residual = torch.randn(2, 6, 8, 8), torch.randn(2, 5, 8, 8)
    one, run = alone(own, 1).in_bf16(), GroupConvRun([own, adding], [(0, -1), (0, 1)], 1, [2])
    count = packing.as_numbers(one.layers)[0][3]
    args = (x, one.weight, one.bias, one.indices, None, count, own.count, *own.settings, 1)
    torch.library.opcheck(torch.ops.dspfx.group_conv2d.default, args)
    both = alone(adding, 2).in_bf16()
    args = (x, both.weight, both.bias, both.indices, residual, *args[5:])
    torch.library.opcheck(torch.ops.dspfx.group_conv2d.default, args)
    run = run.in_bf16()
    torch.library.opcheck(
        torch.ops.dspfx.group_conv_run.default,
        ([x], run.weight, run.bias, run.indices, run.layers, run.outputs),
    )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_to_a_plan_raises_or_stays_inside(data: st.DataObject) -> None:
    """Each number of the indices is changed in turn: no memory outside is touched."""
    own, _ = layer(nn.Conv2d(6, 9, 3, padding=1), 2, seed=0)
    pool = nn.MaxPool2d(3, 1, 1)  # whatever is of another size than it was does not fit
    adding = own.remade(added=Added(9, np.arange(9)))
    reads = [(0, -1), (1, -1), (0, 2)]
    run = GroupConvRun([own, pool, adding], reads, 1, [1, 2, 3]).in_bf16()
    damage(data, run)
    with contextlib.suppress(RuntimeError):
        for result in run(torch.randn(2, 6, 8, 8)):
            assert result.shape[0] == 2


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t[:-2], lambda t: t.half()])
def test_a_damaged_weight_raises(change: Any) -> None:
    own, _ = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    run = alone(own, 1).in_bf16()
    run.weight = change(run.weight)
    with pytest.raises(RuntimeError, match="weight"):
        run(torch.randn(2, 6, 8, 8))


def test_winograd_is_for_float32() -> None:
    own, _ = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    run = alone(own, 1).in_bf16()
    run.layers = f"{packing.WINOGRAD}{run.layers[1:]}"
    with pytest.raises(RuntimeError, match="fp32"):
        run(torch.randn(2, 6, 8, 8))


@pytest.mark.parametrize("batch", [1, 4])
def test_layers_of_a_run_are_timed(batch: int) -> None:
    own, _ = layer(nn.Conv2d(6, 6, 3, padding=1), 2, seed=0)
    run = GroupConvRun([own, nn.MaxPool2d(2), own], [(0, -1), (1, -1), (2, -1)], 1, [3, 1])
    seconds = run.in_bf16().seconds(torch.randn(batch, 6, 20, 20))
    assert seconds.shape == (3,)
    assert (seconds > 0).all()


def test_empty_batches_and_inputs_in_bfloat16() -> None:
    own, _ = layer(nn.Conv2d(6, 5, 3, padding=1), 2, seed=0)
    run, x = alone(own, 1).in_bf16(), torch.randn(2, 6, 8, 8)
    assert run(x[:0])[0].shape == (0, 5, 8, 8)
    assert torch.equal(run(x)[0], run(x.to(torch.bfloat16))[0])


EMULATED = """
import torch
from torch import nn
from dspfx.layers import native
from dspfx.layers.group_conv_run import GroupConvRun
from dspfx.layers.native import reference
from kernel_cases import layer
assert native.built() and not native.multiplies_bf16()
own = [layer(nn.Conv2d(c, f, 3, padding=1), 3, seed=c)[0] for c, f in ((5, 9), (9, 7))]
layers = [own[0], nn.MaxPool2d(3, 1, 1), own[1], nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)]
run = GroupConvRun(layers, [(n, -1) for n in range(5)], 1, [1, 2, 3, 4, 5]).in_bf16()
x = torch.randn(3, 5, 13, 21)
wanted = reference.run([x], run.weight, run.bias, run.indices, run.layers, run.outputs)
for a, b in zip(wanted, run(x), strict=True):
    assert float((a - b).abs().max()) <= 1e-2 * float(a.abs().max())
"""


def test_without_instructions_for_bfloat16(tmp_path: Path) -> None:
    """The kernel multiplies in float32 what is rounded all the same."""
    if not native.multiplies_bf16():
        pytest.skip("the kernel is built without the instructions anyway")
    flags = f"{os.environ.get('DSPFX_NATIVE_FLAGS', '')} -mno-avx512bf16 -O0"  # quick to build
    environment = {
        **os.environ,
        "DSPFX_CACHE_DIR": str(tmp_path),
        "DSPFX_NATIVE_FLAGS": flags,
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    subprocess.run([sys.executable, "-c", EMULATED], env=environment, check=True, timeout=600)
