"""What a pass forward and backward leads to: whether a graph trains as the model does.

A graph has what code did once. Code that does something else at the next step, or has another
gradient than its operators, shows only where both run.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dspfx.inputs import Call, fresh, parameter_dtype_and_device
from dspfx.passes.own_gradients import positions
from dspfx.passes.patched import checkpoints_run_once
from dspfx.passes.randomness import drawing_anew
from dspfx.trees import leaves

TOLERANCE = 1e-3  # of the largest number: what threads make of the order of sums is far less
_NUDGE = 1e-3  # tells apart what starts equal, such as a network and its moving average

Results = dict[str, Tensor]  # by what they are


def training_pass(module: nn.Module, call: Call) -> Results | None:
    """What happens to a copy of `module` in training mode; None where it cannot train on `call`.

    The outputs of two calls; the gradients, of a weighted sum of the first; what became of
    parameters and buffers. But for outputs, there are two numbers of each tensor, see `_sketch`.
    Neither `module` changes nor the arguments.
    """
    with _unseen(module):
        try:
            twin = _nudged(module)
            twin.train(True)
            trained = {name: p for name, p in twin.named_parameters() if p.requires_grad}
            before = _sketches(twin)
            outputs = _outputs(twin, call)
            total = torch.zeros((), dtype=torch.float64, requires_grad=True)
            for x in outputs:
                if x.is_floating_point() and x.requires_grad:
                    total = total + _weighted(_numbers(x)).cpu()
            found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
            again = _outputs(twin, call)
        except Exception:
            return None
        gradients = dict(zip(trained, found, strict=True))
        names = [name for name, _ in twin.named_parameters()]
        results = {f"the gradient of {name}": _sketch(gradients.get(name)) for name in names}
        for calls, values in (("", outputs), (" of the second call", again)):
            results |= {f"output {i}{calls}": _numbers(x.detach()) for i, x in enumerate(values)}
        after = _sketches(twin)
        return results | {what: after[what] - was for what, was in before.items() if what in after}


def difference(expected: Results, actual: Results) -> str | None:
    """What is not the same in `actual`, the first of all; None if there is nothing."""
    return next(
        (name for name, value in expected.items() if not _is_same(value, actual.get(name))), None
    )


@contextmanager
def _unseen(module: nn.Module) -> Iterator[None]:
    """As in training, but nothing that is global changes, and nothing is computed twice."""
    _, device = parameter_dtype_and_device(module)
    with (
        drawing_anew(device),
        checkpoints_run_once(),
        warnings.catch_warnings(action="ignore"),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
    ):
        yield


def _nudged(module: nn.Module) -> nn.Module:
    """A copy with slightly other parameters."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for i, (_, p) in enumerate(twin.named_parameters()):
            if p.is_floating_point():
                steps = torch.linspace(-_NUDGE, _NUDGE, p.numel(), dtype=p.dtype, device=p.device)
                p.add_((1 + i % 16 / 16) * steps.view(p.shape))
    return twin


def _outputs(module: nn.Module, call: Call) -> list[Tensor]:
    given = call.map(fresh)
    return [x for x in leaves(module(*given.args, **given.kwargs)) if isinstance(x, Tensor)]


def _sketches(module: nn.Module) -> Results:
    """Of everything that `module` owns."""
    with torch.no_grad():
        results = {f"the parameter {name}": _sketch(x) for name, x in module.named_parameters()}
        return results | {f"the buffer {name}": _sketch(x) for name, x in module.named_buffers()}


def _sketch(x: Tensor | None) -> Tensor:
    """The weighted sum and the norm; zeros of nothing."""
    if x is None:
        return torch.zeros(2)
    x = _numbers(x)
    return torch.stack([_weighted(x), x.norm()]).cpu().double()


def _weighted(x: Tensor) -> Tensor:
    """A sum that knows where the summands are, and their signs."""
    return torch.dot(x.flatten(), positions(x).flatten())


def _numbers(x: Tensor) -> Tensor:
    """`x` as a dense tensor of float32 or float64."""
    x = x.to_dense() if x.layout != torch.strided else x
    x = torch.view_as_real(x) if x.is_complex() else x
    return x if x.dtype == torch.float64 else x.float()


def _is_same(expected: Tensor, actual: Tensor | None) -> bool:
    if actual is None or expected.shape != actual.shape:
        return False
    expected, actual = expected.nan_to_num(), actual.nan_to_num()
    error = (expected - actual).abs()
    return not error.numel() or bool(error.max() <= TOLERANCE * expected.abs().max())
