"""Channel analysis: abstract interpretation of a graph, with a label for every channel.

For `relu(a(x)) + b(x)` it finds that `a` and `b` make new channels, that `relu` keeps them, and
that channel j of `a` and channel j of `b` are coupled: a pruned network stores both or none.

Every channel of every layer's output is given a number, an atom. The graph is then gone through
once, with the record of its run on the example inputs; labels are carried along:

1. **Channel-producing layers** (convolution, linear) read the channels of their input and make
   new atoms.
2. **Channelwise operators** (norms, pooling, depthwise convolution) and **elementwise** ones pass
   atoms on; atoms that meet in an elementwise operator are coupled, by union-find.
3. **Norms over the channels** pass them on, too, and read all that are not zero.
4. **Data movement** is executed for real, on a tensor that numbers the elements of its inputs.
   What comes out says which element went where; where whole channels moved, the operator is a
   gather of channels or does the same within every channel.
5. **Anything else** is opaque: it gets its inputs at full width and makes new atoms.

Whether a zero channel stays zero is found by running the operator on zeros.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node

from dspfx.layers.gated import LAYERS
from dspfx.layers.gates import ChannelGate
from dspfx.passes.analysis import operators
from dspfx.passes.analysis.agreement import SizeFacts
from dspfx.passes.analysis.channel_ops import (
    ChannelAnalysis,
    Constant,
    Declined,
    FullWidth,
    Op,
    Source,
    Value,
    used,
)
from dspfx.passes.analysis.execution import Execution, execute
from dspfx.passes.analysis.fixed import fixed
from dspfx.passes.analysis.moves import move, opaque, split_items
from dspfx.passes.analysis.parameters import joined, repeated
from dspfx.passes.analysis.positions import operands_of
from dspfx.passes.analysis.queries import asked_of_inputs, size, size_or_nothing
from dspfx.passes.analysis.rules import (
    channelwise,
    elementwise,
    gate,
    merge,
    mix,
    reduction,
    relayout,
)
from dspfx.passes.analysis.state import Findings, State
from dspfx.passes.analysis.statistics import statistics
from dspfx.passes.sandbox.calls import Call, samples_of


def analyse(
    root: fx.GraphModule,
    inputs: tuple[Any, ...],
    frozen: frozenset[str] = frozenset(),
    rules: Mapping[operators.Key, operators.Rule] | None = None,
    facts: SizeFacts | None = None,
    whole: nn.Module | None = None,
    samples: float | None = None,
    execution: Execution | None = None,
    findings: Findings | None = None,
) -> ChannelAnalysis:
    """Analyse the graph of `root`, which must be in evaluation mode, on example `inputs`.

    Args:
        root: only run, never changed.
        inputs: positional inputs; a batch of two or more distinguishes batch and channels.
        frozen: names of the layers that keep all their filters and input channels.
        rules: what is known of further operators; takes precedence.
        facts: what is known of the same graph on inputs of other sizes.
        whole: the module whose parameters are counted, if that has more than `root`.
        samples: how many of the user's samples `inputs` are, which costs are divided by; see
            `samples_of`, which is asked if it is None.
        execution: of the graph on `inputs`; it is run if this is None.
        findings: what is found out by values of parameters and buffers is added.
    """
    samples = samples or samples_of(Call(inputs))
    facts, findings = facts or SizeFacts(), findings or Findings()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        execution = execution or execute(root, inputs)[0]
        state = frozen, rules or {}, facts, samples, findings
        analyser = _Analyser(root, execution, *state)
        analyser.run(*inputs)
    found = analyser.result()
    return replace(found, fixed=fixed(root, whole or root, found, analyser.state.macs))


class _Analyser(fx.Interpreter):
    def __init__(
        self,
        root: fx.GraphModule,
        execution: Execution,
        frozen: frozenset[str],
        rules: Mapping[operators.Key, operators.Rule],
        facts: SizeFacts,
        samples: float,
        findings: Findings,
    ) -> None:
        super().__init__(root)
        self.execution = execution
        self.state = State(self, root, frozen, rules, facts, samples, findings)

    def result(self) -> ChannelAnalysis:
        classes = self.state.coupling.classes()
        losable = np.ones(len(classes), bool)
        losable[np.concatenate([np.zeros(0, np.int64), *self.state.born_whole])] = False
        losable = np.isin(classes, classes[losable])
        read = used(self.state.ops)
        declined: list[Declined] = []
        for node, op in self.state.ops.items():
            if node in read and isinstance(op, FullWidth) and op.reason:
                values = [self.state.values[o] for o in op.operands if o in self.state.values]
                if any(losable[value.atoms].any() for value in values):
                    declined.append(Declined(node.name, op.reason))
        return ChannelAnalysis(self.state.ops, self.state.values, classes, tuple(declined))

    def run_node(self, n: Node) -> Any:
        of_constants = n.op == "get_attr" or self._reads_constants(n)
        result = super().run_node(n) if of_constants else self.execution.results[n]
        self.state.macs[n] = int(self.execution.macs[n] / self.state.samples)
        op = self._classify(n, result)
        if op is not None and n in self.state.values and self.state.holds_positions(n):
            del self.state.values[n]
            op = (
                op
                if isinstance(op, Source)
                else FullWidth(operands_of(n, self.state.ops), _BY_SIZE)
            )
        if op is not None:
            self.state.ops[n] = op
            if isinstance(result, Tensor) and n not in self.state.values:
                self.state.new_atoms(n, result, self.state.likely_dim(n, op.operands, result))
                self.state.born_whole.append(self.state.values[n].atoms)
        return result

    def _classify(self, node: Node, result: Any) -> Op | None:
        if self._is_input(node):
            if isinstance(result, Tensor):
                return Source(())
            self.state.containers.add(node)
            return None
        if node.op == "get_attr":
            return self._constant(node, result)
        operands = operands_of(node, self.state.ops)
        if self._is_constant(node, result):
            return self._constant(node, result)
        if node.op == "output":
            return FullWidth(operands, "")
        if not operands:
            return size_or_nothing(self.state, node, result)
        if node.name in self.state.facts.dependent:
            return FullWidth(operands, _BY_SIZE)
        if node in self.execution.drew:
            return FullWidth(operands, _DRAWS)
        if not isinstance(result, Tensor):
            of_inputs = asked_of_inputs(self.state, operands, result)
            return (
                of_inputs
                or size(self.state, node, operands)
                or split_items(self.state, node, operands)
            )
        if node in self.execution.altered:
            why = f"a hook, or a 'forward' of its own, changes what '{node.target}' computes"
            return FullWidth(operands, why)
        if operators.writes_input(node):
            return FullWidth(operands, "it is written into an input of the model", effect=True)
        found = (rule(self.state, node, operands, result) for rule in self._rules(node))
        return next(filter(None, found), None) or opaque(self.state, node, operands)

    def _rules(self, node: Node) -> "list[_Rule]":
        key = operators.key(node, self.state.root)
        if key in self.state.rules:
            taught = _TAUGHT.get(self.state.rules[key])
            return [] if taught is None else [taught]
        return [rule for keys, rule in _RULES if key in keys]

    def _is_input(self, node: Node) -> bool:
        """Whether a node is an input of the model, or an item of a container that is."""
        if node.target in (operator.getitem, getattr, "get"):
            return isinstance(node.args[0], Node) and node.args[0] in self.state.containers
        return node.op == "placeholder"

    def _is_constant(self, node: Node, result: Any) -> bool:
        """Whether a node is computed from parameters and buffers alone."""
        return self._reads_constants(node) and isinstance(result, Tensor)

    def _reads_constants(self, node: Node) -> bool:
        inputs = node.all_input_nodes
        if not inputs or not all(isinstance(self.state.ops.get(n), Constant) for n in inputs):
            return False
        return operators.key(node, self.state.root) in operators.OF_CONSTANTS

    def _constant(self, node: Node, result: Any) -> Op | None:
        if not isinstance(result, Tensor):
            return None
        self.state.read_constant(node, result)
        self.state.values[node] = Value(tuple(result.shape), None, np.zeros(0, np.int64))
        return Constant(())


_DRAWS = "it draws random numbers in evaluation mode, one for every element"
_BY_SIZE = "what it does to channels depends on the size of the inputs"

_Rule = Callable[[State, Node, tuple[Node, ...], Tensor], Op | None]
_RULES: tuple[tuple[frozenset[Any], _Rule], ...] = (
    (LAYERS, mix),
    (frozenset((ChannelGate,)), gate),
    (operators.CHANNELWISE, channelwise),
    (operators.LAYER_NORMS | operators.RMS_NORMS, statistics),
    (operators.REDUCTIONS, reduction),
    (operators.PIXEL_SHUFFLES | operators.GLUS, merge),
    (operators.RELAYOUTS, relayout),
    (operators.ELEMENTWISE, elementwise),
    (operators.REPEATED, repeated),
    (operators.CONCATENATIONS, joined),
    (operators.MOVEMENT, move),
)

_TAUGHT: dict[operators.Rule, _Rule] = {
    "elementwise": elementwise,
    "channelwise": channelwise,
    "movement": move,
}
