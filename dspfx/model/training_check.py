"""What a pass forward and backward leads to: whether a graph trains as the model does.

A graph has what code did once. Code that does something else at the next step, or has another
gradient than its operators, shows only where both run.

A gradient that is zero in exact arithmetic, as that of a bias before a batch norm, is nothing but
rounding errors in either. How large these are is measured: the model's own gradient is computed
again with parameters that differ in their last bit.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.model.module import PreparedModule
from dspfx.passes.sandbox.calls import Call, fresh, parameter_dtype_and_device
from dspfx.passes.sandbox.randomness import fixed_seeds
from dspfx.passes.sandbox.state import written_by
from dspfx.passes.tracing.autograd import ZERO, positions
from dspfx.passes.tracing.patches import checkpoints_run_once
from dspfx.utils.pytree import leaves

TOLERANCE = 1e-3  # of the largest number: what threads make of the order of sums is far less
_TRIALS = 3  # how often they are measured; the largest counts
_PERTURBATION = 1e-3  # tells apart what starts equal, such as a network and its moving average

_ROW = 4096  # numbers of a tensor that are summed at once

_GRADIENT, _PARAMETER = "the gradient of ", "the parameter "

Results = dict[str, Tensor]  # by what they are


def training_pass(module: nn.Module, call: Call) -> Results | None:
    """What happens to a copy of `module` in training mode; None where it cannot train on `call`.

    The outputs of two calls; the gradients, of a weighted sum of the second, since code that counts
    calls may have others then; what became of parameters and buffers. But for outputs, there are
    two numbers of each tensor, see `_sketch`.
    Neither `module` changes nor the arguments.
    """
    with _isolated(module):
        try:
            twin = _perturbed_copy(module)
            twin.train(True)
            owned = _owned(twin)
            kept = _unwritten(twin)
            before = {what: x.detach().clone() for what, x in owned.items() if what not in kept}
            outputs = [x.detach() for x in _outputs(twin, call)]
            again = _outputs(twin, call)
            gradients = _gradients(twin, again)
        except Exception:
            return None
        names = [name for name, _ in twin.named_parameters()]
        results = {_GRADIENT + name: _sketch(gradients.get(name)) for name in names}
        for calls, values in (("", outputs), (" of the second call", again)):
            results |= {f"output {i}{calls}": _numbers(x.detach()) for i, x in enumerate(values)}
        after = _owned(twin)
        results |= {what: torch.zeros(2, dtype=torch.float64) for what in kept}
        return results | {
            what: _change(was, after[what]) for what, was in before.items() if what in after
        }


def is_blind(results: Results) -> bool:
    """Whether `results` say nothing of a parameter, whose gradient is zero, or of an output."""
    return any(
        bool(x[1] == 0) if name.startswith(_GRADIENT) else not bool(x.isfinite().all())
        for name, x in results.items()
    )


def rounding_errors(module: nn.Module, call: Call) -> dict[str, float]:
    """The norms of the errors that rounding makes in the gradients of `training_pass`, by name.

    Measured, so about as large; of a `module` that trains on `call`. Nothing of either changes.
    """
    norms: dict[str, float] = {}
    exact: dict[str, Tensor | None] = {}
    for trial in range(1 + _TRIALS):
        with _isolated(module):
            twin = _perturbed_copy(module)
            if trial:
                _round_otherwise(twin, trial)
            twin.train(True)
            found = _gradients(twin, _outputs(twin, call))
        exact = exact or found
        for name, gradient in found.items():
            before = exact[name]
            if gradient is not None and before is not None:
                error = float((_numbers(gradient) - _numbers(before)).norm())
                norms[_GRADIENT + name] = max(error, norms.get(_GRADIENT + name, 0.0))
    return norms


def difference(
    expected: Results, actual: Results, errors: Mapping[str, float] | None = None
) -> str | None:
    """What is not the same in `actual`, the first of all; None if there is nothing.

    Args:
        expected, actual: of `training_pass`.
        errors: of `rounding_errors`; gradients that both are nothing but these are the same.
    """

    def is_zero(name: str) -> bool:
        most = ZERO * (errors or {}).get(name, 0.0)
        both = [expected[name], actual.get(name)]
        return most > 0 and all(x is not None and float(x[1]) <= most for x in both)

    return next(
        (
            name
            for name, value in expected.items()
            if not _is_same(value, actual.get(name)) and not is_zero(name)
        ),
        None,
    )


@contextmanager
def _isolated(module: nn.Module) -> Iterator[None]:
    """Gradients as in training, with fixed seeds and no effect outside; checkpoints run once."""
    _, device = parameter_dtype_and_device(module)
    with (
        fixed_seeds(device),
        checkpoints_run_once(),
        warnings.catch_warnings(action="ignore"),
        torch.inference_mode(mode=False),
        torch.enable_grad(),
    ):
        yield


@torch.no_grad()
def _perturbed_copy(module: nn.Module) -> nn.Module:
    """A copy whose parameters are slightly different."""
    copies: dict[int, Any] = {
        id(p): nn.Parameter(_perturbed(p.detach(), number), p.requires_grad)
        for number, p in enumerate(module.parameters())
        if type(p) is nn.Parameter and p.is_floating_point() and p.layout == torch.strided
    }
    made = {id(p) for p in copies.values()}
    twin = copy.deepcopy(module, copies)
    for number, p in enumerate(twin.parameters()):
        if id(p) not in made and p.is_floating_point():  # it was copied in its own way
            p.copy_(_perturbed(p, number))
    return twin


def _perturbed(parameter: Tensor, number: int) -> Tensor:
    """A copy that is slightly different, every number otherwise."""
    most = _PERTURBATION * (1 + number % 16 / 16)
    steps: list[Tensor] = []
    for dim in sorted(range(parameter.dim()), key=lambda dim: parameter.shape[dim]):
        if (size := parameter.shape[dim]) > 1:
            ramp = torch.linspace(-most, most, size, dtype=parameter.dtype, device=parameter.device)
            steps.append(ramp.view([size if d == dim else 1 for d in range(parameter.dim())]))
    new = parameter + sum(steps[:-1])  # of the smaller dimensions
    return new.add_(steps[-1]) if steps else new


def _round_otherwise(module: nn.Module, seed: int) -> None:
    """Change the parameters of `module` by about their last bit, as other rounding would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.is_floating_point():
                signs = torch.randint(-1, 2, p.shape, generator=generator).to(p)
                p.mul_(1 + torch.finfo(p.dtype).eps * signs)


def _gradients(module: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor | None]:
    """The gradients of a weighted sum of `outputs`, by the names of the parameters."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for x in outputs:
        if x.is_floating_point() and x.requires_grad:
            total = total + _weighted(_numbers(x)).cpu()
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    return dict(zip(trained, found, strict=True))


def _outputs(module: nn.Module, call: Call) -> list[Tensor]:
    given = call.map(fresh)
    return [x for x in leaves(module(*given.args, **given.kwargs)) if isinstance(x, Tensor)]


def _owned(module: nn.Module) -> dict[str, Tensor]:
    """Everything that `module` owns."""
    owned = {f"{_PARAMETER}{name}": x.detach() for name, x in module.named_parameters()}
    return owned | {f"the buffer {name}": x.detach() for name, x in module.named_buffers()}


def _unwritten(module: nn.Module) -> set[str]:
    """The parameters that a graph reads by torch's code alone; that of others may write any."""
    if not isinstance(module, PreparedModule):
        return set()
    written = {id(x) for x in written_by(module)}
    named = module.named_parameters()
    return {f"{_PARAMETER}{name}" for name, x in named if id(x) not in written}


def _change(before: Tensor, after: Tensor) -> Tensor:
    """The difference of the sketches."""
    if before.layout == after.layout == torch.strided and torch.equal(before, after):
        return torch.zeros(2, dtype=torch.float64)
    return _sketch(after) - _sketch(before)


def _sketch(x: Tensor | None) -> Tensor:
    """The weighted sum and the norm; not a number of nothing."""
    if x is None:
        return torch.full((2,), torch.nan, dtype=torch.float64)
    x = _numbers(x)
    return torch.stack([_weighted(x), x.norm()]).cpu().double()


def _weighted(x: Tensor) -> Tensor:
    """A sum that knows where the summands are, and their signs."""
    x = x.flatten()
    whole = len(x) - len(x) % _ROW
    rows = x[:whole].view(-1, _ROW) @ positions(x[:_ROW]) if whole else x[:0]
    rest = torch.cat([rows, x[whole:]])
    return torch.dot(rest, positions(rest))


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
