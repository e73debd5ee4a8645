"""Which filter is in which group, by the logits of a gate: for certain, or by a random draw."""

import torch
from torch import Tensor, nn

from dspfx.layers.gates import FilterGate


@torch.no_grad()
def soft_assignment(
    gate: FilterGate, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """`[G, O]`, columns of sum 1: a sample of the Gumbel-softmax of the logits.

    Jang, Gu, Poole, "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017, arXiv
    1611.01144.
    """
    logits = gate.logits
    uniform = torch.rand(
        logits.shape, generator=generator, dtype=logits.dtype, device=logits.device
    )
    tiny = torch.finfo(logits.dtype).tiny
    gumbel = -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()
    soft = (logits / temperature + gumbel).softmax(0)
    return soft.clamp(min=tiny)


@torch.no_grad()
def hard_assignment(gate: FilterGate) -> Tensor:
    """`[G, O]`, 1 where a filter is in a group, else 0."""
    logits = gate.logits
    return nn.functional.one_hot(gate.assignment, len(logits)).T.to(logits.dtype)
