"""Rule of the channel analysis: norms over all channels of a value."""

from typing import Any

import numpy as np
from torch import Tensor
from torch.fx.node import Node, map_arg

from dspfx.passes.analysis import operators
from dspfx.passes.analysis.channel_ops import Constant, Op, Statistics
from dspfx.passes.analysis.state import State


def statistics(a: State, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
    """A norm over all channels, which are the last dimension."""
    value, last = a.values.get(operands[0]), result.dim() - 1
    if value is None or value.dim != last or node.all_input_nodes[0] is not operands[0]:
        return None
    if not all(isinstance(a.ops[operand], Constant) for operand in operands[1:]):
        return None
    if node.op == "call_module":
        norm: Any = a.root.get_submodule(str(node.target))
        shape, own = norm.normalized_shape, list(norm.parameters(recurse=False))
        count = sum(parameter.numel() for parameter in own)
    else:
        given = node.args[1] if len(node.args) > 1 else node.kwargs["normalized_shape"]
        shape = map_arg(given, a.env.__getitem__)
        own = [a.env[operand] for operand in operands[1:]]
        count = sum(a.env[n].numel() for n in operands[1:] if is_read_once(node, n))
    whole = [value.channels]
    if list(shape) != whole or any(list(tensor.shape) != whole for tensor in own):
        return None
    a.pass_atoms(node, result, last, value.atoms)
    keeps_zero = operators.key(node, a.root) in operators.RMS_NORMS
    zeros = np.full(value.channels, keeps_zero)
    return Statistics(operands, 1, zeros, 0, count // value.channels, not keeps_zero)


def is_read_once(node: Node, parameter: Node) -> bool:
    """Whether only `node` reads a parameter of the graph."""
    named = [n for n in node.graph.find_nodes(op="get_attr") if n.target == parameter.target]
    return parameter.op == "get_attr" and named == [parameter] and [*parameter.users] == [node]
