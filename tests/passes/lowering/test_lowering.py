"""Forms of a layer: what is merged, what is filled up, and that every form is the same layer."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dspfx.layers.branches import Branches
from dspfx.passes.lowering.emit import emit
from dspfx.passes.lowering.forms import (
    Group,
    Lowering,
    alike,
    dense,
    describe,
    filled_up,
    forms,
    groups_of,
    separate,
    written,
)
from dspfx.passes.lowering.sites import relowered, sites


def group(filters: list[int], inputs: list[int]) -> Group:
    return Group(np.array(filters, np.int64), np.array(inputs, np.int64))


def shape(lowering: Lowering) -> list[tuple[int, int, int]]:
    """(groups, filters, inputs) of every part."""
    return [(*part.filters.shape, part.inputs.shape[1]) for part in lowering]


TWO = [group([0, 2, 4], [0, 1]), group([1, 3, 5], [1, 2])]
THREE = [group([0], [0, 1, 2]), group([1, 2], [0, 1]), group([3], [7])]


def test_filters_that_read_the_same_are_a_group() -> None:
    lists = np.array([[True, False, True], [False, True, False], [True, False, True]])
    found = groups_of(np.array([4, 5, 6, 7]), np.array([0, 1, 2, -1]), lists)
    assert [(g.filters.tolist(), g.inputs.tolist()) for g in found] == [
        ([4, 6], [0, 2]),
        ([5], [1]),
        ([7], []),
    ]


def test_groups_of_equal_size_share_a_part() -> None:
    assert shape(alike(TWO)) == [(2, 3, 2)]
    assert shape(separate(TWO)) == [(1, 3, 2), (1, 3, 2)]
    assert shape(alike(THREE)) == [(1, 1, 3), (1, 2, 2), (1, 1, 1)]


def test_groups_are_filled_up_to_the_largest() -> None:
    (part,) = filled_up(THREE)
    assert part.filters.tolist() == [[0, -1], [1, 2], [3, -1]]
    assert part.inputs.tolist() == [[0, 1, 2], [0, 1, -1], [7, -1, -1]]
    assert part.weights == 18


def test_the_cheapest_pair_is_merged_first() -> None:
    found = forms(THREE, [0, 0, 0])
    assert shape(found[0]) == [(1, 1, 3), (1, 2, 2), (1, 1, 1)]
    assert [(1, 3, 3), (1, 1, 1)] in [shape(form) for form in found]
    assert shape(found[-1]) == shape(dense(THREE)) == [(1, 4, 4)]
    assert len({str(form) for form in found}) == len(found)


def test_linear_layers_have_no_grouped_form() -> None:
    assert all(len(part.filters) == 1 for form in forms(TWO, [0, 0], False) for part in form)


def test_many_groups_are_merged_by_structural_group_only() -> None:
    many = [group([i], [i, i + 1]) for i in range(40)]
    found = forms(many, [i // 20 for i in range(40)])
    assert shape(found[0]) == [(40, 1, 2)]
    assert [(1, 20, 21), (1, 20, 21)] in [shape(form) for form in found]
    assert shape(found[-1]) == [(1, 40, 41)]


@pytest.mark.parametrize(
    ("lowering", "words"),
    [
        (dense(TWO), "dense"),
        (alike(TWO), "1 layer: 2 of 2->3"),
        (separate(TWO), "2 layers: 1 of 2->3, 1 of 2->3"),
    ],
)
def test_descriptions(lowering: Lowering, words: str) -> None:
    assert describe(lowering) == words


@st.composite
def masked_layers(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """A layer whose filters read random channels by groups, and an input for it."""
    filters, channels = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    torch.manual_seed(draw(st.integers(0, 999)))
    kinds = [
        (nn.Linear(channels, filters), (2, 3, channels)),
        (nn.Conv2d(channels, filters, 3, stride=2, padding=1), (2, channels, 5, 6)),
        (nn.Conv1d(channels, filters, 2, dilation=2, bias=False), (2, channels, 9)),
        (
            nn.ConvTranspose2d(channels, filters, 3, stride=2, output_padding=1),
            (2, channels, 3, 4),
        ),
    ]
    layer, size = kinds[draw(st.integers(0, len(kinds) - 1))]
    mask = (torch.rand(3, channels) < 0.5)[torch.randint(3, (filters,))]
    if isinstance(layer, nn.ConvTranspose2d):
        mask = mask.T
    taps = [1] * (layer.weight.dim() - 2)
    layer.weight.data *= mask.reshape(*mask.shape, *taps)
    return layer.double().eval(), torch.randn(size, dtype=torch.float64)


@settings(max_examples=200, deadline=None)
@given(masked_layers())
def test_every_form_is_the_same_layer(drawn: tuple[nn.Module, torch.Tensor]) -> None:
    layer, x = drawn
    model = nn.Sequential(layer)
    with torch.no_grad():
        expected = model(x)
        for site in sites(model, (x,)):
            grouping = not isinstance(layer, nn.Linear)
            for form in forms(site.groups, [0] * len(site.groups), grouping):
                assert sorted(n for n in written(form) if n >= 0) == list(
                    range(expected.shape[1 if grouping else -1])
                )
                twin = relowered(model, {site: site.emit(form)})
                torch.testing.assert_close(twin(x), expected, rtol=1e-12, atol=1e-12)
                again = sites(twin, (x,))  # the groups can be read back from any form
                assert [len(s.groups) for s in again] == [len(site.groups)]


def test_a_form_is_read_back_from_branches() -> None:
    layer = nn.Conv2d(3, 6, 1)
    layer.weight.data[0::2, 2] = 0
    layer.weight.data[1::2, 0] = 0
    x = torch.randn(1, 3, 2, 2)
    (site,) = sites(nn.Sequential(layer), (x,))
    module = emit(layer, site.weight, site.bias, separate(site.groups), np.arange(6), np.arange(3))
    assert isinstance(module, Branches)
    assert (module.inputs, module.order) == ([(0, 2), (1, 2)], "order_of_outputs")
    assert [module.read_by(i).tolist() for i in range(2)] == [[0, 1], [1, 2]]
    assert module.written().tolist() == [0, 3, 1, 4, 2, 5]


def test_groups_that_read_neighbouring_channels_are_one_plain_convolution() -> None:
    """It reads its input as it is, and was not read back: the weight has another shape."""
    layer = nn.Conv2d(4, 6, 1)
    layer.weight.data[:3, 2:] = 0
    layer.weight.data[3:, :2] = 0
    x, model = torch.randn(1, 4, 2, 2), nn.Sequential(layer)
    (site,) = sites(model, (x,))
    twin = relowered(model, {site: site.emit(alike(site.groups))})
    (new,) = twin.children()
    assert isinstance(new, nn.Conv2d)
    assert new.groups == 2
    torch.testing.assert_close(twin(x), model(x))
    (again,) = sites(twin, (x,))
    assert [g.inputs.tolist() for g in again.groups] == [[0, 1], [2, 3]]
