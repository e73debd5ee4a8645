"""Observers and graph rewriting, by torchao's PT2E flow; this module alone imports torchao.

torchao annotates edges of a graph with what is known of them, inserts observers there, and replaces
those by pairs of quantising and dequantising operators. It is written for graphs of `torch.export`,
but what is used here asks nothing of an operator: every edge that is to be rounded leads through a
node of its own, which does nothing, is all that is annotated, and is removed at the end.

Activations are unsigned, with one scale for each tensor, chosen by the least error over a
histogram. Weights are signed and symmetric, from -127 to 127, or -63 to 63, with one scale for
each filter.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import Node, map_arg
from torchao.quantization.pt2e import (
    FakeQuantize,
    HistogramObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    disable_fake_quant,
    enable_fake_quant,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import (
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

from dspfx.quantization.places import Edge, Places
from dspfx.quantization.record import LARGEST, Scale

__all__ = ["Observed", "disable_fake_quant", "enable_fake_quant", "observed", "rounded"]
SMALLEST_SCALE = 2.0**-10  # of a filter, relative to that of the largest one of its layer
_KINDS = ("_int8", "_scale", "_zero_point")
_ANNOTATION = "quantization_annotation"


@dataclass(frozen=True)
class Observed:
    """A graph with observers.

    Attributes:
        root: called with a batch, it observes.
        activations: for each of `Places.activations` the name of the node that its first edge leads
            through.
        weights: those of the nodes that the edges of weights lead through, by the names of these.
        marked: those of all such nodes.
    """

    root: fx.GraphModule
    activations: tuple[str, ...]
    weights: dict[str, str]
    marked: tuple[str, ...]

    def observers(self) -> Iterator[tuple[str, Any]]:
        """Those of activations, with the name of a node that computes what each observes."""
        nodes = {node.name: node for node in self.root.graph.nodes}
        for name in self.activations:
            (call,) = nodes[name].all_input_nodes
            yield call.all_input_nodes[0].name, self.root.get_submodule(str(call.target))


def observed(
    root: fx.GraphModule,
    places: Places,
    scales: Iterable[Scale] | None = None,
    *,
    training: bool = False,
    weight_bits: int = 8,
) -> Observed:
    """`root` with observers at `places`; it is changed, and is of no more use.

    Args:
        root: an inlined graph, whose nodes `places` names.
        scales: if they are known already.
        training: the observers round as well, with gradients as if they did not (Jacob et al.,
            2018), and ranges of activations follow the batches.
        weight_bits: of weights, the sign included.

    Raises:
        ValueError: `places` names other nodes than there are.
    """
    specs: Sequence[Any] = [_TRAINED if training else _OF_ACTIVATIONS] * len(places.activations)
    if scales is not None:
        specs = [_fixed(scale) for scale in scales]
    activations, marked = [], []
    for edges, spec in zip(places.activations, specs, strict=True):
        first, *others = _led_through(root.graph, edges)
        _annotate(first, spec)
        for other in others:
            _annotate(other, SharedQuantizationSpec((first.args[0], first)))
        activations.append(first.name)
        marked += [first.name, *(other.name for other in others)]
    weights = {}
    for node in _led_through(root.graph, places.weights):
        (weight,) = node.all_input_nodes
        name = str(weight.target)
        weights[name] = node.name
        _annotate(node, _of_weight(attrgetter(name)(root), training, weight_bits))
    prepared = prepare_pt2e(root, _Annotated())
    for method in ("train", "eval"):  # of its own, which refuse, and cannot be copied
        vars(prepared).pop(method, None)
    return Observed(prepared, tuple(activations), weights, (*marked, *weights.values()))


def rounded(found: Observed) -> tuple[fx.GraphModule, tuple[Scale, ...]]:
    """The module that rounds to what was observed, and the scales of its activations.

    The integers of a weight are called as it was and `_int8`, their scales `_scale`.
    """
    called = list(found.root.modules())
    for module in called:  # torchao asks the modules that it knows how they are to be quantised
        vars(module)["qconfig"] = None
    root = convert_pt2e(found.root, fold_quantize=False)  # its folding fails for sizes in slices
    for module in called:
        vars(module).pop("qconfig", None)
    nodes = {node.name: node for node in root.graph.nodes}
    of_activations = [nodes[name].all_input_nodes[0] for name in found.activations]
    of_weights = {name: nodes[node].all_input_nodes[0] for name, node in found.weights.items()}
    for node in map(nodes.__getitem__, found.marked):
        node.replace_all_uses_with(node.all_input_nodes[0])
    root.graph.eliminate_dead_code()
    tensors: dict[str, Any] = {}
    for name, dequantised in of_weights.items():
        tensors |= _folded(root, name, dequantised)
    for node in root.graph.nodes:
        node.meta.pop(_ANNOTATION, None)
        if node.op in ("get_attr", "call_module") and node.target not in tensors:
            tensors[node.target] = attrgetter(node.target)(root)
    return fx.GraphModule(tensors, root.graph), tuple(map(_scale, of_activations))


def _scale(dequantised: Node) -> Scale:
    scale, zero_point = (cast(Any, argument) for argument in dequantised.args[1:3])
    return Scale(scale, zero_point)


def _folded(module: fx.GraphModule, name: str, dequantised: Node) -> dict[str, Tensor]:
    """The integers, scales and zero points of the weight `name`, read as such from now on."""
    quantised, scale, zero_point = dequantised.all_input_nodes
    operands = (attrgetter(str(node.target))(module) for node in quantised.all_input_nodes)
    target: Any = quantised.target
    values = dict(zip(quantised.all_input_nodes, operands, strict=True))
    with torch.no_grad():
        integers = target(*map_arg(quantised.args, values.__getitem__))
    found = dict(zip(_KINDS, (integers, values[scale], values[zero_point]), strict=True))
    _scale_of_nothing(found["_int8"], found["_scale"])
    with module.graph.inserting_before(quantised):
        quantised.replace_all_uses_with(module.graph.create_node("get_attr", f"{name}_int8"))
    module.graph.erase_node(quantised)
    for node in values:
        if not node.users:
            module.graph.erase_node(node)
    scale.target, zero_point.target = f"{name}_scale", f"{name}_zero_point"
    return {f"{name}{kind}": tensor for kind, tensor in found.items()}


def _scale_of_nothing(integers: Tensor, scales: Tensor) -> None:
    """Give filters that are all zero the largest scale of their layer: any is right.

    ONNX Runtime rounds a bias to 32 bits, in units of the scales of the input and the filter.
    """
    empty = ~integers.flatten(1).any(1)
    scales[empty] = scales.max()


class _Annotated(Quantizer):  # type: ignore[misc]  # torchao is not installed everywhere
    """Takes the annotations that are there."""

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        return model

    def validate(self, model: fx.GraphModule) -> None:
        pass


def _annotate(node: Node, spec: Any) -> None:
    """Let what `node` leads through be rounded; what has one scale says so itself."""
    (value,) = node.all_input_nodes
    node.meta[_ANNOTATION] = QuantizationAnnotation(
        {value: spec}, allow_implicit_sharing=False, _annotated=True
    )


def _led_through(graph: fx.Graph, edges: Sequence[Edge]) -> list[Node]:
    """New nodes, one for each value, through which `edges` lead from now on, in their order."""
    nodes = {node.name: node for node in graph.nodes}
    place = {node: number for number, node in enumerate(graph.nodes)}
    readers: dict[Node, list[Node]] = {}
    for edge in edges:
        value, user = (nodes.get(name) for name in edge)
        if value is None or user is None or user not in value.users:
            raise ValueError(f"no value leads from {edge[0][:60]!r} to {edge[1][:60]!r}")
        readers.setdefault(value, []).append(user)
    firsts = {value: min(map(place.__getitem__, users)) for value, users in readers.items()}
    ordered = list(place)
    found = []
    for value, first in sorted(firsts.items(), key=lambda item: item[1]):
        with graph.inserting_before(ordered[first]):
            through = graph.call_function(torch.positive, (value,))
        for user in readers[value]:
            user.replace_input_with(value, through)
        found.append(through)
    if not found:
        raise ValueError("a scale is of nothing")
    return found


_OF_ACTIVATIONS = QuantizationSpec(
    torch.uint8, HistogramObserver, 0, LARGEST, torch.per_tensor_affine
)
_TRAINED = QuantizationSpec(
    torch.uint8,
    FakeQuantize.with_args(observer=MovingAverageMinMaxObserver),
    0,
    LARGEST,
    torch.per_tensor_affine,
)


def _fixed(scale: Scale) -> Any:
    return FixedQParamsQuantizationSpec(
        torch.uint8, scale.scale, scale.zero_point, 0, LARGEST, torch.per_tensor_affine
    )


def _of_weight(weight: Tensor, training: bool, bits: int) -> Any:
    """No filter has a scale much smaller than others of its layer, see `_scale_of_nothing`."""
    largest = 2 ** (bits - 1) - 1
    smallest = float(weight.detach().abs().max()) / largest * SMALLEST_SCALE
    eps = max(smallest, torch.finfo().tiny)
    observer = PerChannelMinMaxObserver.with_args(eps=eps)
    if training:  # the range is that of the present weight, always
        present = MovingAveragePerChannelMinMaxObserver.with_args(averaging_constant=1.0, eps=eps)
        observer = FakeQuantize.with_args(observer=present)
    return QuantizationSpec(torch.int8, observer, -largest, largest, torch.per_channel_symmetric, 0)
