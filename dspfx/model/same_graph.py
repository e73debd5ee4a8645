"""Whether a graph does what the model does that it was traced from, at every size it takes.

The graph is executed once for each size. What it gives is compared with what the model computes,
bit for bit; the record of the execution is what the channels are analysed by.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from dspfx.errors import TraceError
from dspfx.model.analysed import analyse_executions, fitting_inputs
from dspfx.model.module import PreparedModule
from dspfx.model.training_check import (
    Results,
    difference,
    is_blind,
    rounding_errors,
    training_pass,
)
from dspfx.passes.analysis.agreement import agree
from dspfx.passes.analysis.channel_ops import ChannelAnalysis
from dspfx.passes.analysis.execution import Execution, execute
from dspfx.passes.analysis.queries import moved_by_numbers
from dspfx.passes.sandbox.calls import (
    Call,
    evaluate,
    fresh,
    of_one_sample,
    of_two_samples,
    parameter_dtype_and_device,
)
from dspfx.passes.sandbox.fix_sizes import fix_numbers, fix_sizes
from dspfx.passes.sandbox.numbers import numbers_of
from dspfx.passes.sandbox.randomness import fixed_seeds
from dspfx.passes.sandbox.sizes import (
    Place,
    Shapes,
    changed_places,
    other_sizes,
    resized,
    shapes_of,
    shown_places,
    sizes_in_steps,
)
from dspfx.passes.sandbox.state import state_kept, values_of, written_by
from dspfx.utils.pytree import leaves, structure

_CHEAP = 2**15  # numbers: a pass of so few saves nothing with fewer samples, a copy nothing at all


class SameGraph:
    """Compares a prepared module, without gates as yet, with its model.

    Args:
        prepared: traced.
        model: a private copy of what it was traced from.
        call: that it was traced for.
    """

    def __init__(self, prepared: PreparedModule, model: nn.Module, call: Call) -> None:
        self.prepared, self.model, self.call = prepared, model, call
        self.name = type(model).__name__
        self.executions: dict[Shapes, Execution] = {}
        self.compared: list[tuple[Call, Any]] = []  # calls, and what the model computes for them

    def check(self, expected: Any, *, train: bool) -> ChannelAnalysis:
        """Compare the two in evaluation mode and, if they are to `train`, in training mode.

        Returns:
            The analysis of the example. The sizes that the graph takes, and what they say of it,
            are kept in the prepared module.

        Raises:
            TraceError: the graph computes or learns something else.
        """
        self._check_outputs(expected, self._execute(self.prepared.example_inputs))
        self.compared.append((self.call, expected))
        self._settle_sizes()
        ran = train and self._check_training()
        if not ran or self.prepared.graphs[True] is not self.prepared.graphs[False]:
            # the code that is written for the graph has not run
            call, outputs = self._cheapest()
            self._check_outputs(outputs, self._run_code(self._inputs(call)))
        return self._analyse_all_sizes()

    def _cheapest(self) -> tuple[Call, Any]:
        """The call of the fewest numbers, the example if it has as few."""
        return min(self.compared, key=lambda compared: _numbers(compared[0]))

    def _execute(self, inputs: tuple[Any, ...]) -> Any:
        """What the evaluation graph computes, its execution being kept; nothing else changes."""
        with self._sandboxed() as view:
            self.executions[shapes_of(inputs)], outputs = execute(view, inputs)
            return outputs

    def _run_code(self, inputs: tuple[Any, ...]) -> Any:
        """What the code of the evaluation graph computes for `inputs`."""
        with self._sandboxed() as view, torch.no_grad():
            # a call would print where it fails
            return view.forward(*fresh(inputs))

    @contextmanager
    def _sandboxed(self) -> Iterator[fx.GraphModule]:
        prepared = self.prepared
        _, device = parameter_dtype_and_device(prepared)
        with (
            prepared.evaluation_view() as view,
            state_kept(prepared, written=written_by(view)),
            fixed_seeds(device),
        ):
            yield view

    def _check_outputs(self, expected: Any, found: Any) -> None:
        if structure(found) != structure(expected):
            raise TraceError(
                f"{self.name} returns a container that cannot be made again from its fields or "
                "items, or one that its caller changed; return a tuple, a dict or a plain "
                "dataclass. Where its code compares `type(x)`, write `isinstance`"
            )
        if not _is_same(expected, found):
            raise TraceError(
                f"the graph of {self.name} does not compute what the model does: its code probably "
                "compares `type(x)`, where `isinstance` is to be written, or reads a tensor after "
                "overwriting its memory under another name"
            )

    def _check_training(self) -> bool:
        """Compare a pass forward and backward of both, where the model can train.

        One sample is enough for code that does something else at the next step, if all the
        gradients say something, and so is a smaller size that both take; where these differ, or say
        nothing, all samples are taken, and then the example.

        Returns:
            Whether there was one.
        """
        smaller, few = self._small_calls() if _numbers(self.call) >= _CHEAP else (None, None)
        different: str | None = None
        expected: Results | None = None
        smaller_differs = False
        for call in (few, smaller, self.call):
            expected = None if call is None else training_pass(self.model, call)
            if call is None or expected is None or (call is few and is_blind(expected)):
                continue
            actual = training_pass(self.prepared, Call(self._inputs(call)))
            different = "whether it runs" if actual is None else difference(expected, actual)
            if actual is not None and different is not None:  # perhaps by rounding alone
                errors = rounding_errors(self.model, call)
                different = difference(expected, actual, errors)
            if different is None:
                if smaller_differs and smaller is not None:
                    self._refuse(shapes_of(self._inputs(smaller)))
                return True
            smaller_differs = call is smaller
        if expected is not None and different is not None:
            raise TraceError(
                f"the graph of {self.name} does not train as the model does: after one pass, "
                f"{different} differs. Its code probably counts calls, writes into what "
                "`parameters()` or `buffers()` return, sets the mode of a module, or keeps what is "
                "random; move it out of `forward`, or name the module that does it in "
                "PrepareConfig(opaque=...)"
            )
        return False

    def _small_calls(self) -> tuple[Call | None, Call | None]:
        """Calls of a smaller size that both take, if there is one, and of one sample.

        Of one sample code that asks for the mode may drop all, as stochastic depth does: of a
        smaller size, two cost no more than trying.
        """
        cheapest, _ = self._cheapest()
        smaller = None if cheapest is self.call else of_two_samples(cheapest)
        asks = self.prepared.graphs[True] is not self.prepared.graphs[False]
        return smaller, None if smaller and asks else of_one_sample(smaller or self.call)

    def _inputs(self, call: Call) -> tuple[Any, ...]:
        return positional(self.prepared.graph, call.by_name(self.model))

    def _settle_sizes(self) -> None:
        """Find which of the sizes that the model takes its graph takes; refuse what it gets wrong.

        Checks of sizes are put into the graphs where the code of the model does something else for
        these sizes than the graph.
        """
        prepared = self.prepared
        example, taken = shapes_of(prepared.example_inputs), list[Shapes]()
        shown: set[Place] = set()
        for call, compute in self._other_calls():
            shapes = shapes_of(self._inputs(call))
            if taken and changed_places(example, shapes) <= shown:
                continue
            try:
                expected, actual = compute()
            except Exception:  # the model does not take it; or a check in the graph
                continue
            if _is_same(expected, actual):
                taken.append(shapes)
                self.compared.append((call, expected))
                shown |= shown_places(example, shapes)
                continue
            self._refuse(shapes)
        prepared.other_sizes = tuple(taken)
        self._settle_numbers()

    def _settle_numbers(self) -> None:
        """Refuse other whole numbers than the example's, where tensors are cut or shaped by them.

        That is where they were not found to change together: what is cut by them in one way for
        the example may be cut otherwise for others.
        """
        prepared = self.prepared
        inputs, numbers = prepared.example_inputs, numbers_of(prepared.example_inputs)
        varied = any(own[-1] != numbers for own in prepared.other_sizes)
        if not numbers or varied or not prepared.origin.tracing:
            return
        if shapes_of(inputs) not in self.executions:
            self._execute(inputs)
        with prepared.evaluation_view() as view:
            moved = moved_by_numbers(view, self.executions[shapes_of(inputs)])
        if moved:
            fix_numbers(prepared.graphs.values(), inputs)
            prepared.recompile()
            self.executions.clear()
            prepared.notes += (
                f"takes the numbers {numbers} among its inputs only, which '{moved[0]}' depends on",
            )

    def _other_calls(self) -> Iterator[tuple[Call, Callable[[], tuple[Any, Any]]]]:
        """Calls with inputs of other sizes, and what computes the outputs of the model, and of the
        graph, for each.

        Both take the first ones. Whether they take the others, which are rarely needed, shows when
        they are computed.
        """
        found: dict[Shapes, tuple[Any, Any]] = {}
        given, values = (self.call.args, self.call.kwargs), values_of(self.model, _CHEAP)

        def other(shapes: Shapes) -> Call:
            return Call(*resized(given, shapes))

        def both(call: Call) -> tuple[Any, Any]:
            return evaluate(self.model, call, values), self._execute(self._inputs(call))

        def accepts(shapes: Shapes) -> bool:
            try:
                found[shapes] = both(other(shapes))
            except Exception:
                return False
            return True

        try:
            for shapes in other_sizes(given, accepts):
                yield other(shapes), partial(found.__getitem__, shapes)
            for shapes in sizes_in_steps(given):
                if shapes not in found:
                    yield other(shapes), partial(both, other(shapes))
        finally:
            values.put_all_back()

    def _refuse(self, shapes: Shapes) -> None:
        """Let the graphs refuse sizes other than that of the example, as those of `shapes`."""
        prepared = self.prepared
        example = shapes_of(prepared.example_inputs)
        fix_sizes(prepared.graphs.values(), prepared.example_inputs, shapes)
        prepared.recompile()
        prepared.other_sizes = ()
        prepared.notes += (
            f"takes inputs of the shapes {example} only, since its code does something else "
            "for other sizes than its graph",
        )
        self.executions.clear()  # they are of a graph without the check
        del self.compared[1:]

    def _analyse_all_sizes(self) -> ChannelAnalysis:
        inputs = fitting_inputs(self.prepared)
        if _types(inputs) != _types(self.prepared.example_inputs):
            self.executions.clear()
        examples = []
        for own in (inputs, *(resized(inputs, other) for other in self.prepared.other_sizes)):
            if shapes_of(own) not in self.executions:
                self._execute(own)
            examples.append((own, self.executions[shapes_of(own)]))
        analysis, self.prepared.size_facts = agree(
            lambda facts: analyse_executions(self.prepared, facts, examples),
            [execution for _, execution in examples],
        )
        return analysis


def positional(graph: fx.Graph, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments in the order of the graph's inputs, without the defaults at the end."""
    for name in [name for name in arguments if name.startswith("**")]:
        arguments |= arguments.pop(name)
    inputs: list[Any] = []
    for node in graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name.startswith("*"):
            inputs += arguments.pop(name, ())
        elif name in arguments:
            inputs.append(arguments.pop(name))
        elif arguments:
            inputs.append(node.args[0])
    return tuple(inputs)


def _types(inputs: Any) -> list[Any]:
    return [(x.dtype, x.device) for x in leaves(inputs) if isinstance(x, Tensor)]


def _numbers(call: Call) -> int:
    return sum(x.numel() for x in leaves((call.args, call.kwargs)) if isinstance(x, Tensor))


def _is_same(expected: Any, actual: Any) -> bool:
    """Whether two outputs are the same, bit for bit."""
    one, other = list(leaves(expected)), list(leaves(actual))
    return len(one) == len(other) and all(map(_equal, one, other))


def _equal(one: Any, other: Any) -> bool:
    """Whether two leaves of outputs are the same, NaN being itself."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)
    return torch.equal(one.nan_to_num(), other.nan_to_num())
