"""The kinds of `GraphModule` that dspfx returns, and how they are copied and pickled.

`fx.GraphModule` keeps one graph and only the submodules it names. Ours keep a graph for each mode,
all of the root's modules and tensors under their own names, and the few plain attributes that the
next verb needs. All of it survives `deepcopy` and `pickle`.
"""

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import fx, nn

from dspfx.errors import DspfxWarning, PrepareError
from dspfx.model.config import PrepareConfig
from dspfx.model.origin import Origin
from dspfx.model.rebuilt import REBUILDING, refuse
from dspfx.model.retracer import Retracer
from dspfx.passes.analysis.agreement import SizeFacts
from dspfx.passes.sandbox.calls import Call
from dspfx.passes.sandbox.sizes import Shapes
from dspfx.passes.sandbox.unwritten import UnwrittenModule

# where a module keeps what it owns
_STATE = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
# what others have registered to be called
_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)
# what is called instead of the `forward` of the class: no part of a graph
_FORWARD = frozenset(("forward", "_compiled_call_impl"))
_STANDS_FOR = "stands_for"
_ITEMS = ("__len__", "__iter__", "__getitem__", "__contains__", "__reversed__")


def _refuse_items(module: nn.Module, *_: Any) -> Any:
    raise TypeError(
        f"the items of {type(module).__name__} are not at hand: it has a graph, as a prepared, "
        "compact or narrow module does, which may call others"
    )


class TwoModeModule(fx.GraphModule):
    """A `GraphModule` with one graph for evaluation and one for training, often the same.

    Attributes:
        analysed: the last analysis of it, see `analyse_prepared`; no copy has it.
        frozen_modes: names of the modules that stay in evaluation mode, as frozen batch norms do
            where the model's own `train` says so.
    """

    carried: ClassVar[tuple[str, ...]] = ()
    graphs: dict[bool, fx.Graph]
    analysed: Any = None
    replaced: tuple[type[nn.Module], tuple[str, ...]] | None = None
    frozen_modes: frozenset[str] = frozenset()

    def __init__(self, root: nn.Module, graphs: dict[bool, fx.Graph], name: str) -> None:
        vars(self).update(graphs=graphs, analysed=None)  # `recompile` asks for them
        super().__init__(root, graphs[root.training], name)
        # adopt the whole root: modules no graph names, aliases, and the original order of keys
        vars(self).update({kind: copy.copy(vars(root)[kind]) for kind in (*_STATE, *_HOOKS)})

    def answer_for(self, module: nn.Module) -> None:
        """Pass for an instance of the class of `module`, which this replaces, with its attributes.

        The code around a child may use more of it than its `forward`, and ask for its class. Its
        parameters have their names, too, if it is a layer that has another name here.

        Raises:
            PrepareError: an attribute or method of `module` is called as one of this.
        """
        own = vars(nn.Module())
        plain = {name: value for name, value in vars(module).items() if name not in own}
        kinds = [c for c in type(module).__mro__ if issubclass(c, nn.Module)]
        defined = {name for c in kinds if c not in type(self).__mro__ for name in vars(c)}
        taken = defined.union(plain).intersection(_TAKEN)
        if taken:
            raise PrepareError(
                f"{type(module).__name__} has an attribute '{min(taken)}', and so does every "
                "prepared module; give it another name"
            )
        for name, parameter in module.named_parameters(recurse=False):
            self._parameters.setdefault(name, parameter)
        self._stand_for(type(module), plain)

    def copy_forwarding_from(self, other: "TwoModeModule") -> None:
        """Copy modes, hooks and the forwarding of attributes from `other`."""
        self.frozen_modes = other.frozen_modes
        vars(self).update({kind: copy.deepcopy(vars(other)[kind]) for kind in _HOOKS})
        stands_for = other.stands_for()
        if stands_for is not None:
            self._stand_for(*copy.deepcopy(stands_for))

    def stands_for(self) -> tuple[type[nn.Module], dict[str, Any]] | None:
        """The class of the module that this replaces, and its plain attributes as they are."""
        if self.replaced is None:
            return None
        kind, names = self.replaced
        return kind, {name: vars(self)[name] for name in names if name in vars(self)}

    def _stand_for(self, kind: type[nn.Module], plain: dict[str, Any]) -> None:
        names = [name for name in plain if name not in _FORWARD]
        self.replaced = kind, tuple(names)
        vars(self).update({name: plain[name] for name in names})
        own: Any = type(self)  # of this instance alone
        if issubclass(own, kind) or issubclass(kind, fx.GraphModule):
            return
        own.__bases__ = (*own.__bases__, kind)
        for name in (*_ITEMS, *REBUILDING):
            if hasattr(kind, name):
                setattr(own, name, _refuse_items if name in _ITEMS else refuse)

    def __bool__(self) -> bool:
        """Always true, as of a module that has no length."""
        return True

    def extra_repr(self) -> str:
        """Nothing: the layers that the user's class would describe may be gone."""
        return ""

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
        view = UnwrittenModule(self, self.graphs[False])
        try:
            for module in modes:
                module.training = False
            yield view.eval()
        finally:
            for module, mode in modes.items():
                module.training = mode
            self.graphs[False].owning_module = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        state = {kind: copy.deepcopy(vars(self)[kind], memo) for kind in (*_STATE, *_HOOKS)}
        evaluation = copy.deepcopy(self.graphs[False])
        same = self.graphs[True] is self.graphs[False]
        training = evaluation if same else copy.deepcopy(self.graphs[True])
        carried = {name: copy.deepcopy(value, memo) for name, value in self._carried().items()}
        graphs = {False: evaluation, True: training}
        twin: Self = self._rebuild(state, self.training, graphs, carried, type(self).__name__)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        # plain GraphModules know how to pickle a graph; pickle keeps what they share shared
        distinct = list(dict.fromkeys(self.graphs.values()))
        for graph in distinct:
            graph._tracer_cls = Retracer
        plain = [fx.GraphModule(self, graph, type(self).__name__) for graph in distinct]
        for graph in distinct:
            graph.owning_module = self
        state = {kind: vars(self)[kind] for kind in (*_STATE, *_HOOKS)}
        name = type(self).__name__
        return _unpickle, (self._kind(), plain, state, self.training, self._carried(), name)

    def _carried(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in (*self.carried, "frozen_modes")}
        return own | {_STANDS_FOR: self.stands_for()}

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
        stands_for = carried.pop(_STANDS_FOR)
        for attribute, value in carried.items():
            setattr(module, attribute, value)
        if stands_for is not None:
            module._stand_for(*stands_for)
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
        asked: how it was prepared.
        frozen: names of the layers that keep all their filters and inputs.
        left_alone: the layers that are not gated, and why.
        lines: the line of source that each node of the graphs comes from, where it is known.
        notes: what was decided without the user, for the report.
        origin: what else has to be known to prepare another module alike.
        other_sizes: further shapes of the tensors among `example_inputs` that the graph takes.
        size_facts: what is known of the graph from running it on these.
        samples: how many samples of the whole model the example inputs stand for. A part that
            reads frames, proposals or tokens as a batch may be prepared for a fraction of one.
        unfinished_pruning: what has begun to change it, is not done, and how far it has come.
        untraced: the modules inside that could not be traced, and are called whole.
        whole, outside: of the first of several parts, the model's inputs, and MACs around them.

    Example:
        >>> prepared = dspfx.prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)))
        >>> isinstance(prepared, dspfx.PreparedModule), isinstance(prepared, torch.fx.GraphModule)
        (True, True)
    """

    carried = (
        *("asked", "example_inputs", "frozen", "left_alone", "lines", "notes", "origin", "outside"),
        *("other_sizes", "size_facts", "samples", "unfinished_pruning", "untraced", "whole"),
    )
    example_inputs: tuple[Any, ...]
    asked: PrepareConfig
    frozen: frozenset[str]
    left_alone: dict[str, str]
    lines: dict[str, str]
    notes: tuple[str, ...]
    origin: Origin
    samples: float
    other_sizes: tuple[Shapes, ...] = ()
    size_facts: SizeFacts = SizeFacts()
    unfinished_pruning: tuple[tuple[str, str], ...] = ()
    untraced: tuple[str, ...] = ()
    whole: Call | None = None
    outside: int = 0


LEARNS_NOTHING = (
    "a compact model does not learn: its parameters take no gradients; train the prepared model, "
    "or dspfx.narrow(prepared), whose steps cost what is left of it, and convert again"
)


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
        quantization: of one from `dspfx.quantize`, where it is rounded and how; else None.

    Example:
        >>> prepared = dspfx.prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)))
        >>> isinstance(dspfx.convert(prepared), dspfx.CompactModule)
        True
    """

    carried = (
        *("blueprint", "difference", "example_inputs", "grouped_masks", "indices", "origin"),
        *("quantization", "summary"),
    )
    blueprint: Any
    difference: tuple[float, torch.dtype] | None
    example_inputs: tuple[Any, ...]
    grouped_masks: Any
    indices: dict[str, torch.Tensor]
    origin: Origin
    summary: Any
    quantization: Any = None

    def train(self, mode: bool = True) -> Self:
        """Switch to `mode`; a `DspfxWarning` where there is nothing that could be trained."""
        if mode and not any(parameter.requires_grad for parameter in self.parameters()):
            warnings.warn(LEARNS_NOTHING, DspfxWarning, stacklevel=2)
        return super().train(mode)


class NarrowModule(TwoModeModule):
    """What `dspfx.narrow` returns: the live part of a prepared model, to be trained.

    Attributes:
        origins: for every tensor of it that training changes, which elements of which tensor of
            the prepared model it holds, see `dspfx.training.narrow.provenance`.

    Example:
        >>> prepared = dspfx.prepare(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)))
        >>> isinstance(dspfx.narrow(prepared), dspfx.NarrowModule)
        True
    """

    carried = ("origins",)
    origins: dict[str, Any]


# names of attributes that mean what they mean here, whatever module one of these replaces
_TAKEN = frozenset(
    name
    for kind in (PreparedModule, CompactModule, NarrowModule)
    for name in (*dir(kind), *kind.carried, "_graph", "_code", "meta")
    if not name.startswith("__") and not hasattr(nn.Module, name)
)
