"""What `GroupLearner` refuses: models, optimizers and settings that it cannot learn groups with."""

import math
from collections.abc import Collection, Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from dspfx.errors import LearnError
from dspfx.layers.gated import GatedLayer, gated_layers
from dspfx.layers.parametrised import REMOVE
from dspfx.model.parts import narrow_parts_of
from dspfx.utils.distributed import Processes
from dspfx.utils.wrappers import check_whole, unwrapped


def check_learner_settings(
    strength: float, total_steps: int, temperature: float, logits_lr: float, logits_every: int
) -> None:
    """Refuse settings out of range."""
    if not (math.isfinite(strength) and strength >= 0):
        raise LearnError(f"strength must be finite and not negative, got {strength}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise LearnError(f"temperature must be positive, got {temperature}")
    if not (math.isfinite(logits_lr) and logits_lr >= 0):
        raise LearnError(f"logits_lr must be finite and not negative, got {logits_lr}")
    if total_steps < 1 or logits_every < 1:
        raise LearnError("total_steps and logits_every must be at least 1")


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse optimizers that a look-ahead would leave traces in, or without a learning rate."""
    inner = [name for name, x in vars(optimizer).items() if isinstance(x, torch.optim.Optimizer)]
    if inner:
        raise LearnError(
            f"{type(optimizer).__name__} steps another optimizer, its '{inner[0]}', which would "
            "remember the look-ahead; learn groups with that one, and fine-tune with both"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise LearnError(
            "LBFGS computes the loss by itself, as often as it likes; use an optimizer that steps "
            "by the gradients that are there, such as SGD or AdamW"
        )
    for number, group in enumerate(optimizer.param_groups):
        rate = group.get("lr")
        if not isinstance(rate, Real) and not (isinstance(rate, Tensor) and rate.numel() == 1):
            raise LearnError(
                f"the learning rate of the optimizer's parameter group {number} is {rate!r}; give "
                "it a number, for the weights are shrunk in proportion"
            )


def check_layers(
    prepared: nn.Module,
    optimizer: torch.optim.Optimizer,
    layers: Mapping[str, GatedLayer],
    trained: Collection[str],
    processes: Processes,
) -> None:
    """Refuse a model without layers to learn groups of, or an optimizer that trains none of them.

    Args:
        prepared: the model.
        optimizer: over its parameters.
        layers: its gated layers whose weights are parameters.
        trained: the names of those that the optimizer trains.
        processes: those that train together.
    """
    if narrow_parts_of(prepared):
        raise LearnError(
            "groups are learned in the prepared model, not in a narrow one; "
            "dspfx.widen(narrow, prepared) puts what it has learned there"
        )
    if not layers and gated_layers(unwrapped(prepared)):
        raise LearnError(
            "the weights of all gated layers are computed by parametrisations, and groups are "
            f"learned in weights that are parameters; call {REMOVE} before dspfx.prepare"
        )
    if not layers:
        raise LearnError("the model has no gated layer; call dspfx.prepare(model) first")
    check_whole(prepared, optimizer)
    if not trained:
        raise LearnError(
            "the optimizer trains no gated layer of this model; construct it from "
            "prepared.parameters(), not from the original model's"
        )
    for name, layer in layers.items():
        if torch.finfo(layer.weight.dtype).bits < 32:
            raise LearnError(
                f"{name}.weight is in {layer.weight.dtype}, too coarse to learn groups in; "
                "keep the weights in float32 and let the closure compute under torch.autocast"
            )
    processes.check_weights([layer.weight for layer in layers.values()])
    for name, layer in layers.items():
        if not torch.isfinite(layer.weight).all():
            raise LearnError(f"{name}.weight holds NaN or infinite values; repair it first")


def check_generator(layers: Mapping[str, GatedLayer], generator: torch.Generator | None) -> None:
    """Refuse a generator that is on another device than a layer."""
    for name, layer in layers.items():
        device = layer.gate.logits.device
        if generator is not None and generator.device.type != device.type:
            raise LearnError(
                f"the generator is on {generator.device}, but the layer {name} on "
                f"{device}; use torch.Generator({device.type!r})"
            )
