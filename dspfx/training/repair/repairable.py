"""Which layers of a pruned model `compensate` fits, in which order, and why others stay.

1. Fitted is a convolution or linear layer that has a mask, or reads what depends on one in the same
   prepared module: other modules are given the same, pruned or not.
2. A layer follows all others that it depends on; layers that do not depend on each other are of
   one stage, and can be fitted at once.
3. Left alone, with a reason: layers that share a parameter, whose weight is computed, whose hooks
   or class change what they compute, that are called again on what they give, or inside of a module
   that is called as a whole.
4. A layer without a bias has its intercept in the running mean of the batch norm that reads it, if
   nothing else reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from operator import attrgetter
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dspfx.layers.computed_weight import is_weighted
from dspfx.layers.gated import LAYERS, GatedLayer
from dspfx.layers.gates import ChannelGate
from dspfx.layers.parametrised import kind_of, why_computed
from dspfx.model.parts import Part
from dspfx.passes.sandbox.state import is_altered


@dataclass(frozen=True)
class Repairable:
    """A layer that can be fitted.

    Attributes:
        name, layer: the layer.
        shift: what the intercept goes into, a bias or a running mean, both `[O]`; None if there
            is nothing.
        sign: 1 for a bias, -1 for a running mean, which is subtracted.
    """

    name: str
    layer: nn.Module
    shift: Tensor | None
    sign: int


@dataclass(frozen=True)
class Repairables:
    """The layers to fit, stage by stage, and the reasons for the others that pruning affects."""

    stages: tuple[tuple[Repairable, ...], ...]
    left_alone: dict[str, str]


def repairables(model: nn.Module, parts: Sequence[Part]) -> Repairables:
    """The layers of `model` that its masks affect; changes nothing.

    Args:
        model: unwrapped.
        parts: its prepared modules, in the order in which they are called.
    """
    found = _Walk(model)
    for part in parts:
        found.walk(part)
    return found.result()


class _Walk:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names: dict[nn.Module, str] = {m: name for name, m in model.named_modules()}
        self.above: dict[str, set[str]] = {}  # the layers that a layer depends on
        self.repairable: dict[str, Repairable] = {}
        self.left_alone: dict[str, str] = {}
        self.owners: dict[int, set[nn.Module]] = {}
        for module in model.modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                self.owners.setdefault(id(tensor), set()).add(module)

    def walk(self, part: Part) -> None:
        graph, root = part.module.graphs[False], part.module
        earlier = set(self.above)
        read = _read_by(graph, root)
        upstream: dict[fx.Node, set[str]] = {}
        changed: dict[fx.Node, bool] = {}
        for node in graph.nodes:
            inputs = node.all_input_nodes
            upstream[node] = set().union(*(upstream[n] for n in inputs)) if inputs else set(earlier)
            changed[node] = any(changed[n] for n in inputs)
            if node.op != "call_module":
                continue
            module = root.get_submodule(str(node.target))
            gate = module.gate if isinstance(module, GatedLayer) else module
            if isinstance(module, GatedLayer | ChannelGate):
                changed[node] |= not gate.open
            if changed[node]:
                self._note(module, node, read)
            if self._name(module) in self.repairable:
                self.above.setdefault(self._name(module), set()).update(upstream[node])
                upstream[node] = upstream[node] | {self._name(module)}

    def _name(self, module: nn.Module) -> str:
        return self.names[module]

    def _note(self, module: nn.Module, node: fx.Node, read: "_Read") -> None:
        for inner in module.modules():
            name = self._name(inner)
            if not isinstance(inner, tuple(LAYERS)) or name in self.repairable:
                continue
            why_not = self._why_not(inner, read)
            if inner is not module:
                why_not = f"it is inside of {self._name(module)}, which is called as a whole"
            if why_not:
                self.left_alone[name] = why_not
            else:
                self.repairable[name] = Repairable(name, inner, *self._shift(inner, node, read))

    def _why_not(self, layer: nn.Module, read: "_Read") -> str:
        if kind_of(layer) not in LAYERS:
            return f"{type(layer).__name__} may compute something else than its base does"
        own = list(layer.parameters(recurse=False))
        others = {m for p in own for m in self.owners.get(id(p), ())} - {layer}
        if others:
            names = ", ".join(sorted(self._name(m) for m in others))
            return f"it shares a parameter with {names}"
        if any(id(p) in read.tensors for p in own):
            return "the graph reads its weight elsewhere, too"
        if any(not p.is_floating_point() for p in own):
            return "its numbers are complex"
        if is_weighted(layer):
            return "the model's own code computes its weight"
        if why_computed(layer):
            return why_computed(layer).partition(";")[0]
        if is_altered(layer):
            return "its hooks, or a 'forward' of its own, change what it computes"
        return ""

    def _shift(self, layer: Any, node: fx.Node, read: "_Read") -> tuple[Tensor | None, int]:
        """What the intercept of a layer goes into, and its sign."""
        if layer.bias is not None:
            return layer.bias, 1
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_module" or isinstance(layer, nn.Linear):
            return None, 1  # channels that come last may be no channels of the norm
        norm = read.root.get_submodule(str(users[0].target))
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or is_altered(norm):
            return None, 1
        mean = norm.running_mean
        shared = len(self.owners[id(mean)]) > 1 or id(mean) in read.tensors
        once = read.calls[layer] == read.calls[norm] == 1
        return (mean, -1) if once and not shared else (None, 1)

    def result(self) -> Repairables:
        """The stages; layers that depend on themselves are left out."""
        above = {n: set(others) for n, others in self.above.items() if n not in self.left_alone}
        while True:
            sorter = TopologicalSorter({n: others & above.keys() for n, others in above.items()})
            try:
                sorter.prepare()
                break
            except CycleError as error:
                for name in error.args[1]:
                    above.pop(name, None)
                    self.left_alone[name] = "it is called again on what depends on its own output"
        stages = []
        while sorter.is_active():
            ready = sorter.get_ready()
            stages.append(tuple(self.repairable[n] for n in sorted(ready)))
            sorter.done(*ready)
        return Repairables(tuple(stages), self.left_alone)


@dataclass(frozen=True)
class _Read:
    """The tensors that a graph reads by themselves, and how often it calls each module."""

    tensors: frozenset[int]
    calls: dict[nn.Module, int]
    root: nn.Module


def _read_by(graph: fx.Graph, root: nn.Module) -> _Read:
    tensors = {id(attrgetter(str(n.target))(root)) for n in graph.find_nodes(op="get_attr")}
    calls: dict[nn.Module, int] = {}
    for node in graph.find_nodes(op="call_module"):
        module = root.get_submodule(str(node.target))
        calls[module] = calls.get(module, 0) + 1
    return _Read(frozenset(tensors), calls, root)
