"""Inlined graphs compute what the compact modules do; what is rounded where, without rounding."""

import pytest
import torch
import torchvision
from models import MODELS
from small import Small, X, pruned
from torch import nn

import dspfx
from dspfx.quantization.inline import inlined
from dspfx.quantization.places import Places, places
from helpers import assert_equal, randomise, unchanged


@pytest.mark.parametrize("kind", MODELS)
def test_awkward_models(kind: type[nn.Module]) -> None:
    prepared = pruned(kind().double(), MODELS[kind])
    compact = dspfx.convert(prepared, verify=False, cost_model=dspfx.FEWEST_WEIGHTS)
    with unchanged(compact), torch.no_grad():
        root = inlined(compact)
    with torch.no_grad():
        assert_equal(compact(*compact.example_inputs), root(*compact.example_inputs))
    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    called = [root.get_submodule(n.target) for n in root.graph.find_nodes(op="call_module")]
    assert not any(type(module) in layers for module in called)


@pytest.mark.parametrize("size", [32, 47])
def test_norms_after_depthwise_convolutions_are_folded(size: int) -> None:
    model = randomise(torchvision.models.mobilenet_v2(num_classes=5).double().eval())
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    compact = dspfx.convert(dspfx.prepare(model, x), verify=False)
    assert any(isinstance(m, nn.BatchNorm2d) for m in compact.modules())
    root = inlined(compact)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in root.modules())
    with torch.no_grad():
        assert_equal(model(x), root(x))


class Shared(nn.Module):
    """A depthwise convolution that is called twice, with a norm for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x))
        for norm in self.norms:
            x = norm(self.conv(x))
        return x


def test_norms_of_a_layer_called_twice_are_left() -> None:
    model = randomise(Shared().double().eval())
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    compact = dspfx.convert(dspfx.prepare(model, x))
    with torch.no_grad():
        assert_equal(model(x), inlined(compact)(x))


def test_branches_are_clipped_one_by_one() -> None:
    """And a weight is one node, and zeros are concatenated."""
    prepared = dspfx.prepare(randomise(Small(16)).eval(), X)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:5, :3] = mask[5:, 3:] = True
    dspfx.set_masks(prepared, {"a": mask})
    graph = inlined(dspfx.convert(prepared, cost_model=dspfx.FEWEST_WEIGHTS)).graph
    (join,) = graph.find_nodes(op="call_function", target=torch.cat)
    clips = [node for node in graph.nodes if "relu" in node.name]
    assert list(join.all_input_nodes) == clips
    assert all(node.all_input_nodes[0].target is torch.conv2d for node in clips)
    assert not graph.find_nodes(op="call_function", target=nn.functional.pad)
    targets = [node.target for node in graph.find_nodes(op="get_attr")]
    assert len(targets) == len(set(targets))


def of(model: nn.Module, x: torch.Tensor) -> tuple[Places, str]:
    compact = dspfx.convert(dspfx.prepare(model.eval(), x), verify=False)
    root = inlined(compact)
    floats = [n for n in root.graph.nodes if n.op != "output"]
    return places(root, floats), str(root.graph)


def test_a_residual_block() -> None:
    found, text = of(Small(), X)
    assert found.layers == ("stem.0", "a", "b", "head")
    assert not found.kept
    assert found.activations == (
        (("x", "conv2d"),),
        (("stem_2", "conv2d_1"), ("stem_2", "add")),
        (("relu", "conv2d_2"),),
        (("conv2d_2", "add"),),
        (("add", "mean"),),
        (("mean", "linear"),),
    ), text


class Kept(nn.Module):
    """What does not compute with integers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 4, 2, 2)
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        return self.conv(x) @ x


def test_what_stays_says_why() -> None:
    found, _ = of(Kept(), torch.randn(2, 3, 4, 4))
    assert found.layers == ("conv",)
    assert found.kept == {
        "up": "ConvTranspose2d is called whole, and has no form with integers",
        "matmul": "it is no layer with a weight of its own",
    }
