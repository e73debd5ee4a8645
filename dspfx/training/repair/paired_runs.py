"""Runs of prepared modules on the same inputs, without their masks and with them.

Without masks a prepared module is the dense one: weights stay under masks. Those that have been
written since are exchanged for what they were meanwhile.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import DataError
from dspfx.layers.gates import ChannelGate, FilterGate
from dspfx.model.batches import call_with
from dspfx.model.module import PreparedModule
from dspfx.model.parts import Part
from dspfx.passes.sandbox.calls import fresh
from dspfx.passes.sandbox.state import buffers_kept
from dspfx.training.repair.least_squares import NormalEquations
from dspfx.utils.distributed import Processes


class _Enough(BaseException):
    """All layers that are asked for have been called: no failure, and no user's to catch."""


class PairedRuns:
    """A model, and the batches it is run on.

    Args:
        model: unwrapped, in evaluation mode.
        batches, call: see `dspfx.compensate`.
        processes: each of which has its own share of the batches.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        call: Callable[[Any], object] | None,
        processes: Processes,
    ) -> None:
        self.model, self.batches, self.call, self.processes = model, batches, call, processes
        self.dense: dict[Tensor, Tensor] = {}  # what was written, and the value before

    @torch.no_grad()
    def write(self, tensor: Tensor, value: Tensor) -> None:
        """Write `value` into a parameter or buffer of the model; the dense model keeps its own."""
        self.dense.setdefault(tensor, tensor.detach().clone())
        tensor.copy_(value)

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Whatever was written has the value before again, if there is an error."""
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for tensor, value in self.dense.items():
                    tensor.copy_(value)
            raise

    def in_order(self, parts: Sequence[Part]) -> list[Part]:
        """The parts in the order in which the first process's first batch reaches them.

        Those that it does not reach come last.
        """
        if len(parts) < 2:
            return list(parts)

        names: dict[nn.Module, str] = {part.module: part.name for part in parts}
        called: list[str] = []

        def note(module: nn.Module, _: Any) -> None:
            called.append(names[module])

        with ExitStack() as hooks:
            for module in names:
                hooks.enter_context(module.register_forward_pre_hook(note))
            self._run(limit=1)
        order = [*self.processes.of_first(lambda: called), *names.values()]
        return sorted(parts, key=lambda part: order.index(part.name))

    def observe(self, systems: Sequence[NormalEquations], parts: Sequence[Part]) -> None:
        """Run the model on all batches; what `systems` need is added to their sums.

        Args:
            systems: of different layers.
            parts: the prepared modules, each of which is run on what it is given with and without
                masks.

        Raises:
            DataError: there is no batch.
        """
        with ExitStack() as hooks:
            for part in parts:
                pair = _Pair(part.module, systems, self)
                if pair.systems:
                    hooks.enter_context(
                        pair.hooked(stops=part.module is self.model and not self.call)
                    )
            count = self._run()
        for system in systems:
            system.gather(self.processes)
        if not self.processes.alone:
            device = next(iter(self.model.parameters())).device
            count = int(self.processes.sum(torch.tensor(count, device=device)))
        if count == 0:
            raise DataError("there is no batch to compensate with; give at least one")

    @torch.no_grad()
    def _run(self, limit: int | None = None) -> int:
        count = 0
        with buffers_kept(self.model):
            for batch in self.batches:
                with suppress(_Enough):
                    self.call(batch) if self.call is not None else call_with(self.model, batch)
                count += 1
                if count == limit:
                    break
        return count

    @contextmanager
    def without_masks(self, module: nn.Module) -> Iterator[None]:
        """`module` is the dense one."""
        gates = [m for m in module.modules() if isinstance(m, FilterGate | ChannelGate)]
        masks = [(g, g.mask if isinstance(g, FilterGate) else g.alive) for g in gates]
        closed = [(gate, mask, mask.clone()) for gate, mask in masks if not gate.open]
        present = {tensor: tensor.detach().clone() for tensor in self.dense}
        try:
            for gate, mask, _ in closed:
                mask.fill_(True)
                gate.open = True
            for tensor, value in self.dense.items():
                tensor.copy_(value)
            yield
        finally:
            for gate, mask, own in closed:
                mask.copy_(own)
                gate.open = False
            for tensor, value in present.items():
                tensor.copy_(value)


class _Pair:
    """A prepared module that is run twice on whatever it is given, before it runs by itself."""

    def __init__(
        self, module: PreparedModule, systems: Sequence[NormalEquations], runs: PairedRuns
    ) -> None:
        self.module, self.runs = module, runs
        graph = module.graphs[False]
        calls = Counter(
            module.get_submodule(str(node.target)) for node in graph.find_nodes(op="call_module")
        )
        self.systems = {system.layer: system for system in systems if system.layer in calls}
        self.calls = sum(calls[layer] for layer in self.systems)

    @contextmanager
    def hooked(self, stops: bool) -> Iterator[None]:
        """Whenever the module is called, the sums are added to; nothing else is if it `stops`."""

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            wanted: dict[nn.Module, list[Tensor]] = {layer: [] for layer in self.systems}

            def keep(layer: nn.Module, _: Any, __: Any, y: Tensor) -> None:
                wanted[layer].append(y.clone())  # which may be overwritten next

            def see(layer: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
                x = args[0] if args else kwargs["input"]
                self.systems[layer].see(x, wanted[layer].pop(0), y)

            with self.runs.without_masks(self.module):
                self._run(args, kwargs, keep)
            self._run(args, kwargs, see)
            if stops:
                raise _Enough

        with self.module.register_forward_pre_hook(before, with_kwargs=True):
            yield

    def _run(self, args: Any, kwargs: Any, each: Callable[..., None]) -> None:
        """Run the module until all layers are done, with `each` after every call of one of them."""
        left = self.calls

        def hook(*call: Any) -> None:
            nonlocal left
            each(*call)
            left -= 1
            if not left:
                raise _Enough

        with ExitStack() as hooks:
            for layer in self.systems:
                hooks.enter_context(layer.register_forward_hook(hook, with_kwargs=True))
            with suppress(_Enough):
                self.module.forward(*fresh(args), **fresh(kwargs))
