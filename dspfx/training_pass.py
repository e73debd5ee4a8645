"""What a pass forward and backward leads to: whether a graph trains as the model does.

A graph has what code did once. Code that is something else at the next step, or has another
gradient than its operators, shows only where both run.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.inputs import Call, fresh, parameter_dtype_and_device
from dspfx.kept import state_kept
from dspfx.modes import modes_kept
from dspfx.passes.randomness import generators_kept, start_all_anew
from dspfx.trees import leaves

TOLERANCE = 1e-2  # of the largest value: what threads make of the order of sums is far less

Results = dict[str, Tensor]  # by what they are


def training_pass(module: nn.Module, call: Call) -> Results | None:
    """The outputs, gradients and buffers of one pass in training mode; None where it fails.

    Gradients are those of a weighted sum of the outputs; of each there are two numbers, a weighted
    sum again and its norm. Nothing of `module` changes, nor of the arguments.
    """
    _, device = parameter_dtype_and_device(module)
    trained = {f"the gradient of {n}": p for n, p in module.named_parameters() if p.requires_grad}
    buffers = {f"the buffer {name}": name for name, _ in module.named_buffers()}
    results = {what: torch.zeros(2) for what in trained}

    def see(what: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        results[what] = torch.stack([_weighted(gradient), gradient.norm()])

    hooks: list[Any] = [
        parameter.register_post_accumulate_grad_hook(functools.partial(see, what))  # type: ignore[no-untyped-call]
        for what, parameter in trained.items()
    ]
    try:
        with (
            state_kept(module),
            modes_kept(module),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            generators_kept(),
            warnings.catch_warnings(action="ignore"),
            torch.inference_mode(mode=False),
            torch.enable_grad(),
        ):
            start_all_anew()
            given = call.map(fresh)
            module.train()
            outputs = list(leaves(module(*given.args, **given.kwargs)))
            _weighted_sum(outputs).backward()  # type: ignore[no-untyped-call]
            results |= {f"output {i}": x for i, x in enumerate(outputs) if isinstance(x, Tensor)}
            results |= {what: module.get_buffer(name) for what, name in buffers.items()}
            return {what: x.detach().cpu().clone() for what, x in results.items()}
    except Exception:
        return None
    finally:
        for hook in hooks:
            hook.remove()


def difference(expected: Results, actual: Results) -> str | None:
    """What is not the same in `actual`, the first of all; None if there is nothing."""
    return next(
        (name for name, value in expected.items() if not _is_same(value, actual.get(name))), None
    )


def _weighted_sum(outputs: list[Any]) -> Tensor:
    total = torch.zeros((), requires_grad=True)
    for x in outputs:
        if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad:
            total = total + _weighted(x).cpu()
    return total


def _weighted(x: Tensor) -> Tensor:
    """A sum that knows where the summands are, and their signs."""
    weights = torch.linspace(0.5, 1.5, x.numel(), device=x.device)
    return torch.dot(x.float().flatten(), weights)


def _is_same(expected: Tensor, actual: Tensor | None) -> bool:
    if actual is None or expected.shape != actual.shape or expected.dtype != actual.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(expected, actual)
    a, b = expected.double().nan_to_num(), actual.double().nan_to_num()
    return expected.numel() == 0 or bool((a - b).abs().max() <= TOLERANCE * a.abs().max())
