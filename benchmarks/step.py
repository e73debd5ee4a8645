"""What a step of `GroupLearner` costs beside a plain training step, and one of what is pruned.

    python -m benchmarks.step

CIFAR ResNets, batch 128, random images. Times are medians, taken in turns. Memory is counted, not
measured: the bytes of all tensors that are alive at once and were made during a step.

glibc is told to keep the memory that is freed. Otherwise it is handed back and faulted in again
several times a step, which takes up to a third of either loop's time, in shares that depend on what
else lies in the heap; `--trim` shows it.
"""

import ctypes
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
import typer
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dspfx
from dspfx.recipe.networks.cifar_resnet import CifarResNet
from dspfx.utils.timing import medians

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)

KEPT = (0.5, 0.35, 0.2, 0.1, 0.05)  # of the MACs

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, weight_decay=1e-3),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 1e-3),
}


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors made while it is active, and how many were alive at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, and count what it returns that is not one of its arguments."""
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in given and key not in self.alive:
                self.alive[key] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that tensors made by `call` take up at once."""
    with PeakBytes() as counter:
        call()
    return counter.peak


def extra_memory(
    model: nn.Module,
    make: Callable[[nn.Module], torch.optim.Optimizer],
    loss: Callable[[nn.Module], Tensor],
) -> float:
    """By how much the peak of a group-learning step exceeds a plain one's, in sizes of `model`.

    Args:
        model: a prepared model in training mode.
        make: an optimizer for it.
        loss: of a batch.
    """
    optimizer = make(model)
    learner = dspfx.GroupLearner(model, optimizer, total_steps=9)
    closure = functools.partial(loss, model)
    plain, learning = plain_step(optimizer, closure), functools.partial(learner.step, closure)
    for call in (plain, learning):  # states of optimizers are made at first steps
        call()
        optimizer.zero_grad()
    without = peak_bytes(plain)
    optimizer.zero_grad()
    size = sum(p.nbytes for p in model.parameters())
    return (peak_bytes(learning) - without) / size


def plain_step(
    optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]
) -> Callable[[], None]:
    """One step of ordinary training."""

    def step() -> None:
        optimizer.zero_grad()
        closure().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def times(depth: int, batch: int, rounds: int) -> dict[str, float]:
    """Median seconds of a plain step, and of learning at every and at every 8th step."""
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x), y)

    def learning(every: int) -> Callable[[], object]:
        model = prepared_resnet(depth)
        optimizer = OPTIMIZERS["SGD"](model)
        learner = dspfx.GroupLearner(model, optimizer, total_steps=10**6, logits_every=every)

        def step() -> None:
            for _ in range(every):
                learner.step(lambda: loss(model))

        return step

    model = prepared_resnet(depth)
    plain = plain_step(OPTIMIZERS["SGD"](model), lambda: loss(model))
    calls = {"plain": plain, "every step": learning(1), "every 8th step": learning(8)}
    taken = medians(calls, rounds, warm_up=1.0)
    return {**taken, "every 8th step": taken["every 8th step"] / 8}


def times_when_pruned(depth: int, batch: int, rounds: int, kept: float) -> dict[str, float]:
    """Median seconds of a plain step of a masked network, and of `dspfx.narrow` of it.

    Channels and then the inputs of clustered groups are pruned to `kept` of the MACs.
    """
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    masked = prepared_resnet(depth)
    dspfx.prune_channels(masked, dspfx.Budget(macs=kept**0.5, count="masks"))
    dspfx.cluster_groups(masked)
    dspfx.prune(masked, dspfx.Budget(macs=kept, count="masks"))
    models = {"masked": masked, "narrow": dspfx.narrow(masked)}
    return medians({n: _plain(m, x, y) for n, m in models.items()}, rounds, warm_up=1.0)


def _plain(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    return plain_step(OPTIMIZERS["SGD"](model), lambda: F.cross_entropy(model(x), y))


def prepared_resnet(depth: int) -> nn.Module:
    """A CIFAR ResNet with four groups, in training mode."""
    torch.manual_seed(0)
    return dspfx.prepare(CifarResNet(depth), torch.zeros(2, 3, 32, 32)).train()


def main(
    depth: Annotated[int, typer.Option(help="layers of the CIFAR ResNet")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="images")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="how often each is timed")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="threads torch uses")] = 2,
    trim: Annotated[bool, typer.Option(help="let the allocator return freed memory")] = False,
) -> None:
    """Print times relative to a plain step, and extra memory relative to the parameters."""
    if not trim:
        keep_freed_memory()
    torch.set_num_threads(threads)
    taken = times(depth, batch, rounds)
    rows = [(name, f"{1e3 * s:.1f}", f"{s / taken['plain']:.2f}") for name, s in taken.items()]
    print(tabulate(rows, ("logits learn at", "ms", "over plain"), disable_numparse=True))
    image, label = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    extra = [
        (
            name,
            extra_memory(prepared_resnet(depth), make, lambda m: F.cross_entropy(m(image), label)),
        )
        for name, make in OPTIMIZERS.items()
    ]
    print()
    print(tabulate(extra, ("optimizer", "extra memory over parameters"), floatfmt=".2f"))
    pruned = []
    for kept in KEPT:
        found = times_when_pruned(depth, batch, rounds, kept)
        times_faster = found["masked"] / found["narrow"]
        pruned.append((f"{kept:.0%}", *(f"{1e3 * s:.1f}" for s in found.values()), times_faster))
    print()
    print(tabulate(pruned, ("MACs left", "masked, ms", "narrow, ms", "ratio"), floatfmt=".2f"))


def keep_freed_memory() -> None:
    """Let the allocator of the C library neither return freed memory nor map it piece by piece."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**25)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


if __name__ == "__main__":
    typer.run(main)
