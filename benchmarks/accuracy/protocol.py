"""How every network here is trained, whatever prunes it.

Fashion-MNIST-20k: the first 20,000 training images and all 10,000 test images of Debian's
`dataset-fashion-mnist`, padded from 28 to 32 with the background, normalised, repeated to three
channels. Training images are mirrored each by chance, and shifted by up to two pixels, a batch at
a time. SGD with momentum 0.9, batches of 128, a cosine for every cycle; the network of the last
epoch counts, none is chosen by its test accuracy.

Everything is pruned on the CPU, and trained and tested on `device()`. Training computes in
`precision()`: bfloat16 by autocast where there are instructions for it, else float32. Evaluation is
never in bfloat16; convolutions on CUDA keep the ten bits of TF32.
"""

import contextlib
import copy
import functools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dspfx
from benchmarks.accuracy.graphed import Graphed
from dspfx.recipe.images.datasets import DEBIAN_FASHION_MNIST, batches, read_idx

BATCH = 128
SHIFT = 2
MEAN, DEVIATION = 0.2860, 0.3530

# one optimisation step on a batch, given what computes its loss
Step = Callable[[torch.optim.Optimizer, Callable[[], Tensor]], object]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Data:
    """Images `[N, 3, 32, 32]`, normalised, and labels `[N]`, on `device()`."""

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


@functools.cache
def fashion_mnist(images: int) -> Data:
    """The first `images` training images, and all test images."""
    parts = []
    for part, count in (("train", images), ("t10k", None)):
        raw = read_idx(DEBIAN_FASHION_MNIST / f"{part}-images-idx3-ubyte.gz")[:count]
        labels = read_idx(DEBIAN_FASHION_MNIST / f"{part}-labels-idx1-ubyte.gz")[:count]
        x = (F.pad(raw[:, None].float() / 255, [2] * 4) - MEAN) / DEVIATION
        parts += [x.expand(-1, 3, -1, -1), labels.long()]
    return Data(*(part.to(device()) for part in parts))


def train(
    model: nn.Module,
    data: Data,
    schedule: Schedule,
    generator: torch.Generator,
    step: Step | None = None,
    loss: Loss | None = None,
    special: int | None = None,
) -> None:
    """Train `model`, which is on the CPU, in place.

    `step` is for the first `special` steps, by default for all; the rest are plain.
    """
    loss, layout = loss or cross_entropy, _layout(model)
    with on_device(model):
        model.to(memory_format=layout).train()  # type: ignore[call-overload]
        optimizer = _sgd(model, schedule, graphed=step is None or special is not None)

        def one(step: Step, x: Tensor, y: Tensor) -> None:
            step(optimizer, functools.partial(_autocast, loss, model, x, y))

        plain = functools.partial(one, plain_step)
        own = functools.partial(one, step) if step else plain
        run = Graphed(plain) if device().type == "cuda" else plain
        left = 0 if step is None else data.steps(schedule.epochs) if special is None else special
        for epochs in schedule.cycles:
            steps, done = data.steps(epochs), 0
            for _ in range(epochs):
                for images, y in _augmented(data, generator):
                    _set_rate(optimizer, schedule.lr * (1 + math.cos(math.pi * done / steps)) / 2)
                    (own if left > 0 else run)(images.contiguous(memory_format=layout), y)
                    done, left = done + 1, left - 1


def _sgd(model: nn.Module, schedule: Schedule, graphed: bool) -> torch.optim.Optimizer:
    """The optimizer; for a graph its rate is a tensor."""
    graphed = graphed and device().type == "cuda"
    return torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        torch.tensor(schedule.lr, device=device()) if graphed else schedule.lr,
        momentum=0.9,
        weight_decay=schedule.weight_decay,
        fused=graphed or None,
    )


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextlib.contextmanager
def on_device(model: nn.Module) -> Iterator[None]:
    """`model` is on `device()`, and afterwards on the CPU again."""
    model.to(device())
    try:
        yield
    finally:
        model.to("cpu")


def accuracy(model: nn.Module, data: Data) -> float:
    """Top-1 on the test images, in percent; leaves the model in evaluation mode."""
    model.eval()
    with torch.no_grad(), on_device(model):
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
    teacher = copy.deepcopy(teacher).to(device()).eval()

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(x)
        return dspfx.distillation_loss(model(x), target, y)

    return loss


def device() -> torch.device:
    """Where networks are trained and tested."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision() -> torch.dtype:
    """What training computes in on this machine."""
    if device().type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        fast = bool(able.get("amx_bf16") or able.get("avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def _autocast(loss: Loss, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(device().type, torch.bfloat16, enabled=precision() == torch.bfloat16):
        return loss(model, x, y)


def _augmented(data: Data, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: images mirrored each by chance, every batch shifted by up to `SHIFT` pixels."""
    background = float(data.train_x.min())
    for images, y in batches(data.train_x, data.train_y, BATCH, generator):
        mirrored = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
        x = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        down, right = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
        padded = F.pad(x, [SHIFT] * 4, value=background)
        yield padded[:, :, down : down + x.shape[2], right : right + x.shape[3]], y


def _layout(model: nn.Module) -> torch.memory_format:
    """Channels last, which is faster; with odd numbers of them, its gradients in float32 crash."""
    filters = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    crashes = (device().type, precision()) == ("cpu", torch.float32) and any(
        count % 8 for count in filters
    )
    return torch.contiguous_format if crashes else torch.channels_last


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def noise(generator: torch.Generator) -> torch.Generator:
    """A generator on `device()`, seeded by `generator`."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device()).manual_seed(seed)


def generator(*seeds: object) -> torch.Generator:
    """A generator of its own for every combination of `seeds`, the same in every process."""
    return torch.Generator().manual_seed(zlib.crc32(repr(seeds).encode()))
