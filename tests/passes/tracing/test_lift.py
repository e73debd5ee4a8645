"""Functional calls on a module's own parameters become calls of plain modules."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import GatedWeightedConv2d, gated_layers
from helpers import assert_equal, random_masks, randomise, unchanged


class NormAct(nn.BatchNorm2d):
    """A batch norm with an activation of its own, as model zoos have them."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(
            *(x, self.running_mean, self.running_var, self.weight, self.bias),
            *(self.training, self.momentum, self.eps),
        )
        return self.act(y)


class SameConv(nn.Conv2d):
    """Pads as much as the size of its input asks for."""

    def forward(self, x: Tensor) -> Tensor:
        extra = (-(x.shape[-1] - self.kernel_size[0])) % self.stride[0]
        x = F.pad(x, (0, extra, 0, extra))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """Computes its weight from its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * 2


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm_1 = nn.Conv2d(3, 6, 1), NormAct(6)
        self.same, self.norm_2 = SameConv(6, 8, 3, stride=2, bias=False), NormAct(8)
        self.standardised, self.norm_3 = Standardised(8, 8, 1), NormAct(8)
        self.head = Doubling(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_1(self.stem(x))
        x = self.norm_2(self.same(x))
        x = self.norm_3(self.standardised(x))
        return self.head(x.mean((2, 3)))


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def zoo() -> nn.Module:
    return randomise(Zoo()).double()


def test_plain_modules_take_over_with_their_state() -> None:
    model = zoo().eval()
    with unchanged(model):
        prepared = dspfx.prepare(model, X)
    assert list(gated_layers(prepared)) == ["same", "standardised"]
    kinds = {name: type(prepared.get_submodule(name)) for name in ("norm_1", "norm_2", "head")}
    assert kinds == {"norm_1": nn.BatchNorm2d, "norm_2": nn.BatchNorm2d, "head": nn.Linear}
    assert type(prepared.get_submodule("norm_1.act")) is nn.ReLU
    assert type(prepared.get_submodule("standardised")) is GatedWeightedConv2d
    assert [k for k in prepared.state_dict() if "gate" not in k] == list(model.state_dict())
    names = " ".join(str(n.target) for n in prepared.graph.nodes)
    assert "batch_norm" not in names


def test_both_modes_compute_the_same_bits_and_count_batches() -> None:
    model = zoo()
    prepared = dspfx.prepare(model, X)
    for mode in (False, True, True):
        assert_equal(model.train(mode)(X), prepared.train(mode)(X), tolerance=0)
    state: dict[str, Any] = prepared.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


class CountsSlowly(nn.BatchNorm2d):
    """In training, what it does depends on a number that it reads."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and int(self.num_batches_tracked) > 1:
            x = x * 2
        return super().forward(x)


def test_a_norm_that_is_a_leaf_in_one_mode_is_one_in_both() -> None:
    """Evaluation was lifted into a norm of torch's, and training then called that norm."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), CountsSlowly(8), nn.Conv2d(8, 4, 1)))
    prepared = dspfx.prepare(model.double(), X)
    for mode in (True, True, True, True, False):
        assert_equal(model.train(mode)(X), prepared.train(mode)(X), tolerance=0)


def test_lifted_layers_are_pruned_and_folded() -> None:
    prepared = dspfx.prepare(zoo().eval(), X)
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.4))
    compact = dspfx.convert(prepared)
    assert_equal(prepared(X), compact(X))
    assert type(compact.get_submodule("standardised")).__name__ in ("Conv2d", "Module")
    assert compact.get_submodule("head").in_features < 8
    assert not isinstance(getattr(compact, "norm_2", None), nn.BatchNorm2d)


def test_masks_act_on_the_computed_weight() -> None:
    """What is masked is what the convolution sees: masked entries still count in the mean."""
    model = zoo().eval()
    prepared = dspfx.prepare(model, X)
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[:, 2:6] = False
    mask[5] = False
    dspfx.set_masks(prepared, {"standardised": mask})
    layer = model.standardised
    weight = layer.weight - layer.weight.mean((1, 2, 3), keepdim=True)
    bias = torch.where(mask.any(1), layer.bias, 0.0)

    norm = model.norm_3

    def by_hand(x: Tensor) -> Tensor:
        y = norm(F.conv2d(x, weight * mask[:, :, None, None], bias))
        return torch.where(mask.any(1)[:, None, None], y, 0.0)

    model.standardised.forward, model.norm_3 = by_hand, nn.Identity()
    assert_equal(model(X), prepared(X), 1e-12)
    assert_equal(prepared(X), dspfx.convert(prepared)(X))


def test_computed_weights_train_and_learn() -> None:
    model = zoo().train()
    prepared = dspfx.prepare(model, X)
    for module in (model, prepared):
        module(X).square().sum().backward()
    for name, parameter in prepared.named_parameters():
        assert_equal(model.get_parameter(name).grad, parameter.grad, 1e-12)
    learner = dspfx.GroupLearner(
        prepared, torch.optim.SGD(prepared.parameters(), lr=0.1), total_steps=1
    )
    learner.step(lambda: prepared(X).square().mean())
    assert gated_layers(prepared)["standardised"].gate.logits.any()


def test_weights_of_several_modules_are_left_alone() -> None:
    class Mixture(nn.Conv2d):
        def __init__(self, c: int) -> None:
            super().__init__(c, c, 1, bias=False)
            self.other = nn.Conv2d(c, c, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight + self.other.weight)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), Mixture(4)).double()
    prepared = dspfx.prepare(model, X)
    assert list(gated_layers(prepared)) == ["1"]
    dspfx.set_masks(prepared, random_masks(prepared))
    assert_equal(prepared(X), dspfx.convert(prepared)(X))
