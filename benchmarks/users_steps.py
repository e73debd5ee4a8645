"""The steps that a model of another library goes through, and the comparisons after each."""

import copy
import math
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import dspfx
from benchmarks.examination import flops, relative_difference
from benchmarks.users.case import Inputs
from benchmarks.users_page import ASKED, EXACT, ONNX_ROUNDED, ROUNDED, Outcome
from dspfx.passes.transforms.verify import last_bits_changed
from dspfx.utils.pytree import leaves, map_leaves

CHANGES = 8  # of last bits, until a model is taken to be sound


class WrongError(Exception):
    """Two models that have to be equal are not."""


def call(model: nn.Module, inputs: Inputs) -> Any:
    """`model` of `inputs`, which are left as they are."""
    own = map_leaves(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)
    torch.manual_seed(0)
    np.random.seed(0)  # some models draw masks of training by it
    random.seed(0)
    return model(**own) if isinstance(own, dict) else model(*own)


def total(model: nn.Module, inputs: Inputs) -> int:
    """The FLOPs of all operators that torch counts."""
    counts = _flops(model, inputs)
    return sum(counts.get("Global", {}).values())


def _flops(model: nn.Module, inputs: Inputs) -> dict[str, dict[Any, int]]:
    return flops(model, (), inputs) if isinstance(inputs, dict) else flops(model, inputs)


def compare_prepared(
    outcome: Outcome, model: nn.Module, prepared: nn.Module, inputs: Inputs
) -> None:
    """Outputs and running statistics of `model` and `prepared`, in both modes."""
    worst = 0.0
    for mode in (False, True):
        original, own = copy.deepcopy(model).train(mode), copy.deepcopy(prepared).train(mode)
        try:
            expected = call(original, inputs)
        except ValueError:  # a batch norm over one value, of each channel, say
            if mode:
                continue
            raise
        with torch.no_grad():
            worst = max(worst, _difference(expected, call(own, inputs), ROUNDED, f"train {mode}"))
        worst = max(worst, _difference_of_state(original, own))
    outcome.prepared = max(worst, outcome.prepared if outcome.prepared > 0 else 0.0)


def _difference_of_state(original: nn.Module, prepared: nn.Module) -> float:
    """Of running statistics, after a call."""
    state = prepared.state_dict()
    expected = {k: v for k, v in original.state_dict().items() if k in state}
    return _difference(expected, {k: state[k] for k in expected}, ROUNDED, "state")


def _difference(expected: Any, actual: Any, tolerance: float, what: str) -> float:
    expected, actual = list(leaves(expected)), list(leaves(actual))
    if len(expected) != len(actual):
        raise WrongError(f"{what}: {len(expected)} outputs became {len(actual)}")
    for a, b in zip(expected, actual, strict=True):
        if isinstance(a, Tensor) and not a.is_floating_point() and not torch.equal(a, b):
            raise WrongError(f"{what}: outputs of {a.dtype} differ")
    worst = relative_difference(expected, actual)
    if worst > tolerance:
        raise WrongError(f"{what}: differs by {worst:.0e}")
    return 0.0 if math.isnan(worst) else worst


def compare_compact(
    outcome: Outcome,
    prepared: nn.Module,
    compact: nn.Module,
    wide: nn.Module | None,
    inputs: Inputs,
) -> None:
    """In float64, converted there, since what is emitted is rounded to its type; and in float32."""
    masked = copy.deepcopy(prepared).eval()
    with torch.no_grad():
        if wide is not None:  # of a copy that has remembered nothing of float32
            exact, own = map_leaves(_double, inputs), copy.deepcopy(masked).double()
            worst = _difference(call(own, exact), call(wide, exact), EXACT, "compact")
            outcome.equal = max(worst, outcome.equal if outcome.equal > 0 else 0.0)
        both = call(masked, inputs), call(compact, inputs)
        _compare_rounded(outcome, masked, inputs, both, ROUNDED, "compact, float32")


def _compare_rounded(
    outcome: Outcome,
    model: nn.Module,
    inputs: Inputs,
    pair: tuple[Any, Any],
    tolerance: float,
    what: str,
) -> None:
    """Compare what `model` computes in float32 with what something else does, a `pair`.

    Where it was equal in float64, that is only wrong if `model` itself is not as different once the
    last bits of its inputs change. One that sorts scores which are nearly equal, for instance, may
    give another order then.
    """
    try:
        _difference(*pair, tolerance, what)
    except WrongError:
        if math.isnan(outcome.equal) or not _rounds_off(model, inputs, pair[0], tolerance):
            raise
        outcome.rounds_off = True


def _rounds_off(model: nn.Module, inputs: Inputs, expected: Any, tolerance: float) -> bool:
    expected = [x for x in leaves(expected) if isinstance(x, Tensor)]
    for _ in range(CHANGES):
        inputs = last_bits_changed(inputs)
        other = [x for x in leaves(call(model, inputs)) if isinstance(x, Tensor)]
        try:
            _difference(expected, other, tolerance, "")
        except WrongError:
            return True
    return False


def runs_in_float64(model: nn.Module, inputs: Inputs) -> bool:
    """Whether `model` does not cast to float32 inside, as where its code asks for its own type."""
    try:
        with torch.no_grad():
            call(copy.deepcopy(model).double(), map_leaves(_double, inputs))
    except RuntimeError:
        return False
    return True


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def shares(
    outcome: Outcome, model: nn.Module, prepared: nn.Module, inputs: Inputs, dense: int
) -> None:
    """Write into `outcome` which shares can be pruned, are counted and stay, and why."""
    report = dspfx.report(prepared)
    names = {layer.name for layer in report.layers if layer.gated or layer.free}
    counts = _flops(model, inputs)
    root = type(model).__name__
    outcome.macs_share = (
        sum(sum(counts.get(f"{root}.{name}", {}).values()) for name in names) / dense
    )
    modules = dict(model.named_modules())
    own = {p for name in names if name in modules for p in modules[name].parameters()}
    outcome.parameters_share = sum(p.numel() for p in own) / outcome.parameters
    batch = next(x for x in leaves(inputs) if isinstance(x, Tensor)).shape[0]
    outcome.known = report.before.macs * batch * 2 / dense
    notes = [n for n in report.notes if n.startswith(("opaque", "prepared in parts"))]
    reasons = [f"{d.node}: {d.reason}" for d in report.declined]
    outcome.frozen = "; ".join(dict.fromkeys([*notes, *reasons]))


def pruned(prepared: nn.Module) -> float:
    """Prune whole channels, to half of the MACs or to the least that is possible; what was asked.

    Groups are left to `dspfx.prune`, where channels alone give less than half.
    """
    least = []
    for prune in (dspfx.prune_channels, dspfx.prune):
        try:
            prune(prepared, dspfx.Budget(macs=ASKED))
            return ASKED
        except dspfx.BudgetError as error:
            found = re.search(r"([\d.]+)% remains", str(error))
            assert found is not None, "the message says what can be reached"
            least.append((float(found[1]) / 100, prune))
    share, prune = min(least, key=lambda pair: pair[0])
    asked = min(1.0, share + 1e-4)
    prune(prepared, dspfx.Budget(macs=asked))
    return asked


def trained(model: nn.Module, prepared: nn.Module, inputs: Inputs) -> str:
    """One step of SGD of a copy; whether it can be taken, or not even of `model`."""
    prepared = copy.deepcopy(prepared).train()
    try:
        call(copy.deepcopy(model).train(), inputs)
    except ValueError:  # it asks for labels, say
        return "nor the model"
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-4)
    outputs = [x for x in leaves(call(prepared, inputs)) if isinstance(x, Tensor)]
    loss = sum(x.square().mean() for x in outputs if x.requires_grad)
    assert isinstance(loss, Tensor), "no output takes gradients"
    loss.backward()
    gradients = [p.grad for p in prepared.parameters() if p.grad is not None]
    if not gradients or not all(g.isfinite().all() for g in gradients):
        raise WrongError("gradients are not finite")
    optimizer.step()
    return "yes"


def exported(outcome: Outcome, compact: nn.Module, model: nn.Module, inputs: Inputs) -> str:
    """Write an ONNX file and run it; whether its batch is free, or `model` has no file either."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        try:
            free = _written(compact, inputs, path)
        except dspfx.ExportError:
            try:
                _written(model, inputs, path)
            except dspfx.ExportError:
                return "nor the model"
            raise
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        given = [x.numpy() for x in leaves(inputs) if isinstance(x, Tensor)]
        names = [i.name for i in session.get_inputs()]
        found = session.run(None, dict(zip(names, given, strict=True)))
    with torch.no_grad():
        expected = [x for x in leaves(call(compact, inputs)) if isinstance(x, Tensor)]
        both = expected, [torch.from_numpy(x) for x in found]
        _compare_rounded(outcome, compact, inputs, both, ONNX_ROUNDED, "onnx")
    return "any batch" if free else "this batch"


def _written(model: nn.Module, inputs: Inputs, path: Path) -> bool:
    """Whether it was with a free batch."""
    try:
        dspfx.export(model, inputs, path)
    except dspfx.ExportError:
        dspfx.export(model, inputs, path, dynamic_batch=False)
        return False
    return True
