"""Rules of the channel analysis: parameters that become values, such as a token or an embedding.

A class token is repeated for every image, then concatenated with the tokens of the image. Where
this is done along positions, channel j is made of channel j of both.
"""

from torch import Tensor
from torch.fx.node import Node

from dspfx.passes.analysis.channel_ops import Constant, Elementwise, Op
from dspfx.passes.analysis.rules import couple, is_parameter
from dspfx.passes.analysis.state import State


def repeated(a: State, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
    """A parameter for every image of a batch; its channels are the last dimension that has some."""
    (whole, *others) = operands
    parameter = a.env[whole]
    if others or not isinstance(a.ops[whole], Constant) or not parameter.is_floating_point():
        return None
    sizes = [dim for dim, size in enumerate(parameter.shape) if size > 1]
    if not sizes:
        return None
    dim = sizes[0] if len(sizes) == 1 else parameter.dim() - 1
    own = dim + result.dim() - parameter.dim()
    if own == 0 or result.shape[own] != parameter.shape[dim]:
        return None
    a.new_atoms(node, result, own)
    return Elementwise(operands, (True,), True, False, (False,), (True,))


def joined(a: State, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
    """A concatenation along positions."""
    given = node.args[0] if node.args else node.kwargs["tensors"]
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if not isinstance(given, tuple | list) or {*given} != {*operands} or type(dim) is not int:
        return None
    values = [a.values[n] for n in operands if not isinstance(a.ops[n], Constant)]
    (own, *others) = {value.dim for value in values} or {None}
    if own is None or others or own == dim % result.dim():
        return None
    if any(a.env[n].dim() != result.dim() for n in operands):
        return None
    count = len(operands)
    a.pass_atoms(node, result, own, couple(a, [*operands], result.shape[own]))
    parameters = tuple(is_parameter(a, operand) for operand in operands)
    every = (True,) * count
    return Elementwise(operands, every, True, False, (False,) * count, parameters)
