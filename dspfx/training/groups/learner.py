"""`GroupLearner`: learns which filters of a layer belong together while the model trains.

Park et al., "Dynamic Structure Pruning for Compressing CNNs", AAAI 2023, arXiv 2303.09736: a
bilevel problem, solved by one look-ahead for every step. The forward pass is dense throughout; the
task reaches the grouping through the second-order term of the look-ahead alone.

1. Task step: the optimizer takes the weights from W0 to W1.
2. Look-ahead: shrink to W2, step to W3, shrink to W4; only the gated weights matter from here on,
   and of W4 only what the formula of `_step_energy` needs. Back to W1.
3. Adam moves the logits; the weights are shrunk by the hard assignment.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import LearnError
from dspfx.layers.gated import GatedLayer, gated_layers
from dspfx.layers.parametrised import is_computed
from dspfx.layers.weights import energy, filters_first, spread
from dspfx.model.unfinished import note_steps
from dspfx.training.groups.assignment import hard_assignment, soft_assignment
from dspfx.training.groups.checks import (
    check_generator,
    check_layers,
    check_learner_settings,
    check_optimizer,
)
from dspfx.training.groups.closure import BatchTask, Losses
from dspfx.training.groups.lookahead import BufferSnapshot, looking_ahead, trial_steps
from dspfx.training.groups.penalty import LayerPenalty
from dspfx.utils.distributed import Processes
from dspfx.utils.resume import check_kind, check_settings
from dspfx.utils.wrappers import plain_optimizer, trained_parameters, unwrapped

BLOCK = 2**18  # elements of the matrices [O, C] that are worked on at a time
SETTINGS = ("strength", "total_steps", "temperature", "logits_lr", "logits_every")


class GroupLearner:
    """Trains a prepared model and its groups together.

    Beside what plain training needs, it holds during a step one copy of the gated weights, and, of
    one layer at a time, a copy of the optimizer's state (AdamW: twice the layer's weight) or one or
    two matrices `[O, C]`; less than twice the parameters, unless one layer has most of them.
    Optimizers that are not torch's own may couple parameters; for them it is a copy of all that
    they train, and of all their state.

    Layers whose weight is computed by a parametrisation (`torch.nn.utils.parametrize`) keep the
    groups that they have.

    Args:
        prepared: from `dspfx.prepare`, or a model that holds such; it may be wrapped or compiled.
        optimizer: the user's, over the model's parameters. At every step, its present learning
            rates count, and the layers that it trains at present: any scheduler works, and layers
            may be frozen and unfrozen. It may be wrapped by Accelerate or Lightning.
        strength: lambda, the weight of the regulariser; it grows linearly over `total_steps`.
        total_steps: T, how often `step` will be called.
        temperature: tau of the soft assignment `softmax(logits / tau + Gumbel noise)`.
        logits_lr: learning rate of the logits (Adam).
        logits_every: look ahead and update the logits at every n-th step only, then at n times
            `logits_lr`, so that groups form as fast; the steps between cost one forward and
            backward instead of two.
        generator: of the Gumbel noise, on the model's device; torch's own by default.
        process_group: the processes that train the model together, in `DistributedDataParallel`;
            by default those of that wrapper, if `prepared` is or holds one, else all. They
            construct and step their learners together; the noise is the first one's.

    Raises:
        LearnError: no gated layer, or none that the optimizer trains; weights that are not
            finite, are in half precision or sharded, or differ between the processes; an optimizer
            that cannot look ahead; a setting out of range.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
        >>> x = torch.randn(2, 3, 12, 12)
        >>> prepared = dspfx.prepare(model, x)
        >>> optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01, momentum=0.9)
        >>> learner = dspfx.GroupLearner(prepared, optimizer, strength=1e-3, total_steps=5)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     return prepared(x).square().mean()
        >>> for _ in range(5):
        ...     loss = learner.step(closure)
        >>> dspfx.prune(prepared, dspfx.Budget(macs=0.5)).achieved <= 0.5
        True
    """

    def __init__(
        self,
        prepared: nn.Module,
        optimizer: torch.optim.Optimizer,
        strength: float = 2e-3,
        *,
        total_steps: int,
        temperature: float = 0.5,
        logits_lr: float = 1e-3,
        logits_every: int = 1,
        generator: torch.Generator | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        check_learner_settings(strength, total_steps, temperature, logits_lr, logits_every)
        self.prepared = prepared
        self.optimizer = plain_optimizer(optimizer)
        self.strength = strength
        self.total_steps = total_steps
        self.temperature = temperature
        self.logits_lr = logits_lr
        self.logits_every = logits_every
        self.generator = generator
        self.steps_done = 0
        gated = gated_layers(unwrapped(prepared)).items()
        self.layers = {name: layer for name, layer in gated if not is_computed(layer)}
        self.processes = Processes.of(prepared, process_group)
        own = prepared, self.optimizer, self.layers, self._trained_layers(), self.processes
        check_layers(*own)
        check_optimizer(self.optimizer)
        check_generator(self.layers, generator)
        self.penalties = {name: LayerPenalty.of(layer) for name, layer in self.layers.items()}
        logits = [layer.gate.logits for layer in self.layers.values()]
        self.logits_optimizer = torch.optim.Adam(logits, lr=logits_lr * logits_every, eps=1e-12)

    def step(
        self,
        closure: Callable[[], Losses],
        *,
        before_step: Callable[[], object] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        backward: bool = True,
    ) -> Tensor:
        """One step of training and group learning on one batch.

        `before_step` is the place to look at gradients: what is left of them afterwards is of the
        last pass, which may be the look-ahead's.

        Args:
            closure: computes the batch's loss, a scalar with a gradient. It may also return a
                list, tuple or dict of losses, which are added, or an iterator (a generator) of
                the losses of micro-batches, each of which is propagated back before the next is
                computed. It is called once or twice, must compute on the same batch both times,
                and must not call `backward`. Where several processes train the model, the loss is
                that of the process's own share of the batch.
            before_step: called when the gradients are complete (and unscaled), before each of
                the one or two steps of the optimizer: clip them here.
            scaler: for losses in half precision. It is used and updated here; a step that it
                skips changes nothing and counts as done.
            backward: False for closures as `torch.optim.Optimizer.step` takes them, which set the
                gradients to zero, compute one loss and propagate it back, scaled where there is
                a `scaler`.

        Returns:
            The loss before the step, the sum if there were several, detached.

        Raises:
            LearnError: a loss is no finite scalar with a gradient, all steps are done, the model
                was moved or cast since construction, or the processes that train it have
                different gradients, all of them then. Model, optimizer and groups are
                then what they were; if it is the look-ahead that fails, what they were after the
                task's own step. With an enabled `scaler` losses may be infinite.
        """
        if self.steps_done >= self.total_steps:
            raise LearnError(
                f"all {self.total_steps} steps are done; construct a GroupLearner with the "
                "total_steps you need"
            )
        if not callable(closure):
            raise LearnError(f"step() takes a closure that computes the loss, got {closure!r}")
        self._check_logits()
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        # one process alone must not leave before the others have its gradients
        finite = scaler is None and self.processes.alone
        task = BatchTask(closure, before_step, scaler, backward, finite)
        buffers = BufferSnapshot(self.prepared)
        try:
            loss = self._run(task)
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            if before_step is not None:
                before_step()
            stepped = self._task_step(scaler)
        except BaseException:
            buffers.restore()
            if scaler is not None:  # or it remembers that it has unscaled
                scaler._per_optimizer_states.pop(id(self.optimizer), None)
            raise
        layers = self._trained_layers()
        if stepped and layers:
            if self.steps_done % self.logits_every == 0:
                self._learn_groups(layers, task)
            self._shrink(layers)
        self.steps_done += 1
        note_steps(unwrapped(self.prepared), "GroupLearner", self.steps_done, self.total_steps)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the states of model and optimizer; plain values."""
        return {
            "steps_done": self.steps_done,
            "settings": {name: getattr(self, name) for name in SETTINGS},
            "logits": [list(layer.gate.logits.shape) for layer in self.layers.values()],
            "logits_optimizer": self.logits_optimizer.state_dict(),
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the run that `state` was saved in.

        The logits are in the model, so load its state, too, and the optimizer's.

        Raises:
            LearnError: `state` is of another model, or of a learner with other settings, or one
                of the two has a generator of its own. Nothing is changed then.
        """
        own = self.state_dict()
        check_kind(own, state, "GroupLearner")
        if own["logits"] != state["logits"]:
            raise LearnError(
                "this is the state of a GroupLearner for another model or other groups"
            )
        check_settings(own["settings"], state["settings"], "this learner")
        if (self.generator is None) != (state["generator"] is None):
            who = "this learner" if self.generator is None else "the state"
            raise LearnError(f"{who} has no generator of its own; construct both alike")
        self.steps_done = state["steps_done"]
        self.logits_optimizer.load_state_dict(state["logits_optimizer"])
        if self.generator is not None:
            self.generator.set_state(state["generator"])

    # -- the parts of a step -----------------------------------------------------------------

    def _run(self, task: BatchTask) -> Tensor:
        """Compute the gradients of one pass, equal on all processes; returns its own loss."""
        loss = task.run(self.optimizer)
        weights = [layer.weight for layer in self.layers.values()]
        self.processes.check_gradients(loss, weights, finite=task.scaler is None)
        return loss

    def _task_step(self, scaler: torch.amp.GradScaler | None) -> bool:
        """Let the optimizer step; returns whether it did."""
        if scaler is None:
            self.optimizer.step()
            return True
        scale = scaler.get_scale()
        scaler.step(self.optimizer)
        scaler.update()
        return scaler.get_scale() >= scale  # it is lowered whenever a step is skipped

    def _learn_groups(self, layers: dict[str, GatedLayer], task: BatchTask) -> None:
        """Look ahead from W1, move the logits, and return to W1."""
        settings = self.temperature, self.generator
        soft = {name: soft_assignment(layer.gate, *settings) for name, layer in layers.items()}
        self.processes.broadcast(list(soft.values()))
        rates = self._rates()
        weights = [layer.weight for layer in layers.values()]
        with looking_ahead(self.prepared, self.optimizer, weights) as before:
            self._descend(layers, soft)  # W2
            self._run(task)
            finite = task.scaler is None or self._unscale(task.scaler.get_scale())
            if task.before_step is not None:
                task.before_step()
            if finite:
                trial_steps(self.optimizer, weights)  # W3
                with _no_autocast(layers):
                    for name, layer in layers.items():
                        w = layer.weight
                        self._set_logits_gradient(name, rates[w], soft[name], before[w])
        gradients = [layer.gate.logits.grad for layer in layers.values()]
        self.processes.broadcast([g for g in gradients if g is not None])  # to the last bit
        self.logits_optimizer.step()
        self.logits_optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _set_logits_gradient(self, name: str, rate: float, soft: Tensor, before: Tensor) -> None:
        """The gradient of the assignment at W1 (`before`) and W3 (now), through softmax."""
        layer, penalty = self.layers[name], self.penalties[name]
        gradient = torch.zeros_like(soft)
        for w1, w3 in zip(_blocks(layer, before), _blocks(layer, layer.weight), strict=True):
            e1, e13, e3 = energy(w1), energy(w1, w3 - w1), energy(w3)
            # W4 - W2 = (W3 - 2 rho S3 W3) - (W1 - 2 rho S1 W1), S being the slopes; times 2 W1
            shrunk = penalty.slope(e3, soft) * (e1 + e13) - penalty.slope(e1, soft) * e1
            step = 2 * (e13 - 2 * rate * shrunk)
            gradient += penalty.assignment_gradient(soft, e1, e3, step)
        inner = (gradient * soft).sum(0)  # the derivative of softmax is diag(p) - p p^T
        layer.gate.logits.grad = soft * (gradient - inner) / self.temperature

    def _shrink(self, layers: dict[str, GatedLayer]) -> None:
        """W = W1 - rho dR/dW(W1, p) with the hard assignment of the present logits."""
        self._descend(layers, {name: hard_assignment(each.gate) for name, each in layers.items()})

    @torch.no_grad()
    def _descend(self, layers: dict[str, GatedLayer], assignments: dict[str, Tensor]) -> None:
        """W - rho dR/dW(W, p), in place; dR/dW is 2 W times the slope by the energy."""
        rates = self._rates()
        with _no_autocast(layers):
            for name, layer in layers.items():
                penalty, p = self.penalties[name], assignments[name]
                slopes = [penalty.slope(energy(w), p) for w in _blocks(layer, layer.weight)]
                slope = torch.cat(slopes, 1) if len(slopes) > 1 else slopes[0]
                layer.weight.mul_(spread(layer, slope.mul_(-2 * rates[layer.weight]).add_(1)))

    def _rates(self) -> dict[Tensor, float]:
        """rho = lambda lr (t + 1) / T of every trained parameter, with the present lr."""
        share = self.strength * (self.steps_done + 1) / self.total_steps
        groups = self.optimizer.param_groups
        return {p: share * float(group["lr"]) for group in groups for p in group["params"]}

    @torch.no_grad()
    def _unscale(self, scale: float) -> bool:
        """Divide the gradients of trained parameters by `scale`; whether they are finite."""
        parameters = trained_parameters(self.optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.mul_(1 / scale)
        return bool(torch.isfinite(nn.utils.get_total_norm(gradients)))

    def _trained_layers(self) -> dict[str, GatedLayer]:
        """The gated layers that the optimizer trains at present."""
        trained = trained_parameters(self.optimizer)
        return {
            name: layer
            for name, layer in self.layers.items()
            if layer.weight in trained and layer.weight.requires_grad
        }

    def _check_logits(self) -> None:
        known = self.logits_optimizer.param_groups[0]["params"]
        for (name, layer), logits in zip(self.layers.items(), known, strict=True):
            if layer.gate.logits is not logits:  # `Module.to` replaces buffers
                raise LearnError(
                    f"the logits of {name} were replaced since this GroupLearner was constructed; "
                    "move, cast or load the model first, then construct optimizer and learner"
                )


def _no_autocast(layers: dict[str, GatedLayer]) -> torch.autocast:
    """The penalty is in the precision of the weights, whatever surrounds the step."""
    device = next(iter(layers.values())).weight.device
    return torch.autocast(device.type, enabled=False)


def _blocks(layer: GatedLayer, weight: Tensor) -> tuple[Tensor, ...]:
    """`weight`, masked, as `[O, C, *taps]`, in blocks of channels, over which R is a sum."""
    if not layer.gate.open:
        weight = torch.where(spread(layer, layer.gate.mask), weight.detach(), 0.0)
    filters = filters_first(layer, weight)
    return torch.split(filters, max(1, BLOCK // len(filters)), dim=1)
