"""`narrow`: training that costs what is left of a network, not what it was.

A masked network computes all that the dense one does, and throws most of it away. A narrow one has
no dead channels, so that a step is as cheap as the channels are few, and is trained in its place:

1. It is what `convert` emits, but norms are not folded into layers, and tensors can be trained.
   Where the filters of a layer read different channels, the zeros that fill it up stay zero.
2. Which element of the prepared model each of its elements is, is found by emitting it once more,
   from a copy of the model whose tensors hold the numbers of their elements.
3. `widen` copies the elements to where they come from.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from dspfx.errors import NarrowError
from dspfx.layers.computed_weight import is_weighted
from dspfx.model.analysed import fitting_inputs
from dspfx.model.liveness import present_liveness
from dspfx.model.module import NarrowModule, PreparedModule
from dspfx.model.parts import Part, exchanged, parts_of, tensors_outside
from dspfx.model.tensors import named_tensors
from dspfx.passes.lowering.cost_model import CPU, CostModel
from dspfx.passes.transforms.compact import compact
from dspfx.passes.transforms.compacted import Compacted
from dspfx.passes.transforms.plan import plan
from dspfx.passes.transforms.training_graph import training_graph
from dspfx.passes.transforms.verify import verify as verify_equal
from dspfx.training.narrow.provenance import Elements, elements, numbered
from dspfx.training.narrow.trainable import copied_modules, make_trainable
from dspfx.utils.wrappers import unwrapped

NARROW = 0.4  # of the MACs: with more, a masked network trains as fast as what is alive of it
MEAN = "running_mean"
INSTEAD = "train the prepared model itself"


def narrow(prepared: nn.Module, *, verify: bool = True, cost_model: CostModel = CPU) -> nn.Module:
    """What is alive of a pruned model, to be trained in its place; `prepared` is left as it is.

        narrow = dspfx.narrow(prepared)
        optimizer = torch.optim.SGD(narrow.parameters(), lr=0.01)
        ...                              # train it like any model
        dspfx.widen(narrow, prepared)    # and go on with the prepared one: prune, save, convert

    In either mode it computes what `prepared` does, and its gradients are those of the elements
    that it has. What is dead stays dead. Random layers, such as dropout, draw other numbers.

    Args:
        prepared: from `dspfx.prepare`, pruned.
        verify: run both on random inputs, in float64 where they allow it, and compare.
        cost_model: decides in which form layers are emitted whose filters read different channels.

    Returns:
        A `NarrowModule`, all its modules in the mode of those of `prepared`, that shares nothing
        with it. From a model prepared in parts, a copy of it whose parts are `NarrowModule`s.

    Raises:
        ConvertError: `prepared` does not come from `dspfx.prepare`.
        NarrowError: it calls other code in training than in evaluation, has hooks that see
            gradients, or weights are computed from others, complex, or used more than once and not
            for the same channels.
        EquivalenceError: the two differ; the message names the first node that does.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> report = dspfx.prune_channels(prepared, dspfx.Budget(macs=0.5))
        >>> narrow = dspfx.narrow(prepared.train())
        >>> optimizer = torch.optim.SGD(narrow.parameters(), lr=0.01)
        >>> narrow(x).square().mean().backward()
        >>> optimizer.step()
        >>> dspfx.widen(narrow, prepared)  # what was learned, for `convert`
    """
    prepared = unwrapped(prepared)
    parts = tuple(parts_of(prepared))
    _refuse_shared(prepared, parts)
    narrowed = {part.module: _narrow(part.module, verify, cost_model) for part in parts}
    return exchanged(prepared, narrowed)


def _narrow(prepared: PreparedModule, verify: bool, cost_model: CostModel) -> NarrowModule:
    analysis, live = present_liveness(prepared)
    with prepared.evaluation_view() as view:
        _refuse_untrainable(view)
        planned = plan(view, analysis, live, cost_model, fold=False)
        if verify:
            verify_equal(view, analysis, live, planned, fitting_inputs(prepared))
        compacted = compact(view, analysis, planned)
        twin, shapes = numbered(view)
        numbers = named_tensors(compact(twin, analysis, planned).root)
    _refuse_computed(compacted, named_tensors(view))
    origins = {
        name: found
        for name, tensor in numbers.items()
        if tensor.is_floating_point() and name not in compacted.computed
        if (found := elements(name, tensor, shapes)) is not None
    }
    origins |= _integers(compacted, view)
    _leave_out_constants(origins, compacted, view)
    _refuse_unequal_calls(origins, compacted, view)
    root = make_trainable(compacted, origins, prepared)
    training = training_graph(compacted, prepared, prepared.graphs)
    if training is None:
        raise NarrowError(
            f"{type(prepared).__name__} calls other code in training than in evaluation; {INSTEAD}"
        )
    graphs = {False: compacted.graph, True: training}
    module = NarrowModule(root, graphs, type(prepared).__name__)
    module.origins = origins
    module.copy_forwarding_from(prepared)
    return module


def _integers(compacted: Compacted, view: fx.GraphModule) -> dict[str, Elements]:
    """The integers of modules that were copied: how many batches a norm has seen, for instance."""
    names = {id(tensor): name for name, tensor in reversed(named_tensors(view).items())}
    found: dict[str, Elements] = {}
    present = {id(tensor): name for name, tensor in named_tensors(compacted.root).items()}
    for own, copied in copied_modules(compacted, view):
        theirs = named_tensors(own)
        for name, tensor in named_tensors(copied).items():
            if name not in theirs:  # what the graph calls may lie inside, by its own name
                continue
            if not tensor.is_floating_point() and tensor.shape == theirs[name].shape:
                found[present[id(tensor)]] = Elements.whole(names[id(theirs[name])], tensor)
    return found


def _leave_out_constants(
    origins: dict[str, Elements], compacted: Compacted, view: fx.GraphModule
) -> None:
    """Buffers that the graph reads itself stay what they are, and may be read several times.

    Statistics of a functional norm do not: training writes them.
    """
    wide = named_tensors(view)
    for node in compacted.graph.find_nodes(op="get_attr"):
        own = origins.get(str(node.target))
        if own is None or isinstance(wide[own.source], nn.Parameter):
            continue
        if not any(node in _statistics(user) for user in node.users):
            del origins[str(node.target)]


def _statistics(node: fx.Node) -> tuple[Any, ...]:
    """What a functional norm keeps running averages in."""
    if node.op != "call_function" or node.target not in (F.batch_norm, F.instance_norm):
        return ()
    named = (node.kwargs.get(name) for name in ("running_mean", "running_var"))
    return *node.args[1:3], *named


# -- what cannot be trained narrow -------------------------------------------------------------


def _refuse_shared(prepared: nn.Module, parts: tuple[Part, ...]) -> None:
    """Raise if a tensor of a part is also one of another, or of the code around them."""
    places = [named_tensors(part.module) for part in parts]
    places.append(tensors_outside(prepared, parts))
    owners = Counter(key for place in places for key in {id(tensor) for tensor in place.values()})
    if any(count > 1 for count in owners.values()):
        raise NarrowError(f"parts of {type(prepared).__name__} share weights; {INSTEAD}")


def _refuse_untrainable(view: fx.GraphModule) -> None:
    for name, module in view.named_modules():
        if is_weighted(module) or parametrize.is_parametrized(module):
            raise NarrowError(f"the weight of '{name}' is computed from others; {INSTEAD}")
        if module._backward_hooks or module._backward_pre_hooks:
            raise NarrowError(f"'{name}' has hooks, which see its gradients; {INSTEAD}")
    for name, parameter in view.named_parameters():
        if parameter.is_complex() and parameter.requires_grad:
            raise NarrowError(f"'{name}' is complex; {INSTEAD}")


def _refuse_computed(compacted: Compacted, wide: Mapping[str, Tensor]) -> None:
    for node in compacted.computed.values():
        todo = [node]
        while todo:
            read = todo.pop()
            todo += read.all_input_nodes
            if read.op == "get_attr" and wide[str(read.target)].requires_grad:
                raise NarrowError(f"'{node}' is computed from '{read.target}'; {INSTEAD}")


def _refuse_unequal_calls(
    origins: Mapping[str, Elements], compacted: Compacted, view: fx.GraphModule
) -> None:
    """Raise where two tensors share elements, unless they are parameters of equal elements.

    So it is where a layer is called twice and other channels are dead in either call. All calls of
    a norm must have the same channels: its statistics are of what all calls read, zeros included.
    """
    found: dict[str, dict[object, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, own in origins.items():
        found[own.source][own.key].append(name)
    wide, before = named_tensors(view), _calls(view, view.graph)
    after = _calls(compacted.root, compacted.graph)
    for source, names in found.items():
        firsts = [same[0] for same in names.values()]
        here = torch.cat([origins[name].places[origins[name].real] for name in firsts])
        equal = len(here) == len(np.unique(here.numpy()))
        if not isinstance(wide[source], nn.Parameter):
            equal &= all(len(same) == 1 for same in names.values())
        if source.endswith(MEAN) and (times := before[_owner(view, source)]) > 1:
            equal &= len(firsts) == 1 and after[_owner(compacted.root, firsts[0])] == times
        if not equal:
            raise NarrowError(
                f"'{source}' is used more than once, and not for the same channels; {INSTEAD}"
            )


def _calls(root: nn.Module, graph: fx.Graph) -> Counter[nn.Module]:
    """How often each module is called."""
    return Counter(root.get_submodule(str(n.target)) for n in graph.find_nodes(op="call_module"))


def _owner(root: nn.Module, name: str) -> nn.Module:
    return root.get_submodule(name.rpartition(".")[0])
