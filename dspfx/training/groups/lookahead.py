"""Looking ahead: trial steps of a model and its optimizer that leave no trace in either."""

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.layers.gates import ChannelGate, FilterGate
from dspfx.passes.sandbox.randomness import generators_among, generators_kept
from dspfx.utils.wrappers import trained_parameters

HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")  # torch has no public names


class BufferSnapshot:
    """Copies of what a forward pass may change: the buffers of `model`, except those of gates."""

    def __init__(self, model: nn.Module) -> None:
        self.copies = [
            (module._buffers, name, buffer, buffer.clone())
            for module in model.modules()
            if not isinstance(module, FilterGate | ChannelGate)
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the same tensors, with their old values."""
        for owner, name, buffer, saved in self.copies:
            owner[name] = buffer.copy_(saved)


@contextmanager
def looking_ahead(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: Collection[Tensor]
) -> Iterator[dict[Tensor, Tensor]]:
    """Parameters and buffers are afterwards what they were; gives the old values of `weights`.

    Gradients are replaced, except those of parameters that the optimizer does not train.

    Args:
        model: whose buffers are restored.
        optimizer: whose `trial_steps` are to come.
        weights: what these are for.
    """
    own = trained_parameters(optimizer)
    before = {p: p.detach().clone() for p in (weights if one_at_a_time(optimizer) else own)}
    buffers = BufferSnapshot(model)
    # copies: gradients may be views of memory that the next backward writes into
    foreign = {
        p: None if p.grad is None else p.grad.clone() for p in model.parameters() if p not in own
    }
    for parameter in own | foreign.keys():
        parameter.grad = None  # or the backward would add to it
    try:
        yield before
    finally:
        with torch.no_grad():
            for parameter, saved in before.items():
                parameter.copy_(saved)
        buffers.restore()
        for parameter, gradient in foreign.items():
            parameter.grad = gradient


def trial_steps(optimizer: torch.optim.Optimizer, weights: Collection[Tensor]) -> None:
    """Let `optimizer` step, without a change of its state.

    Only `weights` are needed afterwards. Torch's own optimizers treat every parameter by itself,
    so that no more than the state of one has to be copied at a time.
    """
    if not one_at_a_time(optimizer):
        _trial_step(optimizer, None)
        return
    for weight in dict.fromkeys(weights):  # layers may share one
        _trial_step(optimizer, weight)


def one_at_a_time(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of each parameter by itself is a step of all."""
    return type(optimizer).__module__.startswith("torch.optim.")


def _trial_step(optimizer: torch.optim.Optimizer, only: Tensor | None) -> None:
    """One step of `optimizer`, of all parameters or of `only` one, on copies of its state.

    Hooks that were registered with the optimizer do not see it. Torch's own draw no numbers.
    """
    own, groups, state = dict(vars(optimizer)), optimizer.param_groups, optimizer.state
    chosen = [
        ({k: v for k, v in group.items() if k != "params"}, group["params"]) for group in groups
    ]
    wanted = [(rest, [p for p in ps if only is None or p is only]) for rest, ps in chosen]
    known = state if only is None else state.keys() & {only}
    optimizer.param_groups = [{**_copied(rest), "params": ps} for rest, ps in wanted if ps]
    optimizer.state = defaultdict(dict, {p: _copied(state[p]) for p in known})
    vars(optimizer).update({name: OrderedDict() for name in HOOKS if name in own})
    draws = nullcontext() if only is not None else generators_kept(generators_among(own.values()))
    try:
        with draws:
            optimizer.step()
    finally:
        vars(optimizer).clear()
        vars(optimizer).update(own)


def _copied(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in values.items()}
