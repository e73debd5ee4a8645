"""The main net: random networks, random masks, and the masked dense model as the oracle."""

import os
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import dspfx
from dspfx.errors import PrepareError
from dspfx.layers.gated import GatedLayer, gated_layers
from dspfx.layers.weights import spread
from dspfx.passes.lowering.cost_model import CPU
from helpers import assert_equal, macs
from random_networks import (
    BY_VALUE,
    SMOOTH,
    MaskRecipe,
    Mirrored,
    Twice,
    mask_recipes,
    networks,
)
from random_positions import LENGTH, ChannelNorm, sequences

COUNT = int(os.environ.get("DSPFX_EXAMPLES", "120"))
EXAMPLES = settings(
    max_examples=COUNT,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# each prefers another form: what is likely, branches, one grouped convolution, few gathers
COST_MODELS = (
    CPU,
    dspfx.FEWEST_WEIGHTS,
    dspfx.CostModel(call=100, mac=1, copy=0, gather=0, vector=1),
    dspfx.CostModel(call=10, mac=1, copy=1, gather=10, vector=2),
)


def inputs(model: Any, seed: int = 0, samples: int = 3, larger: int = 0) -> Tensor:
    x: Tensor = model.inputs(seed, samples, larger)
    return x


def prepare(model: nn.Module, groups: int) -> Any:
    """The model, prepared, in parts where its code overwrites what it reads later; None if not."""
    try:
        return dspfx.prepare(model, inputs(model), config=dspfx.PrepareConfig(groups=groups))
    except PrepareError as error:
        if "no layer to prune" not in str(error):
            raise
        return None  # every convolution reads one channel


@EXAMPLES
@given(
    model=networks(),
    recipe=mask_recipes(),
    groups=st.integers(1, 4),
    cost_model=st.sampled_from(COST_MODELS),
)
def test_compact_equals_masked(
    model: nn.Module, recipe: MaskRecipe, groups: int, cost_model: dspfx.CostModel
) -> None:
    prepared = prepare(model, groups)
    if prepared is None:
        return
    x = inputs(model, 1)
    with torch.no_grad():
        assert_equal(model(x), prepared(x), tolerance=0)
        assert_traced_at_other_sizes(model, prepared)
        dspfx.set_masks(prepared, recipe.masks(prepared))
        before = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
        compact = dspfx.convert(prepared, cost_model=cost_model)
        assert_equal(prepared(x), compact(x))
    assert_equal_at_other_sizes(model, prepared, compact)
    assert not compact.training
    report = dspfx.report(compact)
    if isinstance(prepared, dspfx.PreparedModule):
        assert macs(compact, x) <= report.emitted.macs
    called_twice = any(isinstance(step, Twice | Mirrored) for step in model.modules())
    if cost_model is dspfx.FEWEST_WEIGHTS and not called_twice:  # one form serves both calls
        assert report.emitted.macs <= report.after.macs
    assert report.after == dspfx.report(prepared).after
    again = dspfx.convert(prepared, verify=False, cost_model=cost_model)
    assert codes(again) == codes(compact) == codes(dspfx.convert(compact)) != []
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, compact.state_dict()[name])
    for name, tensor in prepared.state_dict().items():
        assert torch.equal(tensor, before[name])


def codes(compact: nn.Module) -> list[str]:
    """The code of every graph, all of which are well formed."""
    graphs = [module for module in compact.modules() if isinstance(module, dspfx.CompactModule)]
    for module in graphs:
        module.graph.lint()
    return [module.code for module in graphs]


def assert_traced_at_other_sizes(model: nn.Module, prepared: nn.Module) -> None:
    """The graph computes what the model does, or refuses the size."""
    for larger in (3, 4):
        x = inputs(model, 2, samples=2, larger=larger)
        try:
            found = prepared(x)
        except (RuntimeError, AssertionError):
            continue
        assert_equal(model(x), found, tolerance=0)


def assert_equal_at_other_sizes(model: nn.Module, masked: nn.Module, compact: nn.Module) -> None:
    """As far as the masked model takes images of that size."""
    for larger in (3, 4):
        x = inputs(model, 2, samples=2, larger=larger)
        with torch.no_grad():
            try:
                expected = masked(x)
            except (RuntimeError, AssertionError):
                continue
            assert_equal(expected, compact(x))


@settings(EXAMPLES, max_examples=max(1, COUNT // 2))
@given(model=sequences(), recipe=mask_recipes(), groups=st.integers(1, 4))
def test_compact_equals_masked_whatever_the_length(
    model: Any, recipe: MaskRecipe, groups: int
) -> None:
    config = dspfx.PrepareConfig(groups=groups)
    prepared = dspfx.prepare(model, model.inputs(LENGTH), config=config)
    given = [model.inputs(t, n, seed=1) for t, n in ((LENGTH, 3), (19, 2), (9, 1), (24, 1))]
    taken = []
    with torch.no_grad():
        for x in given:
            try:
                found = prepared(x)
            except (RuntimeError, AssertionError):
                continue
            assert_equal(model(x), found, tolerance=0)
            taken.append(x)
        dspfx.set_masks(prepared, recipe.masks(prepared))
        compact = dspfx.convert(prepared)
        for x in taken:
            assert_equal(prepared(x), compact(x))


@EXAMPLES
@given(model=networks(SMOOTH, BY_VALUE), recipe=mask_recipes())
def test_masked_equals_an_oracle_that_watches_values(model: nn.Module, recipe: MaskRecipe) -> None:
    """Dead means zero, as defined by what flows through the unprepared model.

    The oracle knows nothing of graphs: weights are multiplied by the masks, and a hook zeroes
    every filter whose response is nothing but zeros, and every channel that a norm or a depthwise
    layer with a bias reads as zeros.
    Smooth activations make sure that only dead channels are zero.
    """
    prepared = prepare(model, 3)
    if prepared is None:
        return
    masks = recipe.masks(prepared)
    dspfx.set_masks(prepared, masks)
    layers = dict(model.named_modules())
    with torch.no_grad():
        for name, mask in masks.items():
            mask_weight(layers[name], mask)
            layers[name].register_forward_hook(silence_dead_filters)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) or is_biased_depthwise(module):
                module.register_forward_hook(keep_zeros)
            elif isinstance(module, nn.LayerNorm | ChannelNorm):
                module.register_forward_hook(keep_last_zeros)
        x = inputs(model, 2)
        assert_equal(model(x), prepared(x))


class Masked(nn.Module):
    """The last step of how a weight is computed: zero where it is masked."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def mask_weight(layer: Any, mask: Tensor) -> None:
    if parametrize.is_parametrized(layer):
        parametrize.register_parametrization(layer, "weight", Masked(spread(layer, mask)))
    else:
        layer.weight.mul_(spread(layer, mask))


def silence_dead_filters(layer: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    dim = out.dim() - 1 if isinstance(layer, nn.Linear) else 1
    response = out
    if layer.bias is not None:
        response = out - layer.bias.reshape(-1, *[1] * (out.dim() - 1 - dim))
    return torch.where(is_zero(response, dim), 0.0, out)


def keep_zeros(norm: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return torch.where(is_zero(args[0]), 0.0, out)


def keep_last_zeros(norm: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return torch.where(is_zero(args[0], args[0].dim() - 1), 0.0, out)


def is_biased_depthwise(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d) or module.bias is None:
        return False
    return 1 < module.groups == module.in_channels == module.out_channels


def is_zero(x: Tensor, dim: int = 1) -> Tensor:
    return x.abs().amax([d for d in range(x.dim()) if d != dim], keepdim=True) < 1e-13


@settings(EXAMPLES, max_examples=COUNT // 5)
@given(model=networks(), recipe=mask_recipes(), seed=st.integers(0, 99))
def test_masked_weights_have_no_effect(model: nn.Module, recipe: MaskRecipe, seed: int) -> None:
    prepared = prepare(model, 3)
    if prepared is None:
        return
    dspfx.set_masks(prepared, recipe.masks(prepared))
    x = inputs(model, 3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        expected = prepared(x)
        for layer in gated_layers(prepared).values():
            scramble(layer, generator)
        assert_equal(expected, prepared(x), tolerance=0)


def scramble(layer: GatedLayer, generator: torch.Generator) -> None:
    noise = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
    layer.weight.add_(noise * spread(layer, ~layer.gate.mask))
    if layer.bias is not None:
        layer.bias.add_(~layer.gate.alive)
