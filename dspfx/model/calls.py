"""How the modules of a model are called when it is: this decides which can be exchanged.

The model is run once in evaluation and, if it can be, in training mode, with hooks on all modules:

1. The arguments of the first call of each, in evaluation mode.
2. Whether it is called with nothing but inputs of the model: tensors that are such inputs, or any
   before a layer has run.
3. Whether a module inside it is called by code outside: such a module cannot be replaced by a
   graph, which that code would pass by.
4. Whether it is given a module, or calls one with weights, that is not inside it: that one may be
   exchanged by itself, and its weights are not those of a graph.
5. The linear layers whose outputs another layer reads, found by following gradients.
"""

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.layers.gated import GATED
from dspfx.passes.sandbox.calls import Call, evaluate, fresh, run
from dspfx.passes.sandbox.state import of_python
from dspfx.passes.tracing.patches import checkpoints_run_once
from dspfx.utils.pytree import leaves, map_leaves


@dataclass(frozen=True)
class Calls:
    """What happens inside a model.

    Attributes:
        first: the first call of every module, by its `id`.
        of_inputs: the `id` of the modules whose first call has inputs of the model alone.
        entered: the `id` of a module, and the name of one inside it that code outside calls.
        borrows: the `id` of a module, and the name of one outside of it that it is given or calls.
        followed: the names of the linear layers whose outputs another layer reads.
    """

    first: dict[int, Call] = field(default_factory=dict)
    of_inputs: set[int] = field(default_factory=set)
    entered: dict[int, str] = field(default_factory=dict)
    borrows: dict[int, str] = field(default_factory=dict)
    followed: frozenset[str] = frozenset()


def calls_of(root: nn.Module, inputs: Call) -> Calls:
    """What happens inside `root` when it is called with `inputs`; nothing of it changes."""
    calls = Calls(followed=_followed(root, inputs))
    _watch(root, inputs, calls)
    return calls


def has_weight(module: nn.Module) -> bool:
    """Whether `module` itself, apart from those inside, has a matrix or filters."""
    own = any(p.dim() > 1 for p in module.parameters(recurse=False))
    return own or isinstance(module, tuple(GATED))  # whose weight may be parametrised


def _watch(root: nn.Module, inputs: Call, calls: Calls) -> None:
    enclosing, names = _enclosing(root), {id(m): name for name, m in root.named_modules()}
    inside = {id(m): {id(inner) for inner in m.modules()} for m in root.modules()}
    weightless = {id(m) for m in root.modules() if not any(map(has_weight, m.modules()))}
    active: list[int] = []
    images: set[int] = set()  # where the inputs of the model are in memory
    ran: list[int] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        key, call = id(module), Call(args, kwargs)
        for outer in enclosing[key].difference(active):
            calls.entered.setdefault(outer, names[key])
        for caller in active if key not in weightless else ():
            if key not in inside[caller]:
                calls.borrows.setdefault(caller, names[key])
        for given in leaves((args, kwargs)):
            if isinstance(given, nn.Module) and id(given) not in inside[key]:
                calls.borrows.setdefault(key, names.get(id(given), type(given).__name__))
        active.append(key)
        if root.training:
            return
        places = {_place(x) for x in _floating(call)}
        if module is root:
            images.update(places)
        if key not in calls.first:
            calls.first[key] = call.map(fresh)
            if not ran or places <= images:
                calls.of_inputs.add(key)

    def after(module: nn.Module, *_: Any) -> None:
        del active[len(active) - 1 - active[::-1].index(id(module)) :]
        if has_weight(module):
            ran.append(id(module))

    with ExitStack() as hooks, torch.random.fork_rng(devices=[]):
        for module in of_python(root):
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            hooks.callback(handle.remove)
            hooks.callback(module.register_forward_hook(after, always_call=True).remove)
        evaluate(root, inputs)
        active.clear()
        with suppress(Exception):  # where it wants targets, for instance
            run(root, inputs, training=True)


def _enclosing(root: nn.Module) -> dict[int, frozenset[int]]:
    """The modules that every path from `root` to a module goes through, by their `id`."""
    named = dict(root.named_modules(remove_duplicate=False))
    found: dict[int, frozenset[int]] = {}
    for name, module in named.items():
        path = name.split(".") if name else []
        outer = frozenset(id(named[".".join(path[:i])]) for i in range(1, len(path)))
        found[id(module)] = found.get(id(module), outer) & outer
    return found


def _floating(call: Call) -> Iterator[Tensor]:
    for x in leaves((call.args, call.kwargs)):
        if isinstance(x, Tensor) and x.is_floating_point():
            yield x


def _place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr() if x.layout == torch.strided else id(x)


def _followed(root: nn.Module, inputs: Call) -> frozenset[str]:
    """See `Calls`; none where `root` does not run with gradients."""
    names = {id(m): name for name, m in root.named_modules() if isinstance(m, nn.Linear)}
    made: dict[Any, str] = {}  # by which linear layer, each node of the graph of gradients
    seen: set[Any] = set()
    found: set[str] = set()

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nodes = [x.grad_fn for x in _floating(Call(args, kwargs))]
        while nodes:
            node = nodes.pop()
            if node in made:
                found.add(made[node])
            elif node is not None and node not in seen:
                seen.add(node)
                nodes += [earlier for earlier, _ in node.next_functions]

    def mark(module: nn.Module, _: Any, outputs: Any) -> Any:
        def with_gradient(x: Any) -> Any:
            if not (isinstance(x, Tensor) and x.is_floating_point()):
                return x
            x = x + x.new_zeros((), requires_grad=True)
            made[x.grad_fn] = names[id(module)]
            return x

        return map_leaves(with_gradient, outputs)

    with ExitStack() as hooks, checkpoints_run_once():
        for module in filter(has_weight, of_python(root)):
            handle = module.register_forward_pre_hook(look, with_kwargs=True)
            hooks.callback(handle.remove)
            if id(module) in names:
                hooks.callback(module.register_forward_hook(mark).remove)
        try:
            run(root, inputs, gradients=True)
        except Exception:
            return frozenset()
    return frozenset(found)
