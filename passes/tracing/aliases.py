"""Alias tracking: an in-place write makes every other value in the same memory stale.

A node of a graph is one value. Code that overwrites part of a value through a view and then reads
or returns the whole, or overwrites the whole and then reads a view, has no such graph:

    y = x[:, 0]; y += 1; return x      # refused: `x` is stale
    y = x[:, 0]; y = y + 1; return x   # fine

The inputs count as read by the caller when the call has ended.
"""

import operator
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node

from dspfx.utils.pytree import leaves

WRITTEN = "nodes whose tensors the call overwrote"  # a key of `Node.meta`
WRITTEN_INPUT = "code overwrites this input"  # another
_SIZES = ("size", "dim", "numel")
_VIEWS = ("data", "T", "mT", "H", "mH", "real", "imag", "grad")  # attributes that hold elements


class StaleValueError(TypeError):
    """A value is read that was overwritten under another name, by the code of `module`."""

    def __init__(self, value: str, written: str, module: str) -> None:
        super().__init__(
            f"'{value}' is read or returned after '{written}', which shares its memory, was "
            "overwritten; overwrite a `clone()`"
        )
        self.module = module


@dataclass(frozen=True)
class _Write:
    """The value that was overwritten, and the path of the module whose code did so."""

    value: str
    module: str


@dataclass(frozen=True)
class _Input:
    """A tensor that the model was given: as it was, the nodes of it and of what it lies in."""

    tensor: Tensor
    version: int
    shape: torch.Size
    nodes: list[Node]
    containers: list[Node]


class Aliases:
    """The values of one trace, by the memory that they share."""

    def __init__(self) -> None:
        self._seen: dict[int, list[tuple[weakref.ref[Any], Any]]] = defaultdict(list)
        self._stale: dict[Node, dict[Any, _Write]] = defaultdict(dict)
        self._version_of: dict[Node, Node] = {}  # what overwrote a value -> the value
        self._inputs: dict[int, _Input] = {}

    def note(self, proxy: Any) -> None:
        """Record the memory of the tensors of `proxy`, a new one."""
        if proxy.node.op == "get_attr":
            return  # parameters and buffers: see `buffer_writes`
        for item, tensor in _tensors(proxy.concrete):
            if place := _place(tensor):
                alive = [known for known in self._seen[place] if known[0]() is not None]
                self._seen[place] = [*alive, (weakref.ref(proxy), item)]

    def overwritten(self, node: Node, written: list[Any], before: Node | None, module: str) -> None:
        """Record that all other values in the memory of the values `written` are stale.

        Their own earlier versions are not: readers of one of these read the new version.

        Args:
            node: the call that overwrote them.
            written: their proxies.
            before: the value that has become `node`, if one of them has.
            module: the path of the module whose code made the call.
        """
        if before is not None:
            self._version_of[node] = before
        read = {proxy.node for proxy in written}.intersection(node.all_input_nodes)
        own = {version for each in read for version in self._versions_of(each)}
        for proxy in written:
            for _, tensor in _tensors(proxy.concrete):
                for other, item in self._sharing(tensor):
                    if other.node not in own or item is not None:
                        write = _Write(proxy.node.name, module)
                        self._stale[other.node].setdefault(item, write)

    def put_back(self, whole: Any, key: Any, part: Any) -> None:
        """Code is about to do `whole[key] = part`: fine after `part = whole[key]; part += 1`."""
        before = self._version_of.get(part.node) if hasattr(part, "node") else None
        write = self._stale.get(whole.node, {}).get(None)
        if before is None or write is None or write.value != before.name:
            return
        there, tensor = whole.concrete[key], part.concrete
        same = there.data_ptr() == tensor.data_ptr() and there.shape == tensor.shape
        if same and there.stride() == tensor.stride():
            del self._stale[whole.node][None]

    def check(self, node: Node) -> None:
        """Check the values that a new node reads.

        Raises:
            StaleValueError: one was overwritten through another.
        """
        if node.target in _SIZES:
            return
        item = node.args[1] if node.target in (getattr, operator.getitem) else None
        for read in node.all_input_nodes:
            for key, write in self._stale.get(read, {}).items():
                asks = node.target is getattr and key is None and item not in _VIEWS
                another = node.target is operator.getitem and _differ(key, item)
                if not asks and not another:
                    raise StaleValueError(read.name, write.value, write.module)

    def check_returned(self, returned: Iterable[Node], module: str) -> None:
        """Check the values that the code of `module`, empty for the root, returns.

        Raises:
            StaleValueError: that code has overwritten one through another.
        """
        for node in returned:
            for write in self._stale.get(node, {}).values():
                if not module or f"{write.module}.".startswith(f"{module}."):
                    raise StaleValueError(node.name, write.value, write.module)

    def note_input(self, proxy: Any) -> None:
        """Record the tensors of `proxy`, an input or an item of one, as they are."""
        for item, x in _tensors(proxy.concrete):
            if not x.is_inference():
                known = self._inputs.setdefault(id(x), _Input(x, x._version, x.shape, [], []))
                (known.nodes if item is None else known.containers).append(proxy.node)

    def overwritten_inputs(self) -> list[Node]:
        """The tensors among the inputs that code has overwritten.

        Raises:
            StaleValueError: through a view.
            TypeError: one has another shape now.
        """
        found = []
        for known in self._inputs.values():
            if known.tensor._version == known.version:
                continue
            if known.tensor.shape != known.shape:
                raise TypeError(f"the shape of the input '{known.nodes[0]}' is changed in place")
            whole = [node for node in known.nodes if not self._stale.get(node)]
            if not whole:
                self.check_returned(known.nodes + known.containers, "")
            found += whole[:1]
        return found

    def _sharing(self, tensor: Tensor) -> Iterator[tuple[Any, Any]]:
        """The proxies that are alive, and which item of each, with an element of `tensor`."""
        for known, item in self._seen.get(_place(tensor), ()):
            proxy = known()
            if proxy is not None:
                own = [t for key, t in _tensors(proxy.concrete) if key == item]
                if any(_place(t) == _place(tensor) and _overlap(tensor, t) for t in own):
                    yield proxy, item

    def _versions_of(self, node: Node) -> set[Node]:
        """`node` and the nodes of its earlier versions, before it was overwritten."""
        found = {node}
        while node in self._version_of:
            node = self._version_of[node]
            found.add(node)
        return found


def _tensors(value: Any) -> Iterator[tuple[Any, Tensor]]:
    """The tensors of a value, each with the item of a container that it lies in, None of none."""
    if isinstance(value, Tensor):
        yield None, value
        return
    items: Iterable[tuple[Any, Any]] = [("", value)]
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    for key, item in items:
        for leaf in leaves(item):
            if isinstance(leaf, Tensor):
                yield key, leaf


def _differ(key: Any, item: Any) -> bool:
    """Whether these are two items of one container, for sure."""
    plain = isinstance(item, str) or (type(item) is int and item >= 0)
    return plain and key not in (None, item)


def _place(value: Any) -> int:
    """The address of the memory of a tensor; 0 if it has none."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
        return 0
    return value.untyped_storage().data_ptr()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors in the same memory have an element in common."""
    if one.dtype != other.dtype:
        return True
    elements = one.untyped_storage().nbytes() // one.itemsize
    used = torch.zeros(elements, dtype=torch.bool)
    used.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(used.as_strided(other.shape, other.stride(), other.storage_offset()).any())
