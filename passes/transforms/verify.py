"""Verification by execution: masked and compact model agree on random inputs in float64.

The masked model is copied to float64 and compacted there, by the same plan, so that only a real
difference shows; layers that cast to a narrower type inside cast to float64 then. A model that
cannot run so is compared in its own type.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import Node
from torch.utils._python_dispatch import TorchDispatchMode

from dspfx.errors import EquivalenceError
from dspfx.passes.analysis.channel_ops import ChannelAnalysis
from dspfx.passes.analysis.liveness import Liveness
from dspfx.passes.sandbox.calls import fresh
from dspfx.passes.sandbox.randomness import fixed_seeds
from dspfx.passes.sandbox.sizes import Shapes, resized, shapes_of, sizes_to_prove
from dspfx.passes.sandbox.state import buffers_kept, state_kept
from dspfx.passes.transforms.compact import compact
from dspfx.passes.transforms.plan import CompactionPlan, Order
from dspfx.utils.arrays import BoolArray
from dspfx.utils.pytree import leaves, map_leaves

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}


def verify(
    masked: fx.GraphModule,
    analysis: ChannelAnalysis,
    live: Liveness,
    plan: CompactionPlan,
    inputs: tuple[Any, ...],
    others: Sequence[Shapes] = (),
) -> tuple[float, torch.dtype]:
    """The largest relative difference that compacting `masked` makes, on random inputs.

    The type in which it was found is given with it. The proof covers the size of `inputs` and, as
    far as `masked` takes them, the `sizes_to_prove`.

    Args:
        masked: in evaluation mode; only read.
        analysis, live, plan: of its graph.
        inputs: shapes and types of the inputs.
        others: further shapes of the tensors among them.

    Raises:
        EquivalenceError: if the outputs differ by more than the type's tolerance.
    """
    widest = _widest(masked, inputs)
    exact = nullcontext() if widest.module is masked else _InFloat64()
    with torch.no_grad(), buffers_kept(widest.module), exact:
        compacted = compact(widest.module, analysis, plan)
        module = fx.GraphModule(compacted.root, compacted.graph)
        worst = difference(widest.outputs, _outputs(module, widest.inputs))
        if worst is None:
            names = {
                old.name: (new.name, plan.order.get(old), live.kept.get(old))
                for old, new in compacted.nodes.items()
            }
            first = _first_difference(widest.module, module, widest.inputs, names)
            raise EquivalenceError(_told(first, widest.module, widest.inputs, widest.outputs))
        generator = torch.Generator().manual_seed(1)
        for shapes in sizes_to_prove(shapes_of(inputs), others, generator):
            given = _random(resized(widest.inputs, shapes), generator)
            worst = max(worst, _at_another_size(widest.module, module, given))
    return worst, widest.dtype


def _at_another_size(masked: fx.GraphModule, compact: fx.GraphModule, inputs: Any) -> float:
    """The difference for `inputs`; none where the masked model refuses them."""
    try:
        expected = _outputs(masked, inputs)
    except Exception:
        return 0.0
    where = f"inputs of the shapes {shapes_of(inputs)}"
    try:
        found = difference(expected, _outputs(compact, inputs))
    except Exception as error:
        raise EquivalenceError(f"{_told(where)} The compact model raises {error!r}") from error
    if found is None:
        raise EquivalenceError(_told(where, masked, inputs, expected))
    return found


def _outputs(module: fx.GraphModule, inputs: Any) -> Any:
    """The results of `module`; random numbers are equal in every call, and state is restored."""
    with _drawing_alike(inputs), state_kept(module, written=list(module.buffers())):
        return module.forward(*fresh(inputs))  # a call would print where it fails


def _drawing_alike(inputs: Any) -> AbstractContextManager[None]:
    devices = (leaf.device for leaf in leaves(inputs) if isinstance(leaf, Tensor))
    return fixed_seeds(next(devices, torch.device("cpu")))


def _told(
    where: str, masked: fx.GraphModule | None = None, inputs: Any = None, outputs: Any = None
) -> str:
    """What is wrong; of outputs that differ, also whether `masked` magnifies rounding errors."""
    differ = f"masked and compact model differ, first at {where}. "
    if (
        masked is not None
        and difference(outputs, _outputs(masked, last_bits_changed(inputs))) is None
    ):
        return (
            f"{differ}The masked model alone differs as much if only the last bits of its inputs "
            "change: it magnifies rounding errors, as a square root close to zero does, which "
            "torch.cdist takes of equal rows, or a comparison of equal numbers. So nothing can be "
            "proved this way. Change that place, such as by compute_mode="
            "'donot_use_mm_for_euclid_dist'; or convert with verify=False, and compare the models "
            "by what they are used for."
        )
    return (
        f"{differ}If that layer has no forward hook, "
        "which a compact layer does not call, this is a bug of dspfx; please report the model. "
        "Until then, PrepareConfig(ignore=...) can leave the layer alone."
    )


def last_bits_changed(inputs: Any) -> Any:
    """`inputs`, each number of which is changed by about its last bit, up or down."""
    generator = torch.Generator().manual_seed(2)

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        up = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf) * 2 - 1
        return leaf + up * leaf.abs() * torch.finfo(leaf.dtype).eps

    return map_leaves(change, inputs)


def difference(expected: Any, actual: Any) -> float | None:
    """The largest difference relative to the largest value; None if beyond the tolerance."""
    pairs = list(zip(leaves(expected), leaves(actual), strict=True))
    worst = 0.0
    for a, b in pairs:
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return None
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return None
            continue
        if not a.numel():
            continue
        alike = (a == b) | (a.isnan() & b.isnan())  # infinities have no difference
        scale = max(float(a.abs().nan_to_num(0, 0).max()), torch.finfo(a.dtype).tiny)
        relative = float((a - b).masked_fill(alike, 0).abs().max()) / scale
        if not relative <= TOLERANCE.get(a.dtype, 1e-4):
            return None
        worst = max(worst, relative)
    return worst


@dataclass(frozen=True)
class _Masked:
    """The masked model in the widest type that it runs in, with inputs and outputs.

    Attributes:
        module: a float64 copy over the same graph, or the model itself.
        inputs: random ones.
        outputs: for these.
        dtype: in which it runs.
    """

    module: fx.GraphModule
    inputs: Any
    outputs: Any
    dtype: torch.dtype


def _widest(masked: fx.GraphModule, inputs: tuple[Any, ...]) -> _Masked:
    generator = torch.Generator().manual_seed(0)
    wide_inputs = _random(map_leaves(_as_double, inputs), generator)
    wide = fx.GraphModule(copy.deepcopy(masked).double(), masked.graph)
    try:
        with torch.no_grad(), _InFloat64():
            return _Masked(wide, wide_inputs, _outputs(wide, wide_inputs), torch.float64)
    except (RuntimeError, TypeError):
        types = iter([x.dtype for x in leaves(inputs) if isinstance(x, Tensor)])
        drawn = map_leaves(lambda x: x.to(next(types)) if isinstance(x, Tensor) else x, wide_inputs)
        own = next((p.dtype for p in masked.parameters() if p.is_floating_point()), torch.float32)
        with torch.no_grad():
            return _Masked(masked, drawn, _outputs(masked, drawn), own)


def _as_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _random(inputs: Any, generator: torch.Generator) -> Any:
    """`inputs` with normally distributed numbers in floating-point tensors, same types."""

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)

    return map_leaves(draw, inputs)


class _InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Replace narrower floating types by float64 where code asks for them, as some norms do."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") in TOLERANCE:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def _first_difference(
    masked: fx.GraphModule,
    compact: fx.GraphModule,
    inputs: tuple[Any, ...],
    names: Mapping[str, tuple[str, Order, BoolArray | None]],
) -> str:
    """The first node, in the order of execution, whose kept channels differ."""
    recorder = _Recorder(compact)
    with _drawing_alike(inputs):
        recorder.run(*fresh(inputs))
    checker = _Checker(masked, recorder.results, names)
    with _drawing_alike(inputs):
        checker.run(*fresh(inputs))
    return checker.first or "the output"


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.results: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        self.results[n.name] = result.clone() if isinstance(result, Tensor) else result
        return result


class _Checker(fx.Interpreter):
    def __init__(
        self,
        module: fx.GraphModule,
        results: Mapping[str, Any],
        names: Mapping[str, tuple[str, Order, BoolArray | None]],
    ) -> None:
        super().__init__(module)
        self.results = results
        self.names = names
        self.first: str | None = None

    def run_node(self, n: Node) -> Any:
        expected = super().run_node(n)
        name, order, kept = self.names.get(n.name, (None, None, None))
        if self.first is None and name is not None and isinstance(expected, Tensor):
            actual = self.results[name]
            if order is not None and kept is not None:
                expected_here, actual = _on_kept(expected, actual, order, kept)
            else:
                expected_here = expected
            if difference(expected_here, actual) is None:
                self.first = f"{n.op} '{n.name}' ({n.target})"
        return expected


def _on_kept(
    expected: Tensor, actual: Tensor, order: Order, kept: BoolArray
) -> tuple[Tensor, Tensor]:
    """The kept channels of both, along the dimension that `kept` counts."""
    assert order is not None
    dim = next(
        (
            d
            for d in range(1, expected.dim())
            if expected.shape[d] == len(kept) and actual.shape[d] == len(order)
        ),
        0,
    )
    position = np.flatnonzero(kept[order])
    index = torch.from_numpy(position)
    return expected.index_select(dim, torch.from_numpy(order[position])), actual.index_select(
        dim, index
    )
