"""Rules of the channel analysis: data movement, and the fallback for unknown operators."""

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx.node import Node, map_arg

from dspfx.layers.parametrised import why_computed
from dspfx.passes.analysis import operators
from dspfx.passes.analysis.channel_ops import (
    Channelwise,
    FullWidth,
    Gather,
    Op,
    Value,
)
from dspfx.passes.analysis.movement import PADDED_VALUE, PADDED_ZERO, Move
from dspfx.passes.analysis.state import State
from dspfx.utils.pytree import is_construction


def move(a: State, node: Node, operands: tuple[Node, ...], result: Tensor) -> Op | None:
    """Data movement: a gather of channels, or the same in every channel, found by running it."""
    if operators.left_by(node):
        return None  # it depends on inputs and parameters
    moved = run_on_ids(a, node, operands)
    if not isinstance(moved, Tensor) or moved.shape != result.shape:
        return None
    move = a.ids.move(moved, where_a_second_would_lie(a, node, operands, result))
    why = "its result does not keep whole channels together"
    if move.dim is not None and move.roots:
        source_dims = {a.values[root].dim for root in move.roots}
        only_channels = source_dims == {move.dim} and move.whole_channels
        if runs_on_fewer(a, node, operands, move):
            if not a.positions.are_for_one_size(node, operands[0], result, move):
                return rearranged(a, node, result, move, move.dim)
            why = "how many positions a channel has may vary"
        elif only_channels and a.positions.are_left_alone(node, move.dim):
            return gathered(a, node, result, move, move.dim)
    a.ids.keep(node, moved)
    a.values[node] = Value(tuple(result.shape), None, np.zeros(0, np.int64))
    return FullWidth(operands, why)


def gathered(a: State, node: Node, result: Tensor, move: Move, dim: int) -> Op:
    """A movement that takes whole channels."""
    atoms = np.zeros(len(move.index), np.int64)
    for k, root in enumerate(move.roots):
        here = move.source == k
        atoms[here] = a.values[root].atoms[move.index[here]]
    padding = move.source < 0
    atoms[padding] = a.coupling.new(int(padding.sum()))
    a.pass_atoms(node, result, dim, atoms)
    return Gather(move.roots, move.source, move.index)


def runs_on_fewer(a: State, node: Node, operands: tuple[Node, ...], move: Move) -> bool:
    """Whether the operator, sizes rewritten, does on some channels what it does on all."""
    if operands != move.roots or len(move.roots) != 1 or move.repeat is None:
        return False
    key = operators.key(node, a.root)
    if key in operators.SIZED:
        return len(operators.sizes(node)) == move.rank
    if key is operator.getitem:
        items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(i is None or i is ... or isinstance(i, int | slice) for i in items)
    return key in operators.SIZE_FREE or key in operators.SQUEEZES


def rearranged(a: State, node: Node, result: Tensor, move: Move, dim: int) -> Op:
    """A movement that does the same within every channel."""
    (root,), repeat = move.roots, move.repeat
    assert repeat is not None
    a.pass_atoms(node, result, dim, np.repeat(a.values[root].atoms, repeat))
    zeros = move.pads_zeros_only and not pads_others(node)
    return Channelwise((root,), repeat, np.full(result.shape[dim], zeros))


def split_items(a: State, node: Node, operands: tuple[Node, ...]) -> Op:
    """A split or chunk: each `getitem` finds the item that it takes."""
    key = operators.key(node, a.root)
    if key in operators.MOVEMENT:
        items = run_on_ids(a, node, operands)
        if isinstance(items, tuple | list):
            a.ids.keep(node, tuple(items))
            return FullWidth(operands, "its parts are used whole")
    if is_construction(node.target):
        return FullWidth(operands, "")  # its readers give the reasons
    return opaque(a, node, operands)


def where_a_second_would_lie(
    a: State, node: Node, operands: tuple[Node, ...], result: Tensor
) -> int | None:
    """The dimension that holds a single channel: the one that a second channel would enlarge.

    The numbers of a single channel do not show it where other dimensions have size 1 as well.
    """
    value = a.values.get(operands[0])
    if len(operands) != 1 or value is None or value.dim is None or value.channels != 1:
        return None
    shape = [2 if d == value.dim else n for d, n in enumerate(value.shape)]
    doubled = torch.zeros(shape)
    args = map_arg(node.args, lambda n: doubled if n is operands[0] else a.env[n])
    kwargs = map_arg(node.kwargs, lambda n: doubled if n is operands[0] else a.env[n])
    try:
        found = a.call(node, args, kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None
    if not isinstance(found, Tensor) or found.dim() != result.dim():
        return None
    larger = [d for d in range(found.dim()) if found.shape[d] != result.shape[d]]
    return larger[0] if len(larger) == 1 else None


def run_on_ids(a: State, node: Node, operands: tuple[Node, ...]) -> Any:
    """The result of `node` on the element numbers of its tensors; None if it fails on them."""
    moving = [n for n in operands if not a.is_index(n)]
    if not moving or not a.ids.knows(moving):
        return None
    args = map_arg(node.args, lambda n: a.ids.of(n) if n in moving else a.env[n])
    kwargs = map_arg(node.kwargs, lambda n: a.ids.of(n) if n in moving else a.env[n])
    if operators.key(node, a.root) is torch.nn.functional.pad:
        args, kwargs = pad_with_ids(args, kwargs)
    try:
        return a.call(node, args, kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return None


def opaque(a: State, node: Node, operands: tuple[Node, ...]) -> FullWidth:
    """The fallback: an operator without a rule is given all channels."""
    name = readable(operators.key(node, a.root))
    why = f"{name} is not known to keep channels apart"
    if node.op == "call_module":
        why = why_computed(a.root.get_submodule(str(node.target))) or why
    return FullWidth(operands, why)


def pads_others(node: Node) -> bool:
    """Whether it pads anything but zero, where it pads."""
    if node.target is not torch.nn.functional.pad:
        return False
    return bool(node.kwargs.get("value", node.args[3] if len(node.args) > 3 else None))


def pad_with_ids(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """`F.pad`'s arguments, padding with the number that marks a padded value."""
    value = kwargs.get("value", args[3] if len(args) > 3 else None)
    number = PADDED_ZERO if not value else PADDED_VALUE
    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
    pad = kwargs.get("pad", args[1] if len(args) > 1 else None)
    return (args[0], pad, mode, number if mode == "constant" else None), {}


def readable(key: operators.Key) -> str:
    """The name of an operator, as messages show it."""
    return key if isinstance(key, str) else getattr(key, "__name__", str(key))
