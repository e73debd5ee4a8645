"""The masked model in float64, or else in the widest type that it runs in.

1. It is copied, its parameters in the new type at once; gated layers mask their weights once.
2. Layers that cast to a narrower type inside cast to float64 then. Where a first call does not,
   and only torch's code runs, casts are not looked for again.
"""

import copy
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from dspfx.layers.computed_weight import is_weighted
from dspfx.layers.gated import GatedLayer, gated_layers
from dspfx.passes.sandbox.calls import fresh
from dspfx.passes.sandbox.dispatch import Dispatch
from dspfx.passes.sandbox.randomness import fixed_seeds
from dspfx.passes.sandbox.state import buffers_written, runs_torch_alone, state_kept
from dspfx.utils.pytree import leaves, map_leaves

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Masked:
    """The masked model in the widest type that it runs in, with inputs and outputs.

    Attributes:
        module: a float64 copy over the same graph, or the model itself.
        inputs: random ones.
        outputs: for these.
        dtype: in which it runs.
        casts: it asks for a narrower type, see `InFloat64`.
        may_cast: it runs other code than torch's, which may do so at another size.
    """

    module: fx.GraphModule
    inputs: Any
    outputs: Any
    dtype: torch.dtype
    casts: bool
    may_cast: bool


def widest(masked: fx.GraphModule, inputs: tuple[Any, ...]) -> Masked:
    """`masked` in float64, else in its own type, and what it computes for random `inputs`."""
    generator = torch.Generator().manual_seed(0)
    wide_inputs = random_like(map_leaves(_as_double, inputs), generator)
    with torch.no_grad():
        wide = _in_float64(masked)
    try:
        with torch.no_grad(), InFloat64() as mode:
            outputs = outputs_of(wide, wide_inputs)
        other_code = any(
            node.op.startswith("call_") and not runs_torch_alone(masked, node.op, node.target)
            for node in masked.graph.nodes
        )
        return Masked(wide, wide_inputs, outputs, torch.float64, mode.used, other_code)
    except (RuntimeError, TypeError):
        types = iter([x.dtype for x in leaves(inputs) if isinstance(x, Tensor)])
        drawn = map_leaves(lambda x: x.to(next(types)) if isinstance(x, Tensor) else x, wide_inputs)
        own = next((p.dtype for p in masked.parameters() if p.is_floating_point()), torch.float32)
        with torch.no_grad():
            return Masked(
                masked, drawn, outputs_of(masked, drawn), own, casts=False, may_cast=False
            )


def _in_float64(masked: fx.GraphModule) -> fx.GraphModule:
    """A copy over the same graph, whose gated layers mask their weights once for all calls."""
    once, values = _masked_once(masked)
    memo: dict[int, Any] = {}  # what is copied in its new type at once
    for tensor in masked.parameters():
        if type(tensor) is nn.Parameter and tensor.is_floating_point():
            value = values.get(id(tensor), tensor).detach()
            wider = value.to(torch.float64, copy=True)
            memo[id(tensor)] = nn.Parameter(wider, tensor.requires_grad)
    root = nn.Module()
    for kind in ("_modules", "_parameters", "_buffers"):
        vars(root)[kind] = copy.deepcopy(vars(masked)[kind], memo)
    wide = fx.GraphModule(root.double(), masked.graph)
    for name in once:
        cast(GatedLayer, wide.get_submodule(name)).gate.open = True
    return wide


def _masked_once(masked: fx.GraphModule) -> tuple[list[str], dict[int, Tensor]]:
    """The layers that nobody else reads a parameter of, and the masked values of these."""
    read = [attrgetter(node.target)(masked) for node in masked.graph.find_nodes(op="get_attr")]
    held = [p for module in masked.modules() for p in module._parameters.values()]
    readers = Counter(map(id, (*read, *held)))
    names, values = list[str](), dict[int, Tensor]()
    for name, layer in gated_layers(masked).items():
        own = [layer._parameters.get("weight"), layer._parameters.get("bias")]
        alone = all(p is None or (type(p) is nn.Parameter and readers[id(p)] == 1) for p in own)
        if own[0] is None or not alone or is_weighted(layer):
            continue  # its weight is computed, or read by others
        names.append(name)
        pairs = zip(own, layer.masked(), strict=True)
        values |= {id(p): value for p, value in pairs if p is not None and value is not None}
    return names, values


def _as_double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def random_like(inputs: Any, generator: torch.Generator) -> Any:
    """`inputs` with normally distributed numbers in floating-point tensors, same types."""

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)

    return map_leaves(draw, inputs)


class InFloat64(Dispatch):
    """Replace narrower floating types by float64 where code asks for them, as some norms do."""

    def __init__(self) -> None:
        super().__init__()
        self.used = False  # anything was replaced

    def _dispatched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("dtype") in FLOATS:
            self.used = self.used or kwargs["dtype"] != torch.float64
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def outputs_of(module: fx.GraphModule, inputs: Any) -> Any:
    """The results of `module`; random numbers are equal in every call, and state is restored."""
    with drawing_alike(inputs), state_kept(module, written=buffers_written(module)):
        return module.forward(*fresh(inputs))  # a call would print where it fails


def drawing_alike(inputs: Any) -> AbstractContextManager[None]:
    """Random numbers are the same whenever this is entered, on the device of `inputs`."""
    devices = (leaf.device for leaf in leaves(inputs) if isinstance(leaf, Tensor))
    return fixed_seeds(next(devices, torch.device("cpu")))
