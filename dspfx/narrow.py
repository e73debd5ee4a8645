"""`narrow`: training that costs what is left of a network, not what it was.

A masked network computes all that the dense one does, and throws most of it away. A narrow one has
no dead channels, so that a step is as cheap as the channels are few, and is trained in its place:

1. It is what `convert` emits, but norms are not folded into layers, and tensors can be trained.
   Where the filters of a layer read different channels, the zeros that fill it up stay zero.
2. Which element of the prepared model each of its elements is, is found by emitting it once more,
   from a copy of the model whose tensors hold the numbers of their elements.
3. `widen` copies the elements to where they come from.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx, nn

from dspfx.blueprint import named_tensors
from dspfx.convert import exchanged
from dspfx.elements import Elements, elements, key, numbered
from dspfx.errors import NarrowError
from dspfx.gating import fitting_inputs
from dspfx.masks import present_liveness
from dspfx.module import NarrowModule, PreparedModule
from dspfx.parts import Part, parts_of, tensors_outside
from dspfx.passes.compact import Compacted, compact
from dspfx.passes.cost_model import CPU, CostModel
from dspfx.passes.plan import plan
from dspfx.passes.training_graph import training_graph
from dspfx.passes.verify import verify as verify_equal
from dspfx.trainable import make_trainable
from dspfx.weighted import is_weighted
from dspfx.wrappers import unwrapped

MEAN, COUNTER = "running_mean", "num_batches_tracked"
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
        A `NarrowModule`, in the mode of `prepared`, that shares nothing with it. From a model
        prepared in parts, a copy of it whose parts are `NarrowModule`s.

    Raises:
        ConvertError: `prepared` does not come from `dspfx.prepare`.
        NarrowError: it calls other code in training than in evaluation, or weights are computed
            from others, or shared in a way that a narrow model cannot share them.
        EquivalenceError: the two differ; the message names the first node that does.
    """
    prepared = unwrapped(prepared)
    parts = tuple(parts_of(prepared))
    _refuse_shared(prepared, parts)
    narrowed = {part.module: _narrow(part.module, verify, cost_model) for part in parts}
    return exchanged(prepared, narrowed).train(prepared.training)


def _narrow(prepared: PreparedModule, verify: bool, cost_model: CostModel) -> NarrowModule:
    analysis, live = present_liveness(prepared)
    with prepared.evaluation_view() as view:
        _refuse_weighted(view)
        planned = plan(view, analysis, live, cost_model, fold=False)
        if verify:
            verify_equal(view, analysis, live, planned, fitting_inputs(prepared))
        compacted = compact(view, analysis, planned)
        twin, first = numbered(view)
        numbers = named_tensors(compact(twin, analysis, planned).root)
        wide = named_tensors(view)
    _refuse_computed(compacted, wide)
    origins = {
        name: found
        for name, tensor in numbers.items()
        if tensor.is_floating_point() and name not in compacted.computed
        if (found := elements(name, tensor, first)) is not None
    }
    _refuse_unequal_calls(origins, view)
    origins |= _counters(compacted.root, origins)
    make_trainable(compacted.root, origins, wide)
    training = training_graph(compacted, prepared.graphs[False], prepared.graphs[True])
    if training is None:
        raise NarrowError(
            f"{type(prepared).__name__} calls other code in training than in evaluation; {INSTEAD}"
        )
    graphs = {False: compacted.graph, True: training}
    module = NarrowModule(compacted.root, graphs, type(prepared).__name__)
    module.origins, module.stands_for = origins, copy.deepcopy(prepared.stands_for)
    return module


# -- what cannot be trained narrow -------------------------------------------------------------


def _refuse_shared(prepared: nn.Module, parts: tuple[Part, ...]) -> None:
    """Raise if a tensor of a part is also one of another, or of the code around them."""
    places = [named_tensors(part.module) for part in parts]
    places.append(tensors_outside(prepared, parts))
    owners = Counter(key for place in places for key in {id(tensor) for tensor in place.values()})
    if any(count > 1 for count in owners.values()):
        raise NarrowError(f"parts of {type(prepared).__name__} share weights; {INSTEAD}")


def _refuse_weighted(view: fx.GraphModule) -> None:
    for name, module in view.named_modules():
        if is_weighted(module):
            raise NarrowError(f"the weight of '{name}' is computed from others; {INSTEAD}")


def _refuse_computed(compacted: Compacted, wide: Mapping[str, Tensor]) -> None:
    for node in compacted.computed.values():
        todo = [node]
        while todo:
            read = todo.pop()
            todo += read.all_input_nodes
            if read.op == "get_attr" and wide[str(read.target)].requires_grad:
                raise NarrowError(f"'{node}' is computed from '{read.target}'; {INSTEAD}")


def _refuse_unequal_calls(origins: Mapping[str, Elements], view: fx.GraphModule) -> None:
    """Raise if an element is in two tensors that are not the same in all others.

    So it is where a layer is called twice and other channels are dead in either call. A norm that
    is called twice must be whole: its statistics are of what all calls read, zeros included.
    """
    calls = Counter(
        id(view.get_submodule(str(n.target))) for n in view.graph.find_nodes(op="call_module")
    )
    distinct = {key(own): own for own in origins.values()}
    found: dict[str, list[Tensor]] = defaultdict(list)
    for source, places in distinct.values():
        found[source].append(places[places >= 0])
    tensors, emitted = named_tensors(view), Counter(source for source, _ in origins.values())
    for source, lists in found.items():
        path, _, leaf = source.rpartition(".")
        here = torch.cat(lists).numpy()
        times = calls[id(view.get_submodule(path))] if leaf == MEAN else 1
        whole = len(lists) == 1 and emitted[source] == times and len(here) == len(tensors[source])
        if len(np.unique(here)) < len(here) or (times > 1 and not whole):
            raise NarrowError(
                f"'{source}' is used more than once, and not for the same channels; {INSTEAD}"
            )


def _counters(root: nn.Module, origins: Mapping[str, Elements]) -> dict[str, Elements]:
    """Of the batches that norms have seen: the one kind of integers that training changes."""
    present, only = named_tensors(root), torch.zeros(1, dtype=torch.int64)
    return {
        counter: (source.removesuffix(MEAN) + COUNTER, only)
        for name, (source, _) in origins.items()
        if name.endswith(MEAN) and (counter := name.removesuffix(MEAN) + COUNTER) in present
    }
