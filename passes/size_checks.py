"""What traced code is told of sizes, its graph checks in every call.

1. A number that is made of sizes of tensors alone is compared with the answer that the code got.
2. Of a number of dimensions, it is enough to check those of the inputs.
3. Torch looks at the numbers among its arguments before it sees that one is a proxy. Such a number
   is passed on, not told: its check is taken back.
"""

import builtins
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch.fx.node import Node

_SIZE = "made of sizes of tensors alone"  # a key of `Node.meta`
_HOW = "prepare it with an example of the size that it is called with"


class SizeChecks:
    """The checks in one graph.

    Args:
        call: makes a traced call of a function.
        check: makes a traced call that raises a text where a condition does not hold.
        line: the line of the user's code under way, empty if it is not known.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        check: Callable[[Any, str], Any],
        line: Callable[[], str],
    ) -> None:
        self.call, self.check, self.line = call, check, line
        self.checked: set[Node] = set()
        self.asked: list[_Asked] = []
        self.inputs: list[Any] = []  # tensors whose number of dimensions is not checked yet

    def insist_on(self, size: Any, frame: FrameType) -> None:
        """Check that `size`, a proxy, is what `frame` is told, if it is a size."""
        if _SIZE not in size.node.meta or size.node in self.checked:
            return
        earlier, self.asked = self.asked, []
        match size.concrete:
            case True:
                same: Any = size
            case False:  # dynamo has no `==` for what is true of symbolic sizes
                same = self.call(operator.not_, size)
            case number:
                same = self.call(operator.eq, size, number)
        place = f" ({line})" if (line := self.line()) else ""
        told = f"for other sizes, and its code may do otherwise for these{place}; {_HOW}"
        check = self.check(same, told)
        self.checked.add(size.node)
        made = [proxy.node for proxy in (check, same) if proxy is not size]
        self.asked = [*earlier, _Asked(frame, frame.f_lasti, size.node, made)]

    def insist_on_ranks(self) -> None:
        """Check that the inputs have as many dimensions as they have now."""
        inputs, self.inputs = self.inputs, []
        for tensor in inputs:
            rank = tensor.tracer.create_proxy("call_method", "dim", (tensor,), {})
            self.insist_on(rank, sys._getframe())

    def passed_on(self, node: Node) -> None:
        """Take back the checks of what `node`, a new call, is given in the same instruction."""
        asked, self.asked = self.asked, []
        for own in asked:
            if own.size in node.all_input_nodes and own.under_way():
                self.checked.remove(own.size)
                for made in own.check:
                    made.graph.erase_node(made)


@dataclass(frozen=True)
class _Asked:
    """Which instruction asked for a size, and the nodes of the check, each behind its users."""

    frame: FrameType
    instruction: int
    size: Node
    check: list[Node]

    def under_way(self) -> bool:
        """Whether that instruction has not ended."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None and frame.f_lasti == self.instruction


def note_size(node: Node) -> None:
    """Remember of `node`, which computes no tensor, whether it tells sizes."""
    if _made_of_sizes(node):
        node.meta[_SIZE] = True


def _made_of_sizes(node: Node) -> bool:
    """Whether it is a number of dimensions, a size of one, or reckoned from such numbers alone.

    A whole shape is not: who asks for it asks for the count of the channels.
    """
    match node.op, node.target, *node.args[1:], *node.kwargs.values():
        case ("call_method", "dim") | ("call_method", "size", _) | (_, builtins.getattr, "ndim"):
            return True
        case _, operator.getitem, int() | slice() as items if _is_shape(node.all_input_nodes[0]):
            return isinstance(items, int) or _without_channels(items)
    inputs = node.all_input_nodes
    return node.op.startswith("call") and bool(inputs) and all(_SIZE in n.meta for n in inputs)


def _is_shape(node: Node) -> bool:
    """Whether it is the shape of a tensor."""
    match node.op, node.target, *node.args[1:], *node.kwargs.values():
        case ("call_method", "size") | (_, builtins.getattr, "shape"):
            return True
    return False


def _without_channels(items: slice) -> bool:
    """Whether these items of a shape are sizes of an image alone."""
    first = items.start
    return isinstance(first, int) and (first >= 2 or -2 <= first < 0) and items.step is None
