"""How every network here is trained, whatever prunes it.

Fashion-MNIST-20k: the first 20,000 training images and all 10,000 test images of Debian's
`dataset-fashion-mnist`, padded from 28 to 32 with the background, normalised, repeated to three
channels. Training images are mirrored each by chance, and shifted by up to two pixels, a batch at
a time. SGD with momentum 0.9, batches of 128, a cosine for every cycle; the network of the last
epoch counts, none is chosen by its test accuracy.

Training computes in `precision()`: bfloat16 by autocast on processors that have instructions for
it, else float32. Evaluation is always in float32.
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dspfx
from dspfx.data import DEBIAN_FASHION_MNIST, batches, read_idx

BATCH = 128
SHIFT = 2
MEAN, DEVIATION = 0.2860, 0.3530

# one optimisation step on a batch, given what computes its loss
Step = Callable[[torch.optim.Optimizer, Callable[[], Tensor]], object]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Data:
    """Images `[N, 3, 32, 32]`, normalised, and labels `[N]`."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def steps(self, epochs: int) -> int:
        """Steps in so many passes over the training images."""
        return epochs * math.ceil(len(self.train_y) / BATCH)


@dataclass(frozen=True)
class Schedule:
    """One cosine from `lr` to nothing for each of `cycles`, which are numbers of epochs."""

    cycles: tuple[int, ...]
    lr: float
    weight_decay: float

    @property
    def epochs(self) -> int:
        """Passes over the training images."""
        return sum(self.cycles)


def fashion_mnist(images: int) -> Data:
    """The first `images` training images, and all test images."""
    parts = []
    for part, count in (("train", images), ("t10k", None)):
        raw = read_idx(DEBIAN_FASHION_MNIST / f"{part}-images-idx3-ubyte.gz")[:count]
        labels = read_idx(DEBIAN_FASHION_MNIST / f"{part}-labels-idx1-ubyte.gz")[:count]
        x = (F.pad(raw[:, None].float() / 255, [2] * 4) - MEAN) / DEVIATION
        parts += [x.expand(-1, 3, -1, -1), labels.long()]
    return Data(*parts)


def train(
    model: nn.Module,
    data: Data,
    schedule: Schedule,
    generator: torch.Generator,
    step: Step | None = None,
    loss: Loss | None = None,
) -> None:
    """Train `model` in place."""
    step, loss = step or plain_step, loss or cross_entropy
    layout = _layout(model)
    model.to(memory_format=layout).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        schedule.lr,
        momentum=0.9,
        weight_decay=schedule.weight_decay,
    )
    for epochs in schedule.cycles:
        steps = data.steps(epochs)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = schedule.lr
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            for images, y in _augmented(data, generator):
                x = images.contiguous(memory_format=layout)
                step(optimizer, functools.partial(_autocast, loss, model, x, y))
                cosine.step()


def accuracy(model: nn.Module, data: Data) -> float:
    """Top-1 on the test images, in percent; leaves the model in evaluation mode."""
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(_last(x)).argmax(1) == y).sum())
            for x, y in batches(data.test_x, data.test_y, 500)
        )
    return 100 * right / len(data.test_y)


def plain_step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    """One step of the optimizer."""
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The task's loss."""
    return F.cross_entropy(model(x), y)


def distilled(teacher: nn.Module) -> Loss:
    """The labels' loss and that of the teacher's answers, with the defaults of dspfx."""
    teacher.eval()

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(x)
        return dspfx.distillation_loss(model(x), target, y)

    return loss


def precision() -> torch.dtype:
    """What convolutions are trained in on this processor."""
    able = torch.cpu.get_capabilities()
    fast = able.get("amx_bf16") or able.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def _autocast(loss: Loss, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision() == torch.bfloat16):
        return loss(model, x, y)


def _augmented(data: Data, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: images mirrored each by chance, every batch shifted by up to `SHIFT` pixels."""
    background = float(data.train_x.min())
    for images, y in batches(data.train_x, data.train_y, BATCH, generator):
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        down, right = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
        padded = F.pad(x, [SHIFT] * 4, value=background)
        yield padded[:, :, down : down + x.shape[2], right : right + x.shape[3]], y


def _layout(model: nn.Module) -> torch.memory_format:
    """Channels last, which is faster; with odd numbers of them, its gradients in float32 crash."""
    filters = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    crashes = precision() == torch.float32 and any(count % 8 for count in filters)
    return torch.contiguous_format if crashes else torch.channels_last


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def generator(*seeds: object) -> torch.Generator:
    """A generator of its own for every combination of `seeds`, the same in every process."""
    return torch.Generator().manual_seed(zlib.crc32(repr(seeds).encode()))
