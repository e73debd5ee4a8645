"""What several test files need: comparing, counting, drawing masks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dspfx.layers.gated import gated_layers
from dspfx.utils.pytree import leaves, structure


def assert_equal(expected: Any, actual: Any, tolerance: float = 1e-9) -> None:
    """Equal classes, keys and shapes, and values equal relative to the largest."""
    assert structure(expected) == structure(actual)
    for a, b in zip(leaves(expected), leaves(actual), strict=True):
        if not isinstance(a, Tensor):
            assert a == b
            continue
        a, b = a.detach(), b.detach()
        assert a.shape == b.shape
        if a.numel():
            assert float((a - b).abs().max()) <= tolerance * max(float(a.abs().max()), 1e-300)


def macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates for one sample, counted by torch."""
    math = sdpa_kernel(SDPBackend.MATH)  # of attention on a CPU nothing else is counted
    with math, FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops()) // 2 // len(x)


def random_masks(
    prepared: nn.Module, *, keep: float = 0.5, drop: float = 0.0, seed: int = 0
) -> dict[str, Tensor]:
    """Random groups; each keeps `keep` of its inputs, `drop` of all filters read nothing."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, layer in gated_layers(prepared).items():
        (filters, channels), groups = layer.gate.mask.shape, len(layer.gate.logits)
        kept = torch.zeros(groups, channels, dtype=torch.bool)
        for row in kept:
            row[torch.randperm(channels, generator=generator)[: max(1, int(channels * keep))]] = (
                True
            )
        mask = kept[torch.randint(groups, (filters,), generator=generator)]
        mask[torch.rand(filters, generator=generator) < drop] = False
        masks[name] = mask
    return masks


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, shifts and running statistics that no test could mistake for zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.5, generator=generator)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(module.weight, 0, module.weight[0].numel() ** -0.5, generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.5, generator=generator)
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.RMSNorm):
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            if getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias, 0, 0.5, generator=generator)
    return model


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Weights, buffers, modes, hooks and attributes are afterwards what they were."""

    def picture() -> tuple[Any, ...]:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        modules = {
            name: (type(m), m.training, len(m._forward_hooks), sorted(vars(m)))
            for name, m in model.named_modules()
        }
        return state, modules

    (state, modules) = picture()
    yield
    (state_after, modules_after) = picture()
    assert modules == modules_after
    assert state.keys() == state_after.keys()
    assert all(torch.equal(state[name], state_after[name]) for name in state)
