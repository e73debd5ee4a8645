"""The value types of the channel analysis: what a graph does to channels, operator by operator.

A traced graph has hundreds of operators. For channels they do one of eleven things, the subclasses
of `Op` below; liveness, cost and compaction know these eleven and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch.fx.node import Node

from dspfx.utils.arrays import BoolArray, IntArray


@dataclass(frozen=True)
class Value:
    """The channels of one tensor.

    Attributes:
        shape: of the tensor, as seen with the example inputs.
        dim: the dimension whose positions are the channels; None if several or none are, and
            then the tensor is only ever handled whole.
        atoms: int `[shape[dim]]`, the label that every channel was born with.
    """

    shape: tuple[int, ...]
    dim: int | None
    atoms: IntArray

    @property
    def channels(self) -> int:
        """How many channels there are; 0 for a tensor that is handled whole."""
        return len(self.atoms)


@dataclass(frozen=True)
class Op:
    """What one node does to channels; `operands` are the nodes whose tensors it reads."""

    operands: tuple[Node, ...]


@dataclass(frozen=True)
class Source(Op):
    """Model inputs. All their channels exist, whether or not they are read."""


@dataclass(frozen=True)
class Constant(Op):
    """A parameter or buffer, or a value computed from these alone: it may be sliced anywhere."""


@dataclass(frozen=True)
class Mix(Op):
    """A convolution or linear layer: O filters that read C channels in S structural groups.

    Filter o reads the channels of structural group `o // (O / S)`, fewer where it is masked.
    `bias` says which filters have one that is not zero (any, where it is learned under a gate).
    A layer with `full_width` reads a tensor that is handled whole; a frozen one keeps all filters.
    """

    layer: str
    filters: int
    channels: int
    structural_groups: int
    taps: int
    positions: int
    bias: BoolArray
    has_bias: bool
    gated: bool
    full_width: bool
    frozen: bool


@dataclass(frozen=True)
class Channelwise(Op):
    """Every channel by itself: channel c becomes channels `c*repeat .. c*repeat + repeat - 1`.

    `keeps_zero` says for every output channel whether a zero channel stays exactly zero. What
    `shifts` may have a bias, as norms do and some depthwise layers. A gate follows it: whether a
    zero channel stays zero there would change while the bias is trained.
    """

    repeat: int
    keeps_zero: BoolArray
    macs_per_channel: int = 0
    parameters_per_channel: int = 0
    shifts: bool = False
    layer: str | None = None


@dataclass(frozen=True)
class Statistics(Channelwise):
    """A norm over the channels: channel c of the result is made of channel c and of sums over all.

    A zero channel adds nothing to the sums: where it is not read, it may be left out, as long as
    the sums are divided by as many as there were. All that are not zero have to be there. The
    operands after the first are its weight and its bias.
    """


@dataclass(frozen=True)
class Gate(Op):
    """A `ChannelGate`: zero where `alive` says so, once all that it `follows` are zero."""

    gate: str
    follows: tuple[Node, ...]


@dataclass(frozen=True)
class Elementwise(Op):
    """Channel j of the result is made of channel j of every operand that `spans` the channels.

    The other operands are broadcast whole.
    `keeps_zero`: all-zero operands give zero. `absorbing`: one zero operand is enough.
    `skips_zero` says for each operand whether it may be left out where it is all zero,
    `parameters` which are made of parameters alone. A gate follows where these shift the others.
    """

    spans: tuple[bool, ...]
    keeps_zero: bool
    absorbing: bool
    skips_zero: tuple[bool, ...]
    parameters: tuple[bool, ...]

    @property
    def follows(self) -> tuple[Node, ...]:
        """The operands that have the channels and are no parameters."""
        own = zip(self.operands, self.spans, self.parameters, strict=True)
        return tuple(operand for operand, spans, parameter in own if spans and not parameter)

    @property
    def shifts(self) -> bool:
        """Whether parameters make of a zero channel one that is not."""
        own = zip(self.spans, self.parameters, strict=True)
        return bool(self.follows) and not self.absorbing and (True, True) in own


@dataclass(frozen=True)
class Merge(Op):
    """Channel j is made of `count` channels of the operand, as by a pixel shuffle or a GLU.

    If `side_by_side` these are the channels from `j*count` on, else j, j + C, j + 2C, ... of
    `count*C`. All of them zero give zero; the first of them is enough if it is `absorbing`.
    """

    count: int
    side_by_side: bool
    absorbing: bool

    def read_by(self, channels: IntArray, of: int) -> IntArray:
        """Int `[count, n]`: what `channels`, int `[n]`, are made of, `of` being C."""
        own = np.arange(self.count)[:, None]
        return channels * self.count + own if self.side_by_side else channels + own * of

    def operand_for(self, channels: IntArray, of: int) -> IntArray:
        """Int `[n * count]`: the operand of which the operator makes `channels` and no others."""
        read = self.read_by(channels, of)
        return (read.T if self.side_by_side else read).reshape(-1)


@dataclass(frozen=True)
class Gather(Op):
    """Data movement: channel j is channel `index[j]` of operand `source[j]`, or zero where -1."""

    source: IntArray
    index: IntArray


@dataclass(frozen=True)
class FullWidth(Op):
    """Anything else. Its operands are given to it at full width, zeros filled in.

    `reason` is empty where that is no loss, as for the outputs of the model. What has an `effect`,
    as a write into an input, is done whether or not anybody reads its result.
    """

    reason: str
    effect: bool = False


@dataclass(frozen=True)
class Query(Op):
    """A size that is asked of a tensor, or part of one: `constant` where a channel count is."""

    constant: int | None


def used(ops: dict[Node, Op]) -> set[Node]:
    """The nodes of a graph that its outputs depend on, through the operands of `ops`.

    A split, for instance, is not one of them: its items are gathers from the tensor that it splits.
    """
    found: set[Node] = set()
    for node, op in reversed(ops.items()):
        if node in found or is_wanted(node, op):
            found |= {node, *op.operands}
    return found


def is_wanted(node: Node, op: Op) -> bool:
    """Whether what a node does is to be done even if no other reads it."""
    return node.op == "output" or (isinstance(op, FullWidth) and op.effect)


@dataclass(frozen=True)
class Declined:
    """A node that keeps its operands at full width, why, and its line of source if known."""

    node: str
    reason: str
    line: str = ""

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}" + (f" ({self.line})" if self.line else "")


@dataclass(frozen=True)
class Tie:
    """A parameter that two modules share.

    Attributes:
        node, name: the call of the module that shares it, and the parameter's full name there.
        owner, owner_name: the same of the first module, for which it is counted.
        count: of its elements.
    """

    node: Node
    name: str
    owner: Node
    owner_name: str
    count: int


@dataclass(frozen=True)
class Fixed:
    """What a graph costs besides the layers and norms whose channels are counted.

    Attributes:
        macs: multiply-accumulates for one sample, of other nodes.
        parameters: what nodes have beyond what is counted of them; negative where they
            share some with earlier nodes.
        unused: parameters of modules that are never called; no compact model has them.
        ties: the parameters that are shared.
        outside: multiply-accumulates for one sample of the code around the parts of a model, which
            its first part answers for.
    """

    macs: Mapping[Node, int] = field(default_factory=dict)
    parameters: Mapping[Node, int] = field(default_factory=dict)
    unused: int = 0
    ties: tuple[Tie, ...] = ()
    outside: int = 0


@dataclass(frozen=True)
class ChannelAnalysis:
    """What `analyse` finds out about a graph.

    Attributes:
        ops: what every node does, in graph order; nodes that touch no tensor are left out.
        values: the channels of every node that has a tensor.
        classes: int `[atoms]`, the coupling class of every atom.
        declined: the nodes that need their operands whole.
        fixed: what is spent on anything but the channels of layers and norms.
    """

    ops: dict[Node, Op]
    values: dict[Node, Value]
    classes: IntArray
    declined: tuple[Declined, ...] = field(default=())
    fixed: Fixed = field(default=Fixed())

    @property
    def class_count(self) -> int:
        """How many coupling classes there are."""
        return int(self.classes.max(initial=-1)) + 1

    def class_of(self, node: Node) -> IntArray:
        """The coupling class of every channel of `node`."""
        return self.classes[self.values[node].atoms]
