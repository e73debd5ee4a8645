"""Verification by execution: masked and compact model agree on random inputs in float64.

The masked model is copied to float64 and compacted there, by the same plan, so that only a real
difference shows; layers that cast to a narrower type inside cast to float64 then. A model that
cannot run so is compared in its own type.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import Node

from dspfx.errors import EquivalenceError
from dspfx.passes.analysis.channel_ops import ChannelAnalysis
from dspfx.passes.analysis.liveness import Liveness
from dspfx.passes.sandbox.calls import Call, fresh, of_one_sample, samples_of
from dspfx.passes.sandbox.sizes import Shapes, resized, shapes_of, sizes_to_prove
from dspfx.passes.sandbox.state import buffers_kept
from dspfx.passes.transforms.compact import compact
from dspfx.passes.transforms.plan import CompactionPlan, Order
from dspfx.passes.transforms.widest import (
    InFloat64,
    Masked,
    drawing_alike,
    outputs_of,
    random_like,
    widest,
)
from dspfx.utils.arrays import BoolArray
from dspfx.utils.pytree import leaves, map_leaves

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}
_CHEAP = 2**15  # numbers in the inputs: a pass of so few saves nothing with fewer samples


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
    far as `masked` takes them, the `sizes_to_prove`. Of large inputs one sample is compared, as of
    these sizes but one, which has as many samples as `inputs`.

    Args:
        masked: in evaluation mode; only read.
        analysis, live, plan: of its graph.
        inputs: shapes and types of the inputs.
        others: further shapes of the tensors among them.

    Raises:
        EquivalenceError: if the outputs differ by more than the type's tolerance.
    """
    sizes = sizes_to_prove(shapes_of(inputs), others, torch.Generator().manual_seed(1))
    of = masked, analysis, live, plan
    if (few := _fewer_samples(inputs, sizes)) is not None:
        with suppress(Exception):  # then all samples tell what it is
            return _Verifier(*of, few[1], quick=True).run(few[0])
    return _Verifier(*of, sizes).run(inputs)


def _fewer_samples(
    inputs: tuple[Any, ...], sizes: Sequence[Shapes]
) -> tuple[tuple[Any, ...], list[Shapes]] | None:
    """One sample of large `inputs`, and of all `sizes` but one, of which there are as many."""
    tensors = [leaf for leaf in leaves(inputs) if isinstance(leaf, Tensor)]
    count, shapes = samples_of(Call(inputs)), shapes_of(inputs)
    if sum(x.numel() for x in tensors) < _CHEAP or len(tensors) != len(shapes):
        return None
    if not all(x.is_floating_point() and x.dim() and len(x) == count > 1 for x in tensors):
        return None
    other = next((own for own in sizes if all(shape[0] >= count for shape in own)), None)
    one = of_one_sample(Call(inputs))
    if other is None or one is None:
        return None
    of_one = [_with_samples(own, 1) for own in sizes if own != other]
    return one.args, [_with_samples(other, count), *of_one]


def _with_samples(shapes: Shapes, count: int) -> Shapes:
    return tuple((count, *shape[1:]) for shape in shapes)


@dataclass(frozen=True)
class _Verifier:
    """Compares `masked` and what `plan` makes of it; see `verify`.

    If it is `quick`, an error may be none: sizes may be refused, or casts not be replaced.
    """

    masked: fx.GraphModule
    analysis: ChannelAnalysis
    live: Liveness
    plan: CompactionPlan
    sizes: Sequence[Shapes]
    quick: bool = False

    def run(self, inputs: tuple[Any, ...]) -> tuple[float, torch.dtype]:
        """The largest difference for `inputs` and the further `sizes`, and the type it is in.

        Raises:
            EquivalenceError: the outputs differ; if it is `quick`, or `masked` refuses a size.
        """
        wide = widest(self.masked, inputs)
        exact = InFloat64() if wide.casts or (not self.quick and wide.may_cast) else nullcontext()
        with torch.no_grad(), buffers_kept(wide.module), exact:
            compacted = compact(wide.module, self.analysis, self.plan)
            module = fx.GraphModule(compacted.root, compacted.graph)
            worst = difference(wide.outputs, outputs_of(module, wide.inputs))
            if worst is None:
                first = self._first_difference(wide, module, compacted.nodes)
                raise EquivalenceError(_message(first, wide.module, wide.inputs, wide.outputs))
            generator = torch.Generator().manual_seed(1)
            for shapes in self.sizes:
                given = random_like(resized(wide.inputs, shapes), generator)
                found = _at_another_size(wide.module, module, given)
                if found is None and self.quick:
                    raise EquivalenceError(f"nothing is known of inputs of the shapes {shapes}")
                worst = max(worst, found or 0.0)
        return worst, wide.dtype

    def _first_difference(
        self, wide: Masked, module: fx.GraphModule, nodes: Mapping[Node, Node]
    ) -> str:
        names = {
            old.name: (new.name, self.plan.order.get(old), self.live.kept.get(old))
            for old, new in nodes.items()
        }
        return _first_difference(wide.module, module, wide.inputs, names)


def _at_another_size(masked: fx.GraphModule, compact: fx.GraphModule, inputs: Any) -> float | None:
    """The difference for `inputs`; None where the masked model refuses them."""
    try:
        expected = outputs_of(masked, inputs)
    except Exception:
        return None
    where = f"inputs of the shapes {shapes_of(inputs)}"
    try:
        found = difference(expected, outputs_of(compact, inputs))
    except Exception as error:
        raise EquivalenceError(f"{_message(where)} The compact model raises {error!r}") from error
    if found is None:
        raise EquivalenceError(_message(where, masked, inputs, expected))
    return found


def _message(
    where: str, masked: fx.GraphModule | None = None, inputs: Any = None, outputs: Any = None
) -> str:
    """What is wrong; of outputs that differ, also whether `masked` magnifies rounding errors."""
    differ = f"masked and compact model differ, first at {where}. "
    if (
        masked is not None
        and difference(outputs, outputs_of(masked, last_bits_changed(inputs))) is None
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


def _first_difference(
    masked: fx.GraphModule,
    compact: fx.GraphModule,
    inputs: tuple[Any, ...],
    names: Mapping[str, tuple[str, Order, BoolArray | None]],
) -> str:
    """The first node, in the order of execution, whose kept channels differ."""
    recorder = _Recorder(compact)
    with drawing_alike(inputs):
        recorder.run(*fresh(inputs))
    checker = _Checker(masked, recorder.results, names)
    with drawing_alike(inputs):
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
