"""The order of channels: what readers and writers want, and who gets it."""

import torch
from torch import Tensor, nn

import dspfx
from dspfx.layers.branches import Branches
from helpers import assert_equal, randomise

# makes every group worth a branch, and every gather too dear
MODEL = dspfx.CostModel(call=1, mac=1, copy=0, gather=1e6, vector=1)
X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def two_groups(filters: int, channels: int, shares: tuple[slice, slice], seed: int) -> Tensor:
    """Random filters in two groups, that read two overlapping stretches of shuffled channels."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(channels, generator=generator)
    keep = torch.zeros(2, channels, dtype=torch.bool)
    for group, share in enumerate(shares):
        keep[group, shuffled[share]] = True
    return keep[torch.randint(2, (filters,), generator=generator)]


def test_two_groups_of_a_private_class_read_slices() -> None:
    """[A only | both | B only], whatever channels they are."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 12, 3), nn.Conv2d(12, 5, 1))
    model = randomise(model).double()
    prepared = dspfx.prepare(model, X).eval()
    mask = two_groups(12, 16, (slice(0, 9), slice(5, 16)), seed=1)
    dspfx.set_masks(prepared, {"1": mask})
    compact = dspfx.convert(prepared, cost_model=MODEL)
    branches = compact.get_submodule("1")
    assert isinstance(branches, Branches)
    assert sorted(branches.inputs) == [(0, 9), (5, 11)] or sorted(branches.inputs) == [
        (0, 11),
        (7, 9),
    ]
    assert branches.order is None  # its filters lie group by group, for nobody else minds
    assert not [n for n in compact.graph.nodes if n.op == "call_function"]
    assert dspfx.report(compact).gathers == 0
    assert "gathers left: 0" in str(dspfx.report(compact))
    assert_equal(prepared(X), compact(X))


def test_a_partial_writer_of_a_stream_is_only_padded() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(torch.relu(self.conv(torch.relu(x)) + x))

    prepared = dspfx.prepare(randomise(Residual()).double(), X).eval()
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[[1, 4, 6]] = False
    dspfx.set_masks(prepared, {"conv": mask})
    compact = dspfx.convert(prepared)
    functions = [n.target for n in compact.graph.nodes if n.op == "call_function"]
    assert torch.index_select not in functions
    assert torch.nn.functional.pad in functions
    assert_equal(prepared(X), compact(X))


def test_gathers_that_are_left_are_counted() -> None:
    """Three groups read random channels: they cannot all be slices."""
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 9, 1), nn.Conv2d(9, 2, 1))
    prepared = dspfx.prepare(randomise(model).double(), X).eval()
    keep = torch.rand(3, 12, generator=torch.Generator().manual_seed(3)) < 0.5
    dspfx.set_masks(prepared, {"1": keep[torch.arange(9) % 3]})
    compact = dspfx.convert(prepared, cost_model=dspfx.FEWEST_WEIGHTS)
    assert dspfx.report(compact).gathers == sum(
        isinstance(own, str) for own in compact.get_submodule("1").inputs
    )
    assert dspfx.report(compact).gathers > 0


def test_what_the_user_sees_keeps_its_order() -> None:
    prepared = dspfx.prepare(
        randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1))), X.float()
    ).eval()
    mask = two_groups(6, 4, (slice(0, 2), slice(2, 4)), seed=0)
    dspfx.set_masks(prepared, {"1": mask})
    compact = dspfx.convert(prepared, cost_model=MODEL)
    assert_equal(prepared(X.float()), compact(X.float()), 1e-5)
