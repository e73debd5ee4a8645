"""Types and devices of parameters, which code reads, as values of its graph.

`next(self.parameters()).dtype` is another one once the model is in another type or elsewhere. So
the root gets an empty buffer, outside the `state_dict`, for each type and device of its parameters;
it goes wherever they go, and a graph asks it. A parameter cannot be asked: it may be cut, or gone.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from dspfx.passes.tracing.frames import is_machinery

PREFIX = "type_of_parameters"
FOLLOWED = ("dtype", "device")


class FollowedTypes:
    """The buffers of `root`, which it is given, and what reads them.

    Args:
        root: a private copy, about to be traced.
        follow: whether they are read; else types and devices are constants of the graph.
    """

    def __init__(self, root: nn.Module, follow: bool) -> None:
        self.root, self.follow = root, follow
        self.names: dict[tuple[torch.dtype, torch.device], str] = {}
        for p in root.parameters() if follow else ():
            if p.is_floating_point() and (p.dtype, p.device) not in self.names:
                name = PREFIX
                while hasattr(root, name):
                    name += "_"
                example = torch.empty(0, dtype=p.dtype, device=p.device)
                root.register_buffer(name, example, persistent=False)
                self.names[p.dtype, p.device] = name

    def remove_unread(self, graphs: Iterable[fx.Graph]) -> None:
        """Take those that none of `graphs` reads from the root."""
        read = {node.target for graph in graphs for node in graph.find_nodes(op="get_attr")}
        for name in set(self.names.values()) - read:
            delattr(self.root, name)

    @contextmanager
    def reads_noticed(self, read: Callable[[nn.Parameter, str], Any]) -> Iterator[None]:
        """Context: what code gets that reads type or device of a parameter is from `read`."""

        def noticed(name: str) -> property:
            own = getattr(torch.Tensor, name)

            def get(parameter: nn.Parameter) -> Any:
                asked = parameter.is_floating_point() and not is_machinery(sys._getframe(1))
                return read(parameter, name) if asked else own.__get__(parameter)

            return property(get)

        kind: Any = type("Parameter", (nn.Parameter,), {name: noticed(name) for name in FOLLOWED})
        parameters: list[Any] = [p for p in self.root.parameters() if type(p) is nn.Parameter]
        parameters = parameters if self.follow else []
        for parameter in parameters:
            parameter.__class__ = kind
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.__class__ = nn.Parameter

    def value(self, create: Callable[..., Any], parameter: nn.Parameter, name: str) -> Any:
        """A proxy of the type or device of `parameter`, by a `create_proxy` of a tracer."""
        dtype, device = parameter.data.dtype, parameter.data.device
        example = create("get_attr", self.names[dtype, device], (), {})
        return create("call_function", getattr, (example, name), {}, name=f"its_{name}")
