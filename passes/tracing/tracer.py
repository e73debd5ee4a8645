"""Concrete tracing: an `fx` tracer that executes the model while it records the graph.

Every proxy holds the value that it has with the example inputs (`proxy`), and the code is
specialised to what it asks of them (`guards`).
"""

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from threading import Event
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Proxy
from torch.fx.node import Node
from torch.nn.utils import parametrize

from dspfx.layers.gated import GatedLayer
from dspfx.layers.gates import ChannelGate
from dspfx.passes.analysis import operators
from dspfx.passes.sandbox.calls import fresh
from dspfx.passes.sandbox.randomness import generators_kept, generators_of, nothing_drawn
from dspfx.passes.sandbox.state import only_reads, runs_torch_alone
from dspfx.passes.tracing.aliases import WRITTEN, WRITTEN_INPUT, Aliases
from dspfx.passes.tracing.autograd import OwnGradients
from dspfx.passes.tracing.buffer_writes import BufferWrites, write_back
from dspfx.passes.tracing.frames import line_under_way
from dspfx.passes.tracing.guards import Guards, is_given, is_item, takes_out
from dspfx.passes.tracing.int_calls import ints_traced
from dspfx.passes.tracing.leaf_arguments import LeafArguments
from dspfx.passes.tracing.patches import patched
from dspfx.passes.tracing.proxy import PLAIN, ConcreteProxy, value_of
from dspfx.passes.tracing.refusals import UntraceableError, blamed
from dspfx.passes.tracing.types_followed import FollowedTypes
from dspfx.passes.tracing.unrecorded import Unrecorded
from dspfx.passes.tracing.writes import Arguments, nodes_in
from dspfx.utils.pytree import construction, map_leaves

LINE = "line of source"  # a key of `Node.meta`


class ConcreteTracer(fx.Tracer):
    """A tracer that enters all modules except torch's own layers and those in `opaque`."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        inputs: Mapping[str, Any],
        types: FollowedTypes,
        opaque: frozenset[str] = frozenset(),
        leaves: frozenset[type] = frozenset(),
        ints: Set[CodeType] = frozenset(),
    ) -> None:
        super().__init__(param_shapes_constant=True)
        self.inputs = fresh(dict(inputs))
        for name in [name for name in inputs if name.startswith("**")]:
            self.inputs |= self.inputs.pop(name)
        self.opaque = opaque
        self.leaves = leaves
        self.executing = False
        self.guards = Guards(self._call, self._check, self._line)
        self.unrecorded = Unrecorded(lambda x: self.create_proxy("call_method", "detach", (x,), {}))
        self.own_gradients = OwnGradients(self._as_leaf)
        self.aliases = Aliases()
        self.constants: dict[int, Tensor] = {}  # of buffers that code has made, by their `id`
        self.leaf_arguments: LeafArguments | None = None  # of the last leaf
        self.types, self.ints = types, ints  # the code whose calls of `int` are traced
        self.calls_int: set[CodeType] = set()  # that which has called it of a proxy
        self.failed_in: str | None = None
        self.mode_read = Event()  # set where code does
        self.modules = [""]  # the paths of those whose code is running, the innermost last

    def trace_concretely(self, root: nn.Module) -> fx.Graph:
        """The graph of `root`.

        Raises:
            UntraceableError: with the innermost submodule whose code could not be traced.
        """
        leaves = {path for path, module in root.named_modules() if type(module) in self.leaves}
        self.generators = generators_of(root)
        self.buffers = buffers = BufferWrites(root, leaves | self.opaque)
        try:
            with (
                torch.enable_grad(),
                torch.random.fork_rng(devices=[]),
                generators_kept(),
                ints_traced(self.ints),
                self.types.reads_noticed(self.read_type),
                patched(
                    *(self._call, self._call_method, root.training),
                    *(lambda: not self.executing, self.mode_read.set),
                ),
                nothing_drawn(self.generators),
            ):
                graph = self.trace(root)
                for given in self.aliases.overwritten_inputs():
                    given.meta[WRITTEN_INPUT] = True
        except Exception as error:
            nodes = list(self.graph.nodes) if hasattr(self, "graph") else []
            last = nodes[-1].name if nodes else ""
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            module = blamed(error, self.failed_in) or ""
            raise UntraceableError(module, last, reason[:300]) from error
        finally:
            assigned = buffers.take_back()
        if (name := buffers.remembered(graph, assigned, evaluation=not root.training)) is not None:
            reason = f"what it computes depends on earlier calls, by way of its buffer '{name}'"
            raise UntraceableError(name.rpartition(".")[0], name, reason)
        write_back(graph, assigned, self.unrecorded.nodes)
        graph._tracer_cls = None
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Torch's layers, gates, layers with computed weights, TorchScript, and what is opaque."""
        return (
            module_qualified_name in self.opaque
            or type(m) in self.leaves
            or operators.named(type(m)) in operators.LEAVES
            or isinstance(m, GatedLayer | ChannelGate | torch.jit.ScriptModule)
            or parametrize.is_parametrized(m)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The inputs of the graph: one for every argument that the example gives or may leave out.

        Every keyword that `**` collects becomes an input of its own.
        """
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        named = {p.name for p in parameters}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter in parameters:
            match parameter.kind:
                case inspect.Parameter.VAR_POSITIONAL:
                    args += list(self.create_proxy("placeholder", f"*{parameter.name}", (), {}))
                case inspect.Parameter.VAR_KEYWORD:
                    collected = [k for k in self.inputs if k not in named and k[0] != "*"]
                    kwargs |= {key: self._input(key, (None,)) for key in collected}
                case inspect.Parameter.KEYWORD_ONLY:
                    kwargs[parameter.name] = self._argument(parameter)
                case _:
                    args.append(self._argument(parameter))
        return lambda root: root_fn(root, *args, **kwargs), [self.root]

    def _argument(self, parameter: inspect.Parameter) -> Any:
        """An input, or the default of one that is left out and cannot be checked."""
        default = parameter.default
        if parameter.name not in self.inputs and not isinstance(default, PLAIN):
            return default
        return self._input(parameter.name, () if default is parameter.empty else (default,))

    def _input(self, name: str, default: tuple[Any, ...]) -> Any:
        """A proxy; for a plain value that code may branch on, the value, and a guard."""
        proxy = self.create_proxy("placeholder", name, default, {})
        value = proxy.concrete
        if isinstance(value, Tensor):
            self.guards.inputs.append(proxy)
        if name in self.inputs and not isinstance(value, str | bool | None):
            return proxy
        same = operator.is_ if value is None else operator.eq
        reason = f"with {name}={value!r} and cannot be called otherwise"
        asked = self._call(same, proxy, value)
        asked.node.meta["is_wrapped"] = True  # or fx would answer it when it is unpickled
        self._check(asked, reason)
        return value

    def _check(self, condition: Any, reason: str) -> Any:
        return self._call(torch._assert, condition, f"the model was prepared {reason}")

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.create_proxy("call_function", function, args, kwargs)

    def _call_method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.create_proxy("call_method", name, args, kwargs)

    def _as_leaf(self, function: Callable[[Any], Any], given: Any, torchs: bool = False) -> Any:
        """The result of `function` on the values of its arguments; nothing in it is traced."""
        outside, self.executing = self.executing, True
        try:
            with nullcontext() if torchs else generators_kept(self.generators):
                return function(map_leaves(value_of, given))
        finally:
            self.executing = outside

    def _line(self) -> str:
        return line_under_way(ConcreteTracer.trace_concretely.__code__)

    def create_arg(self, a: Any) -> Any:
        """A proxy is passed on as it is; containers of classes of their own are built by a node."""
        if type(a) is not ConcreteProxy:
            return super().create_arg(a) if (made := construction(a)) is None else self._make(*made)
        if a.tracer is not self:
            raise TypeError(f"'{a.node.name}' is remembered from an earlier call, or copied")
        return self.unrecorded.read(a).node

    def _make(self, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = self._call(kind, *args, **kwargs)
        made.node.meta["is_wrapped"] = True  # or it would be made of fx's proxies when unpickled
        return made.node

    def proxy(self, node: Node) -> Proxy:
        """A proxy for `node`; `create_proxy` gives it its value."""
        return ConcreteProxy(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any
    ) -> Any:
        """Record the call, and make it."""
        if kwargs.get("out") is not None:
            raise TypeError("'out=' is written")
        if kwargs.get("generator") is not None:
            raise TypeError("it draws from a generator of its own")
        self.own_gradients.refuse()
        if not torch.is_grad_enabled() and operators.overwrites(kind, target):
            args = self.unrecorded.written(*args)
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        assert isinstance(proxy, ConcreteProxy)
        line = self._line()
        if line:
            proxy.node.meta[LINE] = line
        called = self.root.get_submodule(target) if kind == "call_module" else None
        own_code = called is not None and not operators.is_torchs(called)
        arguments = Arguments((args, kwargs), copied=own_code)
        self.leaf_arguments = None
        proxy.concrete = self._execute(kind, target, args, kwargs)
        given = self.leaf_arguments
        if written := arguments.overwritten():
            self._note_writes(proxy.node, written)
        self.aliases.note(proxy)
        self.guards.note(proxy, args, kwargs)
        if is_given(proxy.node):
            self.aliases.note_input(proxy)
        self.unrecorded.note(proxy.node)
        self.guards.passed_on(proxy.node)
        if given is not None:
            given.write_back(proxy, args)
        if proxy.concrete is None and takes_out(proxy.node):
            self.guards.guard_none(proxy)
            return None
        return self._item(proxy) if is_item(proxy.node) else proxy

    def _note_writes(self, node: Node, written: list[Any]) -> None:
        """Record that the call `node` has overwritten the values `written`."""
        for value in written:
            if isinstance(value, Tensor):
                raise TypeError(f"'{node.name}' writes into a tensor that the code has made")
            if not torch.is_grad_enabled():
                self.unrecorded.refuse(value)
        node.meta[WRITTEN] = [value.node for value in written]
        becomes = operators.overwritten(node, self.root)
        self.aliases.overwritten(node, written, becomes, self.modules[-1])

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """Create a node, perhaps the output, and check that it reads no stale value."""
        node = super().create_node(*args, **kwargs)
        self.aliases.check(node)
        return node

    def _item(self, proxy: ConcreteProxy) -> Any:
        """An item of an input, guarded to be there, which `dict.get` leaves open."""
        if proxy.node.target is not operator.getitem:
            self.guards.guard_kind(proxy)
        if isinstance(proxy.concrete, Tensor):
            self.guards.inputs.append(proxy)
        return proxy

    def read_value(self, proxy: ConcreteProxy, frame: FrameType) -> None:
        """Code in `frame` reads the value of `proxy`."""
        if not self.executing:
            self.guards.guard_number(proxy, frame)

    def read_items(self, container: ConcreteProxy, frame: FrameType) -> None:
        """Code in `frame` reads the number of items of a container, or its keys."""
        if not self.executing:
            self.guards.guard_items(container, frame)

    def read_type(self, parameter: nn.Parameter, name: str) -> Any:
        """Code reads the type or the device of a parameter."""
        own = getattr(parameter.data, name)
        return own if self.executing else self.types.value(self.create_proxy, parameter, name)

    def read_rank(self) -> None:
        """Code reads the number of dimensions of a tensor."""
        if not self.executing:
            self.guards.guard_ranks()

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace a call of `m`, or just make it where a leaf is being run.

        A module that code has only just made, as `nn.ReLU()` or a slice of an `nn.Sequential`, has
        no name; what it computes is traced, down to functions and its children.
        """
        if self.executing or m not in (self.submodule_paths or ()):
            return forward(*args, **kwargs)
        watched = nullcontext() if only_reads(m) else nothing_drawn(self.generators)
        try:
            with watched, self._inside(m):
                result = super().call_module(m, forward, args, kwargs)
                self.aliases.check_returned(nodes_in(result), self.modules[-1])
            return result
        except Exception as error:
            if self.failed_in is None:
                self.failed_in = blamed(error, self.path_of_module(m))
            raise

    @contextmanager
    def _inside(self, module: nn.Module) -> Iterator[None]:
        """Mark the code of `module` as running, if it is traced."""
        path = self.path_of_module(module)
        traced = not self.is_leaf_module(module, path)
        self.modules.append(path if traced else self.modules[-1])
        try:
            yield
        finally:
            self.modules.pop()

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers are proxies, but not inside a leaf that is being run."""
        if self.executing or type(attr_val) is ConcreteProxy:
            return attr_val
        if type(attr_val) is Tensor and self.buffers.is_new(attr_val):
            return self.constants.setdefault(id(attr_val), attr_val.clone())
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _execute(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return self.inputs.get(target, args[0] if args else ())

        def make(values: Any) -> Any:
            args, kwargs = values
            if kind == "get_attr":
                return operator.attrgetter(target)(self.root)
            with torch.inference_mode(mode=False), torch.no_grad():
                if kind == "call_module":
                    self.leaf_arguments = LeafArguments(args, kwargs)
                    result = self.root.get_submodule(target)(*args, **kwargs)
                    self.leaf_arguments.returned()
                    return result
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                return target(*args, **kwargs)

        return self._as_leaf(make, (args, kwargs), torchs=runs_torch_alone(self.root, kind, target))
