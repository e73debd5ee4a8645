"""The ways to prune a network that are compared."""

import copy
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dspfx
from benchmarks.latency.zoo import Network, prepared

MULTIPLES = 8  # of channels, as processors like them
GROUPS = 2
BISECTIONS = 8
DENSE, RIVAL, CHANNELS, BY_GROUPS = "dense", "channel-pruned", "channels", "groups"


def macs_of(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates for `x`, counted by torch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops()) // 2


def variants(network: Network, keep: float) -> Mapping[str, Callable[[], nn.Module]]:
    """What makes every variant, at `keep` of the MACs."""
    return {
        DENSE: network.dense,
        RIVAL: lambda: _by_torch_pruning(network, keep),
        CHANNELS: lambda: _by_channels(network, keep),
        BY_GROUPS: lambda: _by_groups(network, keep),
    }


def _by_channels(network: Network, keep: float) -> nn.Module:
    module = prepared(network, groups=1, round_to=MULTIPLES)
    dspfx.prune_channels(module, dspfx.Budget(macs=keep))
    return dspfx.convert(module)


def _by_groups(network: Network, keep: float) -> nn.Module:
    if network.masked is not None:
        return dspfx.convert(network.masked())
    module = prepared(network, groups=GROUPS)
    dspfx.cluster_groups(module)
    dspfx.prune(module, dspfx.Budget(macs=keep, count="masks"))
    return dspfx.convert(module)


def _by_torch_pruning(network: Network, keep: float) -> nn.Module:
    """Whole channels by Torch-Pruning until at most `keep` of the MACs are left."""
    library = importlib.import_module("torch_pruning")
    dense, x = network.dense(), torch.randn(1, 3, network.size, network.size)
    most = keep * macs_of(dense, x)
    low, high = 0.0, 1.0
    best: nn.Module | None = None
    for _ in range(BISECTIONS):
        ratio = (low + high) / 2
        model = copy.deepcopy(dense)
        library.pruner.MagnitudePruner(
            model,
            x,
            importance=library.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            ignored_layers=[*_heads(model), *_split(model)],
            num_heads={m.qkv: m.num_heads for m in _attention(model)},
            round_to=MULTIPLES,
        ).step()
        for module in _attention(model):  # which Torch-Pruning leaves to its users
            module.attn_dim = module.qkv.out_features // 3
            module.head_dim = module.attn_dim // module.num_heads
        if macs_of(model, x) > most:
            low = ratio
        else:
            high, best = ratio, model
    if best is None:
        raise ValueError(f"Torch-Pruning leaves more than {keep:.0%} of the MACs")
    return best.eval()


def _heads(model: nn.Module) -> list[nn.Module]:
    """What computes the outputs: the last layer of a classifier, or convolutions at the ends."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    heads = getattr(model, "heads", None)
    if isinstance(heads, nn.ModuleList):
        return [[m for m in head.modules() if isinstance(m, nn.Conv2d)][-1] for head in heads]
    return layers[-1:]


def _attention(model: nn.Module) -> list[Any]:
    """timm's modules of self-attention."""
    return [m for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")]


def _split(model: nn.Module) -> list[nn.Module]:
    """What the detector splits into halves, at which Torch-Pruning fails."""
    return [m for name, m in model.named_modules() if name.endswith(".enter.0")]
