"""The compaction pass: golden graphs before and after, and what it leaves alone."""

import torch
from torch import Tensor, nn

import dspfx
from dspfx.layers.branches import Branches
from helpers import assert_equal, randomise


class Block(nn.Module):
    """conv-bn-relu-conv-bn beside the identity, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.a, self.norm_a = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.norm_b = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))) + x
        return self.head(x.mean((2, 3)))


X = torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def prepared_block() -> dspfx.PreparedModule:
    config = dspfx.PrepareConfig(groups=2)
    return dspfx.prepare(randomise(Block()).double().eval(), X, config=config)


def text(graph: torch.fx.Graph) -> list[str]:
    """One line for each call: target and operands."""
    skipped = ("placeholder", "output")
    return [
        f"{getattr(n.target, '__name__', n.target)}({', '.join(map(str, n.all_input_nodes))})"
        for n in graph.nodes
        if n.op not in skipped
    ]


def test_golden_graph_before() -> None:
    assert text(prepared_block().graph) == [
        "stem(x)",
        "a(stem)",
        "norm_a(a)",
        "channel_gates.norm_a(norm_a)",
        "relu(channel_gates_norm_a)",
        "b(relu)",
        "norm_b(b)",
        "channel_gates.norm_b(norm_b)",
        "add(channel_gates_norm_b, stem)",
        "mean(add)",
        "head(mean)",
    ]


def test_golden_graph_unpruned() -> None:
    """Norms are folded, gates are gone, nothing else changes."""
    assert text(dspfx.convert(prepared_block()).graph) == [
        "stem(x)",
        "a(stem)",
        "relu(a)",
        "b(relu)",
        "add(b, stem)",
        "mean(add)",
        "head(mean)",
    ]


def test_golden_graph_of_two_groups() -> None:
    """Branches over slices where lists are contiguous; a partial writer is filled with zeros."""
    prepared = prepared_block()
    a = torch.zeros(6, 4, dtype=torch.bool)
    a[:2, :3] = True
    a[2:5, 2:] = True
    b = torch.zeros(4, 6, dtype=torch.bool)
    b[0] = True
    dspfx.set_masks(prepared, {"a": a, "b": b})
    compact = dspfx.convert(prepared, cost_model=dspfx.FEWEST_WEIGHTS)
    assert text(compact.graph) == [
        "stem(x)",
        "a(stem)",
        "relu(a)",
        "b(relu)",
        "pad(b)",
        "add(pad, stem)",
        "mean(add)",
        "head(mean)",
    ]
    branches = compact.get_submodule("a")
    assert isinstance(branches, Branches)
    assert (branches.inputs, branches.order) == ([(0, 3), (2, 2)], None)
    shapes = {k: v.shape[:2] for k, v in compact.state_dict().items() if k.endswith("weight")}
    expected = {"a.0": (2, 3), "a.1": (3, 2), "b": (1, 5), "stem": (4, 3), "head": (2, 4)}
    assert shapes == {f"{name}.weight": shape for name, shape in expected.items()}
    assert_equal(prepared(X), compact(X))


def test_a_dead_branch_leaves_the_graph() -> None:
    prepared = prepared_block()
    dspfx.set_masks(prepared, {"b": torch.zeros(4, 6, dtype=torch.bool)})
    compact = dspfx.convert(prepared)
    assert text(compact.graph) == ["stem(x)", "mean(stem)", "head(mean)"]
    assert_equal(prepared(X), compact(X))


def test_constants_are_not_folded_through_padding() -> None:
    """A zero channel becomes sigmoid(0) = 1/2, and a padded convolution sees an edge."""

    class Edge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.b = nn.Conv2d(4, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sigmoid(self.a(self.stem(x))))

    prepared = dspfx.prepare(randomise(Edge()).double(), X)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1:3] = False
    dspfx.set_masks(prepared, {"a": mask})
    assert_equal(prepared(X), dspfx.convert(prepared)(X))


def test_everything_dead_still_answers() -> None:
    prepared = prepared_block()
    masks = {k: torch.zeros_like(v) for k, v in dspfx.get_masks(prepared).items()}
    dspfx.set_masks(prepared, masks)
    assert_equal(prepared(X), dspfx.convert(prepared)(X))
