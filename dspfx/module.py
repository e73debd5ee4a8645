"""The kinds of `GraphModule` that dspfx returns, and how they are copied and pickled.

`fx.GraphModule` keeps one graph and only the submodules it names. Ours keep one graph for each
mode, every submodule, parameter and buffer of the root under its own name, and the few plain
attributes that the next verb needs. All of it survives `deepcopy` and `pickle`.
"""

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import fx, nn

from dspfx.config import PrepareConfig
from dspfx.origin import Origin
from dspfx.passes.agreement import SizeFacts
from dspfx.passes.sizes import Shapes

# where a module keeps what it owns
_STATE = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
_CARRIED = ("frozen_modes", "stands_for")


class _Retracer(fx.Tracer):
    """How pickle reads a graph back: buffers are what they were, not constants."""

    proxy_buffer_attributes = True


class TwoModeModule(fx.GraphModule):
    """A `GraphModule` with one graph for evaluation and one for training, often the same.

    Attributes:
        frozen_modes: names of the modules that stay in evaluation mode, as frozen batch norms do
            where the model's own `train` says so.
    """

    carried: ClassVar[tuple[str, ...]] = ()
    graphs: dict[bool, fx.Graph]
    stands_for: tuple[type[nn.Module], dict[str, Any]] | None = None
    frozen_modes: frozenset[str] = frozenset()

    def __init__(self, root: nn.Module, graphs: dict[bool, fx.Graph], name: str) -> None:
        vars(self)["graphs"] = graphs  # `recompile` asks for them
        super().__init__(root, graphs[root.training], name)
        # adopt the whole root: modules no graph names, aliases, and the original order of keys
        vars(self).update({kind: copy.copy(vars(root)[kind]) for kind in _STATE})

    def answer_for(self, module: nn.Module) -> None:
        """Let the methods and plain attributes of `module`, which this stands for, be found here.

        The code around a child may use more of it than its `forward`.
        """
        own = vars(nn.Module())
        plain = {name: value for name, value in vars(module).items() if name not in own}
        self.stands_for = type(module), plain

    def answer_like(self, other: "TwoModeModule") -> None:
        """Be found to have what `other` has beyond its graphs."""
        self.stands_for = copy.deepcopy(other.stands_for)
        self.frozen_modes = other.frozen_modes

    def __getattr__(self, name: str) -> Any:
        stands_for = vars(self).get("stands_for")
        if stands_for is not None:
            kind, plain = stands_for
            if name in plain:
                return plain[name]
            found = inspect.getattr_static(kind, name, None)
            if hasattr(found, "__get__") and not hasattr(nn.Module, name):
                return found.__get__(self, kind)
        return super().__getattr__(name)

    def train(self, mode: bool = True) -> Self:
        """Switch every submodule to `mode`, and to the graph of that mode."""
        nn.Module.train(self, mode)
        for name, module in self.named_modules() if self.frozen_modes else ():
            module.training = mode and name not in self.frozen_modes
        if self.graph is not self.graphs[mode]:
            self.graph = self.graphs[mode]
        return self

    def recompile(self) -> Any:
        """Write the code of the present graph, which is found wherever `forward` was put.

        Accelerate, for instance, wraps the `forward` that it finds, and calls it in both modes.
        """
        code = super().recompile()
        if self.graphs[True] is not self.graphs[False]:
            kind: Any = type(self)  # an own one of this instance
            kind.forward_of_mode = kind.forward

            @functools.wraps(kind.forward)
            def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
                if module.training:  # asked so that `torch.compile` traces each mode by itself
                    return module.forward_of_mode(*args, **kwargs)
                return module.forward_of_mode(*args, **kwargs)

            kind.forward = forward
        return code

    @contextmanager
    def evaluation_view(self) -> Iterator[fx.GraphModule]:
        """The evaluation graph over the same submodules, all in evaluation mode for a while."""
        modes = {module: module.training for module in self.modules()}
        view = fx.GraphModule(self, self.graphs[False])
        try:
            for module in modes:
                module.training = False
            yield view.eval()
        finally:
            for module, mode in modes.items():
                module.training = mode
            self.graphs[False].owning_module = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        state = {kind: copy.deepcopy(vars(self)[kind], memo) for kind in _STATE}
        evaluation = copy.deepcopy(self.graphs[False])
        same = self.graphs[True] is self.graphs[False]
        training = evaluation if same else copy.deepcopy(self.graphs[True])
        carried = {name: copy.deepcopy(value, memo) for name, value in self._carried().items()}
        graphs = {False: evaluation, True: training}
        name = type(self).__name__
        twin: Self = self._rebuild(state, self.training, graphs, carried, name)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        # plain GraphModules know how to pickle a graph; pickle keeps what they share shared
        distinct = list(dict.fromkeys(self.graphs.values()))
        for graph in distinct:
            graph._tracer_cls = _Retracer
        plain = [fx.GraphModule(self, graph, type(self).__name__) for graph in distinct]
        for graph in distinct:
            graph.owning_module = self
        state = {kind: vars(self)[kind] for kind in _STATE}
        name = type(self).__name__
        return _unpickle, (self._kind(), plain, state, self.training, self._carried(), name)

    def _carried(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*self.carried, *_CARRIED)}

    @classmethod
    def _kind(cls) -> "type[TwoModeModule]":
        """The class as written: fx gives every instance a class of its own."""
        return next(c for c in cls.__mro__ if c.__module__ == __name__)

    @classmethod
    def _rebuild(
        cls,
        state: dict[str, Any],
        training: bool,
        graphs: dict[bool, fx.Graph],
        carried: dict[str, Any],
        name: str,
    ) -> Any:
        root = nn.Module()
        vars(root).update(state)
        root.training = training
        kind = cls._kind()
        module = kind.__new__(kind)
        TwoModeModule.__init__(module, root, graphs, name)
        for attribute, value in carried.items():
            setattr(module, attribute, value)
        return module


def _unpickle(
    kind: type[TwoModeModule],
    plain: list[fx.GraphModule],
    state: dict[str, Any],
    training: bool,
    carried: dict[str, Any],
    name: str,
) -> Any:
    graphs = {False: plain[0].graph, True: plain[-1].graph}
    return kind._rebuild(state, training, graphs, carried, name)


class PreparedModule(TwoModeModule):
    """What `dspfx.prepare` returns: the user's model, traced and gated.

    Attributes:
        example_inputs: positional inputs of the shapes the model was prepared for.
        config: how it was prepared.
        frozen: names of the layers that keep all their filters and inputs.
        left_alone: the layers that are not gated, and why.
        lines: the line of source that each node of the graphs comes from, where it is known.
        notes: what was decided without the user, for the report.
        origin: what else has to be known to prepare another module alike.
        other_sizes: further shapes of the tensors among `example_inputs` that the graph takes.
        size_facts: what is known of the graph from running it on these.
        samples: how many samples of the whole model the example inputs stand for. A part that
            reads frames, proposals or tokens as a batch may be prepared for a fraction of one.
    """

    carried = (
        *("example_inputs", "config", "frozen", "left_alone", "lines", "notes", "origin"),
        *("other_sizes", "size_facts", "samples"),
    )
    example_inputs: tuple[Any, ...]
    config: PrepareConfig
    frozen: frozenset[str]
    left_alone: dict[str, str]
    lines: dict[str, str]
    notes: tuple[str, ...]
    origin: Origin
    samples: float
    other_sizes: tuple[Shapes, ...] = ()
    size_facts: SizeFacts = SizeFacts()


class CompactModule(TwoModeModule):
    """What `dspfx.convert` returns: an ordinary inference graph of standard operators.

    Attributes:
        example_inputs: positional inputs of the shapes the model was prepared for.
        summary: what became of every layer, see `dspfx.report`.
        difference: the largest relative difference from the masked model that verification
            found, and the type it ran in; None if it was not asked for.
        blueprint: how it is built from the user's module, see `Blueprint`.
        grouped_masks: of its gated layers, for the picture in its report.
        indices: buffers of the prepared module that may say where channels go.
        origin: see `PreparedModule`.
    """

    carried = (
        *("blueprint", "difference", "example_inputs", "grouped_masks", "indices", "origin"),
        "summary",
    )
    blueprint: Any
    difference: tuple[float, torch.dtype] | None
    example_inputs: tuple[Any, ...]
    grouped_masks: Any
    indices: dict[str, torch.Tensor]
    origin: Origin
    summary: Any


class NarrowModule(TwoModeModule):
    """What `dspfx.narrow` returns: the living part of a prepared model, to be trained.

    Attributes:
        origins: for every tensor of it that training changes, which elements of which tensor of
            the prepared model it holds, see `dspfx.elements`.
    """

    carried = ("origins",)
    origins: dict[str, Any]
