"""Guards: the graph checks in every call what traced code branched on while it was traced.

1. A number that is made of sizes of tensors, and of inputs that are no tensors, is compared with
   the answer that the code got. Of a list or a mapping among the inputs, its length or its keys
   are; of an input whose class is asked for, or of an item that may be None, the kind.
2. Of a number of dimensions, it is enough to check those of the inputs; of a number of pieces, the
   count that follows from the size of what was cut.
3. Properties that do not change with sizes, a dtype for instance, are not checked; nor are whole
   shapes and counts of elements that depend on a count of channels which may be pruned.
4. All other numbers are computed from the values of tensors: code cannot branch on them.
5. Torch reads the numbers among its arguments before it sees that one is a proxy. Such a number is
   passed on, not branched on: its guard is removed.
"""

import builtins
import enum
import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Node

# functions and methods whose results do not depend on the values of a tensor
_PROPERTIES = frozenset([
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "get_device",
    "type", "element_size", "getattr", "is_contiguous", "is_floating_point", "is_complex",
    "is_signed", "is_conj", "is_neg", "is_inference", "is_pinned", "is_shared", "is_same_size",
    "is_set_to", "has_names", "is_tensor", "data_ptr", "result_type", "can_cast",
])  # fmt: skip
# their results have as many elements as the values say
_COUNTING = frozenset([
    "nonzero", "argwhere", "unique", "unique_consecutive", "masked_select", "bincount",
    "repeat_interleave",
])  # fmt: skip
_SPLITTING = {"unbind": 1, "split": 2, "chunk": 2, "tensor_split": 2}  # and where `dim` stands
_ITEMS = (operator.getitem, builtins.getattr, "get")
_ORIGIN = "what it is made of"  # a key of `Node.meta`
_HOW = "prepare it with an example of the sizes and the items that it is called with"


class _Origin(enum.Enum):
    """The kind of inputs that a value is computed from."""

    INPUTS = "an input that is no tensor, or an item of one"
    SIZES = "sizes of tensors, and such inputs"
    PROPERTIES = "these, and properties of tensors that are not checked"
    VALUES = "values of tensors"


_CHECKED = frozenset((_Origin.INPUTS, _Origin.SIZES))


@dataclass(frozen=True)
class _Cut:
    """A call that splits a tensor along a dimension.

    Attributes:
        name: of the function or method.
        tensor: the tensor that is split, a proxy.
        into: how many pieces, or how long they are; a list of lengths; or nothing of that.
        dim: the dimension.
    """

    name: str
    tensor: Any
    into: Any
    dim: Any

    def pieces(self) -> Any:
        """The number of pieces: a proxy, or a number where it is always the same."""
        size, into = self.tensor.size(self.dim), self.into
        if isinstance(into, tuple | list):
            return size
        match self.name:
            case "chunk":
                return _at_least(size, _at_least(size, into))
            case "split":
                return _at_least(size, into)
            case "tensor_split" if isinstance(into, int):
                return into
        return size


def _at_least(size: Any, length: Any) -> Any:
    """How many pieces of a length cover a size: the quotient, rounded up."""
    return (size + length - 1) // length


class Guards:
    """The guards of one graph.

    Args:
        call: makes a traced call of a function.
        check: makes a traced call that raises a text where a condition does not hold.
        line: the current line of the user's code, empty if unknown.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        check: Callable[[Any, str], Any],
        line: Callable[[], str],
    ) -> None:
        self.call, self.check, self.line = call, check, line
        self.checked: set[tuple[Node, str]] = set()
        self.asked: list[_Asked] = []
        self.inputs: list[Any] = []  # tensors whose number of dimensions is not checked yet
        self.cut: dict[Node, _Cut] = {}  # by the node of the pieces

    def note(self, made: Any, args: Any, kwargs: Any) -> None:
        """Record what `made`, a proxy of a new call, is computed from."""
        made.node.meta[_ORIGIN] = _made_of(made.node, made.concrete)
        place = _SPLITTING.get(_name(made.node))
        if place is not None:
            given = [*args[1:], *kwargs.values()]
            dim = kwargs.get("dim", args[place] if len(args) > place else 0)
            self.cut[made.node] = _Cut(_name(made.node), args[0], given[0] if given else 0, dim)

    def guard_number(self, asked: Any, frame: FrameType) -> None:
        """Guard `asked`, a proxy of a number that the code in `frame` reads.

        Raises:
            TypeError: it depends on the values of tensors.
        """
        if _origin(asked.node) is _Origin.VALUES:
            raise TypeError(f"control flow depends on the values of '{asked.node.name}'")
        if self.are_checked(asked):
            match asked.concrete:
                case True:
                    self._insist("value", asked, frame, lambda: [])
                case False:  # dynamo has no `==` for what is true of symbolic sizes
                    self._insist("value", asked, frame, lambda: [self.call(operator.not_, asked)])
                case number:
                    self._insist("value", asked, frame, lambda: self._equal(asked, number))

    def guard_items(self, container: Any, frame: FrameType) -> None:
        """Guard the number of items, or the keys, of `container`, a proxy."""
        value = container.concrete
        if isinstance(value, torch.Size):
            self.guard_ranks()
        elif self.are_checked(container):
            counted = list if isinstance(value, Mapping) else len
            self._guard_answer(counted, container, counted(value))
        elif container.node in self.cut:
            pieces = self.cut[container.node].pieces()
            if isinstance(pieces, fx.Proxy):
                self.guard_number(pieces, frame)

    def guard_kind(self, asked: Any) -> None:
        """Guard the class of `asked`, a proxy, if it is an input or lies in one."""
        if is_given(asked.node):
            self._guard_answer(kind_of, asked, kind_of(asked.concrete))

    def guard_none(self, asked: Any) -> None:
        """Guard that `asked`, a proxy of an item of a container, is None."""
        self._guard_answer(kind_of, asked, kind_of(None))

    def guard_ranks(self) -> None:
        """Guard the number of dimensions of the inputs."""
        inputs, self.inputs = self.inputs, []
        for tensor in inputs:
            rank = tensor.tracer.create_proxy("call_method", "dim", (tensor,), {})
            self.guard_number(rank, sys._getframe())

    def are_checked(self, asked: Any) -> bool:
        """Whether `asked`, a proxy, is made of sizes and of inputs alone."""
        return _origin(asked.node) in _CHECKED

    def _equal(self, asked: Any, value: Any) -> list[Any]:
        return [self.call(operator.eq, asked, value)]

    def _guard_answer(self, question: Callable[[Any], Any], asked: Any, answer: Any) -> None:
        """Guard the answer to `question`, which user code asks, not torch."""

        def compare() -> list[Any]:
            found = self.call(question, asked)
            return [found, *self._equal(found, answer)]

        self._insist(question.__name__, asked, None, compare)

    def _insist(
        self, what: str, asked: Any, frame: FrameType | None, compare: Callable[[], list[Any]]
    ) -> None:
        """Assert, once, the result of the last call that `compare` makes; or `asked`."""
        if (asked.node, what) in self.checked:
            return
        earlier, self.asked = self.asked, []
        calls = compare()
        for proxy in calls:
            proxy.node.meta["is_wrapped"] = True  # fx traces it again when it is unpickled
        place = f" ({line})" if (line := self.line()) else ""
        reason = f"for other inputs, and its code may do otherwise for these{place}; {_HOW}"
        calls.append(self.check([asked, *calls][-1], reason))
        self.checked.add((asked.node, what))
        made = [proxy.node for proxy in reversed(calls)]
        now = [] if frame is None else [_Asked(frame, frame.f_lasti, asked.node, made)]
        self.asked = [*earlier, *now]

    def passed_on(self, node: Node) -> None:
        """Remove the guards of numbers that `node`, a new call, is given in one instruction."""
        asked, self.asked = self.asked, []
        for own in asked:
            if own.node in node.all_input_nodes and own.under_way():
                self.checked.remove((own.node, "value"))
                for made in own.check:
                    made.graph.erase_node(made)


@dataclass(frozen=True)
class _Asked:
    """Which instruction asked for a number, and the nodes of its guard, each after its users."""

    frame: FrameType
    instruction: int
    node: Node
    check: list[Node]

    def under_way(self) -> bool:
        """Whether that instruction is still running."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None and frame.f_lasti == self.instruction


def kind_of(value: Any) -> str:
    """The class of an input, as far as code that asks for it can distinguish."""
    kinds: dict[str, Any] = {
        "tensor": Tensor,
        "bool": bool,
        "int": int | torch.SymInt,
        "float": float | torch.SymFloat,
    }
    for name, kind in kinds.items():
        if isinstance(value, kind):
            return name
    return type(value).__name__


def takes_out(node: Node) -> bool:
    """Whether a node takes an item from a container, or an attribute."""
    return node.target in _ITEMS


def is_item(node: Node) -> bool:
    """Whether a node takes an item from an input."""
    return takes_out(node) and _origin(node.all_input_nodes[0]) is _Origin.INPUTS


def is_given(node: Node) -> bool:
    """Whether a node is an input, or an item of one."""
    return node.op == "placeholder" or is_item(node)


def _origin(node: Node) -> _Origin:
    found: _Origin = node.meta.get(_ORIGIN, _Origin.VALUES)  # a tensor that the code holds has none
    return found


def _made_of(node: Node, value: Any) -> _Origin:
    if is_given(node):
        return _Origin.VALUES if isinstance(value, Tensor) else _Origin.INPUTS
    inputs = node.all_input_nodes
    if node.op in ("get_attr", "call_module") or not inputs:
        return _Origin.VALUES
    origins = {_origin(n) for n in inputs}
    if _is_property(node) and _name(inputs[0]) in _COUNTING:
        return _Origin.VALUES
    if origins <= _CHECKED or _is_size(node):
        return _Origin.SIZES
    if not isinstance(value, Tensor) and (_Origin.VALUES not in origins or _is_property(node)):
        return _Origin.PROPERTIES
    return _Origin.VALUES


def _is_size(node: Node) -> bool:
    """Whether it is a number of dimensions, or sizes of which none is a count of channels.

    The channels of inputs may be counted; and one size alone may be, since it stays what it is.
    """
    source = node.all_input_nodes[0]
    match node.op, node.target, *node.args[1:], *node.kwargs.values():
        case ("call_method", "dim") | ("call_method", "size", _) | (_, builtins.getattr, "ndim"):
            return True
        case _, operator.getitem, int() | slice() as items if _is_shape(source):
            return isinstance(items, int) or _without_channels(items)
    return is_given(source) and (_is_shape(node) or _name(node) in ("numel", "nelement"))


def _is_property(node: Node) -> bool:
    """Whether a node reads a property of tensors that does not depend on their values."""
    compared = node.target in (operator.eq, operator.ne) and None in node.args
    return compared or _name(node) in _PROPERTIES


def _is_shape(node: Node) -> bool:
    """Whether a node is the shape of a tensor."""
    match node.op, node.target, *node.args[1:], *node.kwargs.values():
        case ("call_method", "size") | (_, builtins.getattr, "shape"):
            return True
    return False


def _name(node: Node) -> str:
    """The name of the method or function."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _without_channels(items: slice) -> bool:
    """Whether these items of a shape are sizes of positions only, not channels."""
    first = items.start
    return isinstance(first, int) and (first >= 2 or -2 <= first < 0) and items.step is None
