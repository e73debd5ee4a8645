"""Arguments that a part was prepared without, where the code around it is traced by torch.

Code that makes a mask leaves it out where it masks nothing, but cannot tell while it is traced, and
then gives the part one.

1. A part is not given it in a trace either, which is then of the same calls as without tracing.
2. That is right only where the mask follows from the sizes of the inputs: one that is made of their
   values may mask something next time. What its nodes are made of is looked up in the trace.
"""

import inspect
import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.node import Node

from dspfx.model.parts import compact_parts_of

_aten = torch.ops.aten
_OF_SIZES = frozenset([  # what tells of its first argument nothing but the shape and the type
    _aten.sym_size, _aten.sym_numel, _aten.ones_like, _aten.zeros_like, _aten.full_like,
    _aten.new_ones, _aten.new_zeros, _aten.new_full,
])  # fmt: skip


@dataclass(frozen=True)
class Withheld:
    """A tensor that a part would have been given for an argument that it was prepared without.

    Attributes:
        part: the path of the part.
        argument: its name.
        value: the tensor.
    """

    part: str
    argument: str
    value: Tensor


def absent_arguments(part: fx.GraphModule) -> frozenset[str]:
    """The names of the arguments that `part` checks to be None."""
    return frozenset(
        str(node.args[0].target)
        for node in part.graph.find_nodes(op="call_function", target=operator.is_)
        if isinstance(node.args[0], Node)
        and node.args[0].op == "placeholder"
        and node.args[1] is None
    )


@contextmanager
def withholding(model: nn.Module) -> Iterator[list[Withheld]]:
    """Withhold from the compact parts of `model` what they were prepared without.

    What is withheld is collected in the list. Outside a trace nothing may be: a part refuses it.
    """
    withheld: list[Withheld] = []
    with ExitStack() as hooks:
        for path, part in compact_parts_of(model):
            absent = absent_arguments(part)
            if not path or not absent:
                continue

            def without(
                called: nn.Module, args: Any, kwargs: Any, path: str = path, absent: Any = absent
            ) -> Any:
                bound = inspect.signature(called.forward).bind(*args, **kwargs)
                for name in sorted(absent & bound.arguments.keys()):
                    value = bound.arguments[name]
                    if isinstance(value, Tensor):
                        withheld.append(Withheld(path, name, value))
                        bound.arguments[name] = None
                return bound.args, bound.kwargs

            hooks.callback(part.register_forward_pre_hook(without, with_kwargs=True).remove)
        yield withheld


def made_of_values(program: ExportedProgram, count: int) -> list[int]:
    """Which of the last `count` outputs of `program` depend on values of its inputs."""
    specs = program.graph_signature.input_specs
    given = {spec.arg.name for spec in specs if spec.kind is InputKind.USER_INPUT}
    outputs: Any = program.graph.output_node().args[0]
    made = outputs[len(outputs) - count :]
    return [i for i, node in enumerate(made) if _reads_values(node, given)]


def _reads_values(output: Any, given: set[str]) -> bool:
    seen: set[Node] = set()
    left = [output] if isinstance(output, Node) else []
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder" and node.name in given:
            return True
        packet = getattr(node.target, "overloadpacket", None)
        read = node.all_input_nodes
        left += [n for n in read if packet not in _OF_SIZES or n is not node.args[0]]
    return False
