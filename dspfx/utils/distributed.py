"""The processes that train one model together, each on its share of every batch.

`DistributedDataParallel` averages the gradients; what is decided beside them is kept the same here.
All processes call the same functions in the same order.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dspfx.errors import DspfxError, LearnError

Found = TypeVar("Found")
ALIKE = 1e-4  # how far sums over equal tensors may be apart, relative to the norm


class Processes:
    """A process group; or one process by itself, for which all of this does nothing.

    Attributes:
        group: None for one process by itself.
        device: what objects are sent through; None for what the group prefers.
    """

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self.group = group
        self.device = device

    @staticmethod
    def of(model: nn.Module, group: Any = None) -> "Processes":
        """The processes of `group`, or of the `DistributedDataParallel` in `model`, or else all."""
        if not (dist.is_available() and dist.is_initialized()):
            return Processes()
        wrappers = (m for m in model.modules() if isinstance(m, DistributedDataParallel))
        if group is None:
            group = next((m.process_group for m in wrappers), dist.group.WORLD)
        devices = (p.device for p in model.parameters() if p.device.type != "cpu")
        return Processes(group if dist.get_world_size(group) > 1 else None, next(devices, None))

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.group is None

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Write the values that the first process has into `tensors`, in place."""
        if self.alone or not tensors:
            return
        flat = torch.cat([t.reshape(-1).to(tensors[0].device, torch.float64) for t in tensors])
        dist.broadcast(flat, group=self.group, group_src=0)
        parts = torch.split(flat, [t.numel() for t in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def of_first(self, find: Callable[[], Found]) -> Found:
        """What `find` gives in the first process, which alone calls it; a plain value.

        Raises:
            DspfxError: `find` raised it, on all processes. Where it raised something else, that
                is raised on the first one, and `DspfxError` on the others.
        """
        if self.alone:
            return find()
        error: Exception | None = None
        found: list[Any] = [None, None]
        if dist.get_rank(self.group) == 0:
            try:
                found = [find(), None]
            except Exception as raised:  # the others wait: they must hear of any
                error, found = raised, [None, _described(raised)]
        dist.broadcast_object_list(found, group=self.group, device=self.device, group_src=0)
        value: Found = found[0]
        if error is not None:
            raise error
        if found[1] is not None:
            kind, message = found[1]
            raise kind(message)
        return value

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all processes."""
        if self.alone:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def check_gradients(self, loss: Tensor, weights: Sequence[Tensor], *, finite: bool) -> None:
        """Refuse, on all processes, gradients that are not the same on all of them.

        Args:
            loss: of this process.
            weights: whose gradients are looked at.
            finite: whether the loss must be so, on all processes.

        Raises:
            LearnError: it is not so.
        """
        if self.alone:
            return
        gradients = [w.grad for w in weights if w.grad is not None]
        bad = bool(finite and not torch.isfinite(loss).all())
        any_bad, same = self._compare(bad, gradients, weights[0].device)
        if any_bad:
            raise LearnError(
                f"the loss of one of the processes is not finite, here it is {loss.item()}; this "
                "pass changed nothing. Lower the learning rate or the strength, or look for bad "
                "values in the batch"
            )
        if not same:
            raise LearnError(
                "the processes have different gradients; compute the loss by calling the model "
                "that DistributedDataParallel returned, not the one inside, and let it "
                "synchronise in the last micro-batch. Processes that train different models need "
                "process groups of their own: GroupLearner(..., process_group=...)"
            )

    def check_weights(self, weights: Sequence[Tensor]) -> None:
        """Refuse, on all processes, weights that are not the same on all of them.

        Raises:
            LearnError: they are not.
        """
        if self.alone:
            return
        _, same = self._compare(False, weights, weights[0].device)
        if not same:
            raise LearnError(
                "the processes have different weights; wrap the model in DistributedDataParallel "
                "before you construct GroupLearner. Processes that train different models need "
                "process groups of their own: GroupLearner(..., process_group=...)"
            )

    @torch.no_grad()
    def _compare(
        self, flag: bool, tensors: Sequence[Tensor], device: torch.device
    ) -> tuple[bool, bool]:
        """Whether any process has the `flag`, and whether all have about the same `tensors`.

        Sums tell apart what norms do not: those of large random tensors are nearly equal.
        """
        norm = nn.utils.get_total_norm(tensors).to(device, torch.float64)
        total = sum(
            (t.sum(dtype=torch.float64).to(device) for t in tensors), torch.zeros_like(norm)
        )
        values = torch.stack([norm, total])
        # infinite ones cannot be compared; a scaler may let them be
        values = torch.where(values.isfinite().all(), values, 0.0)
        extremes = torch.cat([values, -values, values.new_tensor([flag])])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.group)
        high, low, flags = torch.split(extremes, [2, 2, 1])
        return bool(flags), bool((high + low <= ALIKE * high[0]).all())


def _described(error: Exception) -> tuple[type[DspfxError], str]:
    """The class and the message of what the other processes raise."""
    if isinstance(error, DspfxError):
        return type(error), str(error)
    return DspfxError, f"the first process failed with {type(error).__name__}: {error}"
