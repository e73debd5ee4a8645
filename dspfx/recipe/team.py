"""The team of processes that a run has: one, or as many as `torchrun` has started.

`batch` counts the images of all of them together, so that a run takes the same steps however many
there are. What differs, but for rounding, is random: augmentation and dropout are drawn by every
process; and batch norms see the share of their own process, the running statistics that count being
those of the first. It alone writes files and prints.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dspfx.errors import RecipeError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """Which of the processes this is, and what they do together.

    Attributes:
        rank: the number of this one, from 0.
        count: how many there are.
        device: of this one.
        local_rank: its number on this machine.
    """

    rank: int
    count: int
    device: torch.device
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model`, made to average its gradients over the processes, where there are several."""
        if self.count == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of `batch`, as many as the others have: some may be in two."""
        missing = -len(batch) % self.count
        if missing:
            batch = torch.cat([batch, batch.repeat(-(-missing // len(batch)))[:missing]])
        return batch[self.rank :: self.count]

    def part(self, order: Tensor) -> Tensor:
        """This process's part of `order`; each of it is in the part of one process alone."""
        return order[self.rank :: self.count]

    def sums(self, *values: float) -> list[float]:
        """The sums of `values` over all processes."""
        if self.count == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(together)
        return [float(value) for value in together]

    def largest(self, value: float) -> float:
        """The largest `value` of all processes; not a number if one is not."""
        if self.count == 1:
            return value
        found = [
            torch.zeros((), dtype=torch.float64, device=self.device) for _ in range(self.count)
        ]
        dist.all_gather(found, torch.tensor(value, dtype=torch.float64, device=self.device))
        return float(torch.stack(found).max())

    def equalise(self, model: nn.Module) -> None:
        """Give the buffers of `model`, running statistics above all, the values of the first."""
        if self.count > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.broadcast(buffer, 0)

    def one_first(self, make: Callable[[], T]) -> T:
        """What `make` gives, which is called by one process of every machine before the others."""
        made = make() if self.local_rank == 0 else None
        self.wait()
        return made if made is not None else make()

    def wait(self) -> None:
        """Wait here until all processes have come here."""
        if self.count > 1:
            dist.barrier()


def rank() -> int:
    """The number of this process, before or without a group of them."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def team(device: str = "auto") -> Iterator[Team]:
    """This process, in the group that the environment of `torchrun` names, or alone.

    Args:
        device: `auto` for a GPU if there is one, else the CPU; or a name that torch knows. Where
            several processes run on GPUs, each has the one of its local rank.

    Raises:
        RecipeError: there is no such device.
    """
    count, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    chosen = device_of(device, local if count > 1 else None)
    if count == 1:
        yield Team(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Team(rank(), count, chosen, local)
    finally:
        dist.destroy_process_group()


def device_of(name: str, local_rank: int | None = None) -> torch.device:
    """The device called `name`, `auto` included; of several GPUs the one of `local_rank`.

    Raises:
        RecipeError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"'{name}' is no device of this machine; cpu works") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError("there is no CUDA device that torch can use; --device cpu works")
    if device.type == "cuda" and local_rank is not None:
        return torch.device("cuda", local_rank)
    return device
