"""Rules of the channel analysis: layers, norms, gates, reductions, elementwise operators."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx.node import Node, map_arg

from dspfx.layers.computed_weight import is_weighted
from dspfx.layers.gated import GatedLayer
from dspfx.layers.parametrised import is_computed
from dspfx.layers.weights import TRANSPOSED, filters_first, structural_groups
from dspfx.passes.analysis import operators
from dspfx.passes.analysis.channel_ops import (
    Channelwise,
    Constant,
    Elementwise,
    FullWidth,
    Gate,
    Merge,
    Mix,
    Op,
    Value,
)
from dspfx.passes.analysis.moves import move
from dspfx.passes.analysis.state import State
from dspfx.utils.arrays import BoolArray, IntArray


def mix(a: State, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
    """A convolution or linear layer."""
    name = str(node.target)
    layer: Any = a.root.get_submodule(name)
    value = a.values.get(operands[0])
    weighted = is_weighted(layer)
    if weighted and len(operands) == 2 and isinstance(a.ops[operands[1]], Constant):
        operands = operands[:1]
    asked = isinstance(layer, TRANSPOSED) and len(node.args) + ("output_size" in node.kwargs) > 1
    takes_one_tensor = len(node.args) + len(node.kwargs) - weighted - asked == 1
    takes_one_tensor &= len(operands) == 1
    has_weight = is_computed(layer) or type(layer.weight) is nn.Parameter
    if not takes_one_tensor or not has_weight:
        return None
    if value is None or len(value.shape) != result.dim():
        return None
    if not isinstance(layer, nn.Linear) and result.dim() != layer.weight.dim():
        return None  # a single image without a batch dimension
    dim = result.dim() - 1 if isinstance(layer, nn.Linear) else 1
    weight, groups = filters_first(layer), structural_groups(layer)
    filters, width = weight.shape[:2]
    taps = weight[0, 0].numel()
    # every filter is applied at each position of the output, or of the input if transposed
    swept = a.env[operands[0]] if isinstance(layer, TRANSPOSED) else result
    positions = max(1, int(swept.numel() // swept.shape[dim] / a.samples))
    if groups == filters == value.channels > 1 and value.dim == dim and not weighted:
        return depthwise(a, node, operands, result, taps * positions)
    a.new_atoms(node, result, dim)
    gated = isinstance(layer, GatedLayer)
    bias = np.zeros(filters, bool)
    if layer.bias is not None:
        bias = numpy(a.findings.find(lambda: layer.bias.detach() != 0)) | gated
    frozen = name in a.frozen
    return Mix(
        *(operands, name, filters, width * groups, groups, taps, positions),
        *(bias, layer.bias is not None, gated),
        full_width=value.dim != dim or frozen,
        frozen=frozen,
    )


def depthwise(
    a: State, node: Node, operands: tuple[Node, ...], result: Tensor, macs: int
) -> Op | None:
    """A convolution whose filters read one channel each."""
    layer = a.root.get_submodule(str(node.target))
    if str(node.target) in a.frozen:
        return FullWidth(operands, "the layer is to be ignored")
    parameters = sum(p[0].numel() for p in layer.parameters(recurse=False))
    a.pass_atoms(node, result, 1, a.values[operands[0]].atoms)
    zeros, shifts = on_zeros(a, node, operands, result, 1), layer.bias is not None
    return Channelwise(operands, 1, zeros, macs, parameters, shifts, str(node.target))


def channelwise(a: State, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
    """An operator that handles every channel by itself, along dimension 1."""
    value = a.values.get(operands[0])
    if len(operands) != 1 or value is None or value.dim != 1 or result.dim() < 2:
        return None
    if result.shape[1] != value.channels:
        return None
    rank = operators.rank_with_batch(operators.key(node, a.root))
    if rank is not None and len(value.shape) != rank:
        return None  # torch takes the batch for the channels, and the channels for positions
    a.pass_atoms(node, result, 1, value.atoms)
    zeros = on_zeros(a, node, operands, result, 1)
    parameters = 0
    if node.op == "call_module":
        own = a.root.get_submodule(str(node.target)).parameters(recurse=False)
        parameters = sum(p.numel() for p in own if p.numel() == value.channels)
        parameters //= value.channels
    norm = operators.key(node, a.root) in operators.NORMS
    return Channelwise(operands, 1, zeros, 0, parameters, norm)


def gate(a: State, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
    """A `ChannelGate`, after what shifts channels."""
    shifted, value = a.ops[operands[0]], a.values[operands[0]]
    assert value.dim is not None
    a.pass_atoms(node, result, value.dim, value.atoms)
    follows = operands
    if isinstance(shifted, Channelwise):
        follows = shifted.operands[:1]
    elif isinstance(shifted, Elementwise):
        follows = shifted.follows
    return Gate(operands, str(node.target), follows)


def reduction(a: State, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
    """A mean or the like over positions; over channels it mixes them."""
    value = a.values.get(operands[0])
    if len(operands) != 1 or value is None or value.dim is None:
        return None
    rank = len(value.shape)
    reduced = operators.reduced(node, rank)
    if reduced is None or value.dim in reduced or 0 in reduced:
        return None
    kept = result.dim() == rank
    dim = value.dim if kept else value.dim - sum(d < value.dim for d in reduced)
    a.pass_atoms(node, result, dim, value.atoms)
    return Channelwise(operands, 1, on_zeros(a, node, operands, result, dim))


def merge(a: State, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
    """Several channels become one, where there are fewer along the dimension of channels."""
    value = a.values.get(operands[0])
    shuffles = operators.key(node, a.root) in operators.PIXEL_SHUFFLES
    sizes = zip((() if value is None else value.shape), result.shape, strict=False)
    fewer = [dim for dim, (before, after) in enumerate(sizes) if after < before]
    if len(operands) != 1 or value is None or fewer != [value.dim]:
        return move(a, node, operands, result) if shuffles else None
    (dim,) = fewer
    count = result.shape[dim]
    op = Merge(operands, value.channels // count, shuffles, is_absorbing(a, node, operands[0], dim))
    atoms = value.atoms[op.read_by(np.arange(count), count)]
    for others in atoms[1:]:
        a.coupling.unite(atoms[0], others)
    a.pass_atoms(node, result, dim, atoms[0])
    return op


def elementwise(a: State, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
    """An operator that makes channel j of channel j of every operand."""
    key = operators.key(node, a.root)
    if key == "to" and len(operands) > 1:
        return None
    dims = {aligned_dim(a, a.values.get(n), result) for n in operands} - {None}
    if len(dims) != 1:
        return None
    (dim,) = dims
    assert dim is not None
    spans = [spans_channels(a, operand, result, dim) for operand in operands]
    if None in spans:
        return None
    spanning = [n for n, span in zip(operands, spans, strict=True) if span]
    a.pass_atoms(node, result, dim, couple(a, spanning, result.shape[dim]))
    # a term may be left out if it is never broadcast, so if all or none follow the image
    alike = len({a.positions.are_fixed(operand) for operand in operands}) == 1
    plain = not node.kwargs and len(node.args) == len(operands) == 2 and alike
    skips: tuple[bool, ...] = (False,) * len(operands)
    if plain:
        left, right = (is_whole(a, operand, result, dim) for operand in operands)
        skips_left = right and key in operators.ADDITIONS
        skips_right = left and key in operators.ADDITIONS | operators.SUBTRACTIONS
        skips = skips_left, skips_right
    return Elementwise(
        operands,
        tuple(bool(span) for span in spans),
        zero_of_zeros(a, node),
        key in operators.MULTIPLICATIONS,
        skips,
        tuple(is_parameter(a, operand) for operand in operands),
    )


def is_parameter(a: State, operand: Node) -> bool:
    """Whether a value is made of parameters and buffers alone, for batches of any size."""
    op = a.ops[operand]
    return isinstance(op, Constant) or (isinstance(op, Elementwise) and all(op.parameters))


def is_whole(a: State, operand: Node, result: Tensor, dim: int) -> bool:
    """Whether an operand alone has the shape and type of the result, at every size."""
    real = a.env[operand]
    if not isinstance(real, Tensor) or isinstance(a.ops[operand], Constant):
        return False
    alike = real.shape == result.shape and real.dtype == result.dtype
    return alike and all(size > 1 for d, size in enumerate(real.shape) if d != dim)


def aligned_dim(a: State, value: Value | None, result: Tensor) -> int | None:
    """The dimension of the result that the channels of an operand lie along."""
    if value is None or value.dim is None:
        return None
    return value.dim + result.dim() - len(value.shape)


def spans_channels(a: State, operand: Node, result: Tensor, dim: int) -> bool | None:
    """Whether an operand has the result's channels; None if that cannot be decided."""
    value = a.values.get(operand)
    if value is None:
        return None
    own = dim - result.dim() + len(value.shape)
    if own < 0 or value.shape[own] != result.shape[dim]:
        return False
    if value.dim == own or isinstance(a.ops[operand], Constant):
        return True
    return False if value.shape[own] == 1 else None


def couple(a: State, operands: list[Node], channels: int) -> IntArray:
    """The atoms of a result whose operands meet channel by channel."""
    met = [a.values[n].atoms for n in operands if not isinstance(a.ops[n], Constant)]
    if not met:
        return a.coupling.new(channels)
    for other in met[1:]:
        a.coupling.unite(met[0], other)
    return met[0]


def on_zeros(
    a: State, node: Node, operands: tuple[Node, ...], result: Tensor, dim: int
) -> BoolArray:
    """Bool `[C]`: the channels of `result` that are zero where the operand is."""
    form = a.env[operands[0]]
    if operators.key(node, a.root) in operators.BATCH_NORMS:  # all positions alike
        form = form[(slice(2), slice(None), *[slice(2)] * (form.dim() - 2))]
    run = run_on(a, node, operands[0])

    def zero() -> Tensor:
        zero = (run(torch.zeros_like(form)) == 0).movedim(dim, 0)
        return zero.reshape(len(zero), -1).all(1)

    return numpy(a.findings.find(zero))


def is_absorbing(a: State, node: Node, operand: Node, dim: int) -> bool:
    """Whether zeros in the first half of its channels are enough for it to give zero."""
    half = torch.ones_like(a.env[operand])
    half.narrow(dim, 0, half.shape[dim] // 2).zero_()
    return bool((run_on(a, node, operand)(half) == 0).all())


def run_on(a: State, node: Node, operand: Node) -> Callable[[Tensor], Tensor]:
    """A function from a tensor in place of `operand` to the result of `node`."""
    others = {n: a.env[n] for n in node.all_input_nodes if n is not operand}

    def run(x: Tensor) -> Tensor:
        args = map_arg(node.args, lambda n: x if n is operand else others[n])
        kwargs = map_arg(node.kwargs, lambda n: x if n is operand else others[n])
        result: Tensor = a.call(node, args, kwargs)
        return result

    return run


def zero_of_zeros(a: State, node: Node) -> bool:
    """Whether an elementwise operator gives zero where all its tensors are zero."""

    def zero(n: Node) -> Any:
        real = a.env[n]
        if not isinstance(real, Tensor):
            return real
        return torch.zeros_like(real[(slice(1),) * real.dim()])  # a layout may need the rank

    values = {n: zero(n) for n in node.all_input_nodes}

    def is_zero() -> bool:
        args, kwargs = map_arg(node.args, value), map_arg(node.kwargs, value)
        return bool((a.call(node, args, kwargs) == 0).all())

    def value(n: Node) -> Any:
        return values[n].clone() if isinstance(values[n], Tensor) else values[n]

    return bool(a.findings.find(is_zero))


def relayout(a: State, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
    """A copy in another memory layout: elementwise, or one more step of moving data."""
    found = elementwise(a, node, operands, result)
    if found is not None or node.target in ("detach", torch.detach):
        return found  # no gradient goes back to what it has moved
    return move(a, node, operands, result)


def numpy(tensor: Tensor) -> BoolArray:
    """A tensor as an array."""
    array: BoolArray = tensor.cpu().numpy()
    return array
