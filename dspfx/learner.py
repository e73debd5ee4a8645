"""`GroupLearner`: learns which filters of a layer belong together while the model trains.

Park et al., "Dynamic Structure Pruning for Compressing CNNs", AAAI 2023, arXiv 2303.09736: a
bilevel problem, solved by one look-ahead for every step. The forward pass is dense throughout; the
task reaches the grouping through the second-order term of the look-ahead alone.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import LearnError
from dspfx.filters import filters_first, spread
from dspfx.gates import GatedLayer, gated_layers
from dspfx.penalty import LayerPenalty, energy


class GroupLearner:
    """Trains a prepared model and its groups together.

    Args:
        prepared: from `dspfx.prepare`.
        optimizer: the user's, over the model's parameters. Its learning rate is read at every
            step, so any scheduler works.
        strength: lambda, the weight of the regulariser; it grows linearly over `total_steps`.
        total_steps: T, how often `step` will be called.
        temperature: tau of the soft assignment `softmax(logits / tau + Gumbel noise)`.
        logits_lr: learning rate of the logits (Adam).
        logits_every: look ahead and update the logits at every n-th step only; the steps
            between cost one forward and backward instead of two.
        generator: of the Gumbel noise, on the model's device; torch's own by default.

    Raises:
        LearnError: no gated layer, or none that the optimizer trains; weights that are not
            finite; a setting out of range.
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
    ) -> None:
        _check_settings(strength, total_steps, temperature, logits_lr, logits_every)
        self.prepared = prepared
        self.optimizer = optimizer
        self.strength = strength
        self.total_steps = total_steps
        self.temperature = temperature
        self.logits_every = logits_every
        self.generator = generator
        self.steps_done = 0
        self.layers = _trained_layers(prepared, optimizer)
        self.penalties = {name: LayerPenalty.of(layer) for name, layer in self.layers.items()}
        logits = [layer.gate.logits for layer in self.layers.values()]
        self.logits_optimizer = torch.optim.Adam(logits, lr=logits_lr, eps=1e-12)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """One step of training and group learning on one batch.

        Args:
            closure: returns the loss of the batch, a scalar with a gradient; it is called once
                or twice and must not call `backward`.

        Returns:
            The loss before the step, detached.

        Raises:
            LearnError: the loss is no finite scalar with a gradient, all steps are done, or the
                model was moved or cast since construction. Model, optimizer and groups are then
                what they were; if it is the loss of the look-ahead that is not finite, what they
                were after the task's own step.
        """
        if self.steps_done >= self.total_steps:
            raise LearnError(
                f"all {self.total_steps} steps are done; construct a GroupLearner with the "
                "total_steps you need"
            )
        self._check_logits()
        with self._buffers_kept_on_error():
            loss = self._backward(closure)
        self.optimizer.step()
        if self.steps_done % self.logits_every == 0:
            self._learn_groups(closure)
        self._shrink()
        self.steps_done += 1
        return loss

    # -- the parts of a step -----------------------------------------------------------------

    def _backward(self, closure: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad():
            loss = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise LearnError("the closure must return the loss, a scalar tensor with a gradient")
        if not torch.isfinite(loss.detach()).all():
            raise LearnError(
                f"the loss is {loss.item()}; this pass changed nothing. Lower the learning rate "
                "or the strength, or look for bad values in the batch"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _learn_groups(self, closure: Callable[[], Tensor]) -> None:
        """Look ahead from W1, move the logits, and be back at W1."""
        soft = {name: self._soft_assignment(layer) for name, layer in self.layers.items()}
        with self._looking_ahead() as before:
            self._descend(soft)  # W2
            self._backward(closure)
            self.optimizer.step()  # W3
            for name, layer in self.layers.items():
                self._set_logits_gradient(name, soft[name], before[layer.weight])
        self.logits_optimizer.step()
        self.logits_optimizer.zero_grad(set_to_none=True)

    def _set_logits_gradient(self, name: str, soft: Tensor, before: Tensor) -> None:
        """The gradient of the assignment at W1 (`before`) and W3 (now), through softmax."""
        layer = self.layers[name]
        after = layer.weight.detach()
        # W4 - W2; computing W2 again is cheaper than keeping it through the backward
        delta = self._descended(name, after, soft) - self._descended(name, before, soft)
        before, after, delta = (filters_first(layer, w) for w in (before, after, delta))
        gradient = self.penalties[name].assignment_gradient(
            soft, energy(before), energy(after), 2 * energy(before, delta)
        )
        inner = (gradient * soft).sum(0)  # the derivative of softmax is diag(p) - p p^T
        layer.gate.logits.grad = soft * (gradient - inner) / self.temperature

    def _shrink(self) -> None:
        """W = W1 - rho dR/dW(W1, p) with the hard assignment of the present logits."""
        hard = {name: _hard_assignment(layer) for name, layer in self.layers.items()}
        self._descend(hard)

    @torch.no_grad()
    def _descend(self, assignments: dict[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            layer.weight.copy_(self._descended(name, layer.weight, assignments[name]))

    def _descended(self, name: str, weight: Tensor, assignment: Tensor) -> Tensor:
        """`weight - rho dR/dW(weight, assignment)`, with the penalty and rate of layer `name`."""
        layer = self.layers[name]
        slope = self.penalties[name].slope(energy(filters_first(layer, weight)), assignment)
        gradient = _weight_gradient(layer, weight, slope)
        return torch.sub(weight.detach(), gradient, alpha=self._rate(layer))

    def _rate(self, layer: GatedLayer) -> float:
        """rho = lambda lr (t + 1) / T, with the present rate of the layer's weight."""
        lr = next(
            float(group["lr"])
            for group in self.optimizer.param_groups
            if any(p is layer.weight for p in group["params"])
        )
        return self.strength * lr * (self.steps_done + 1) / self.total_steps

    @torch.no_grad()
    def _soft_assignment(self, layer: GatedLayer) -> Tensor:
        logits = layer.gate.logits
        uniform = torch.rand(
            logits.shape, generator=self.generator, dtype=logits.dtype, device=logits.device
        )
        tiny = torch.finfo(logits.dtype).tiny
        gumbel = -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()
        soft = (logits / self.temperature + gumbel).softmax(0)
        return soft.clamp(min=tiny)

    # -- leaving no trace --------------------------------------------------------------------

    @contextmanager
    def _buffers_kept_on_error(self) -> Iterator[None]:
        buffers = {name: b.clone() for name, b in self.prepared.named_buffers()}
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for name, buffer in self.prepared.named_buffers():
                    buffer.copy_(buffers[name])
            raise

    @contextmanager
    def _looking_ahead(self) -> Iterator[dict[Tensor, Tensor]]:
        """All that a step changes is afterwards what it was; gives the parameters' old values.

        The optimizer may hold more than the model, and the model more than the optimizer. The
        copies are one of the trained parameters, their gradients and the optimizer's state.
        """
        trained: list[Tensor] = [p for g in self.optimizer.param_groups for p in g["params"]]
        before = {p: p.detach().clone() for p in trained}
        buffers = {b: b.clone() for b in self.prepared.buffers()}
        parameters = {*trained, *self.prepared.parameters()}
        gradients = {p: p.grad for p in parameters}
        for parameter in parameters:
            parameter.grad = None  # or the backward would add to the gradients kept
        options = [dict(group) for group in self.optimizer.param_groups]
        state = {p: _Kept(values) for p, values in self.optimizer.state.items()}
        try:
            yield before
        finally:
            with torch.no_grad():
                for tensor, saved in (before | buffers).items():
                    tensor.copy_(saved)
                for parameter, gradient in gradients.items():
                    parameter.grad = gradient
                for group, saved_group in zip(self.optimizer.param_groups, options, strict=True):
                    group.clear()
                    group.update(saved_group)
                self.optimizer.state.clear()
                self.optimizer.state.update({p: kept.restored() for p, kept in state.items()})

    def _check_logits(self) -> None:
        trained = self.logits_optimizer.param_groups[0]["params"]
        for (name, layer), logits in zip(self.layers.items(), trained, strict=True):
            if layer.gate.logits is not logits:  # `Module.to` replaces buffers
                raise LearnError(
                    f"the logits of {name} were replaced since this GroupLearner was constructed; "
                    "move, cast or load the model first, then construct optimizer and learner"
                )


class _Kept:
    """The state of one parameter, to be put back into the same tensors."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.container = values
        self.tensors = {k: (v, v.clone()) for k, v in values.items() if isinstance(v, Tensor)}
        self.others = {k: copy.deepcopy(v) for k, v in values.items() if k not in self.tensors}

    def restored(self) -> dict[str, Any]:
        """The container with its old entries and no others."""
        self.container.clear()
        self.container.update(self.others)
        for key, (tensor, saved) in self.tensors.items():
            self.container[key] = tensor.copy_(saved)
        return self.container


def _weight_gradient(layer: GatedLayer, weight: Tensor, slope: Tensor) -> Tensor:
    """dR/dW, in the form of the layer's weight, from dR/dE `[O, C]`."""
    return 2 * weight.detach() * spread(layer, slope)


@torch.no_grad()
def _hard_assignment(layer: GatedLayer) -> Tensor:
    logits = layer.gate.logits
    return nn.functional.one_hot(layer.gate.assignment, len(logits)).T.to(logits.dtype)


def _trained_layers(prepared: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, GatedLayer]:
    layers = gated_layers(prepared)
    if not layers:
        raise LearnError("the model has no gated layer; call dspfx.prepare(model) first")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    chosen = {
        name: layer
        for name, layer in layers.items()
        if id(layer.weight) in trained and layer.weight.requires_grad
    }
    if not chosen:
        raise LearnError(
            "the optimizer trains no gated layer of this model; construct it from "
            "prepared.parameters(), not from the original model's"
        )
    for name, layer in chosen.items():
        if not torch.isfinite(layer.weight).all():
            raise LearnError(f"{name}.weight holds NaN or infinite values; repair it first")
    return chosen


def _check_settings(
    strength: float, total_steps: int, temperature: float, logits_lr: float, logits_every: int
) -> None:
    if not (math.isfinite(strength) and strength >= 0):
        raise LearnError(f"strength must be finite and not negative, got {strength}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise LearnError(f"temperature must be positive, got {temperature}")
    if not (math.isfinite(logits_lr) and logits_lr >= 0):
        raise LearnError(f"logits_lr must be finite and not negative, got {logits_lr}")
    if total_steps < 1 or logits_every < 1:
        raise LearnError("total_steps and logits_every must be at least 1")
