"""Random networks and random masks, drawn by hypothesis so that failures shrink.

A network is a list of steps. Every step transforms the running tensor, of `channels` x `size` x
`size`, and is written as a user would.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from dspfx import PreparedModule
from dspfx.layers.gated import gated_layers
from helpers import randomise
from random_positions import (
    ALIKE,
    NORMS,
    Along,
    ClassToken,
    FromLast,
    NextBlock,
    Tokens,
)

ACTIVATIONS = {
    "relu": nn.ReLU,
    "inplace": lambda: nn.ReLU(inplace=True),
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "elu": nn.ELU,
}
SMOOTH = ("silu", "leaky", "elu")  # zero for nothing but zero
# steps after which values may be zero that no rule can know to be, or are where no hook sees it
BY_VALUE = ("assigned", "opaque", "mix", "instance", "pixels", "along", "tokens", "class token")


class ConvNorm(nn.Module):
    def __init__(self, c: int, o: int, k: int = 3, s: int = 1, g: int = 1, **how: Any) -> None:
        super().__init__()
        bias, norm, act = how.get("bias", False), how.get("norm", True), how.get("act", "relu")
        dilation, mode = how.get("dilation", 1), how.get("mode", "zeros")
        settings = {"dilation": dilation, "groups": g, "bias": bias, "padding_mode": mode}
        self.conv = nn.Conv2d(c, o, k, s, k // 2 * dilation, **settings)
        self.norm = nn.BatchNorm2d(o) if norm else None
        self.act = ACTIVATIONS[act]() if act else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.act is None else self.act(x)


class Computed(nn.Module):
    """A convolution whose weight a parametrisation computes, perhaps a depthwise one."""

    def __init__(self, c: int, o: int, kind: str, act: str, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            conv = nn.Conv2d(c, o, 3, padding=1, groups=c if c == o else 1)
            self.conv = getattr(parametrizations, kind)(conv)
        self.norm, self.act = nn.BatchNorm2d(o), ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Residual(nn.Module):
    """Two convolutions beside the identity; `late` normalises and activates after the sum."""

    def __init__(self, c: int, inner: int, late: bool, project: bool, act: str) -> None:
        super().__init__()
        self.a = ConvNorm(c, inner, act=act)
        self.b = ConvNorm(inner, c, norm=not late, act="")
        self.shortcut = ConvNorm(c, c, 1, act="") if project else nn.Identity()
        self.norm = nn.BatchNorm2d(c) if late else nn.Identity()
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        y += self.shortcut(x)
        return self.act(self.norm(y))


class Concat(nn.Module):
    def __init__(self, c: int, a: int, b: int, dense: bool, act: str) -> None:
        super().__init__()
        self.a, self.b, self.dense = ConvNorm(c, a, act=act), ConvNorm(c, b, 1, act=act), dense

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.a(x), self.b(x)]
        return torch.cat([x, *parts] if self.dense else parts, 1)


class Split(nn.Module):
    """Uneven parts, in a tuple; one is convolved, both are concatenated, swapped or not."""

    def __init__(self, c: int, first: int, swap: bool, chunk: bool, act: str) -> None:
        super().__init__()
        self.sizes = [c - c // 2, c // 2] if chunk else [first, c - first]
        self.chunk, self.swap = chunk, swap
        self.conv = ConvNorm(self.sizes[1], self.sizes[1], act=act)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(2, 1) if self.chunk else torch.split(x, self.sizes, 1)
        parts = parts[:-1] + (self.conv(parts[-1]),)  # noqa: RUF005 (a sum of parts is drawn)
        return torch.cat(parts[::-1] if self.swap else parts, dim=1)


class Slice(nn.Module):
    """Channels in another order, some of them doubled; assigned or concatenated."""

    def __init__(self, c: int, first: int, assign: bool) -> None:
        super().__init__()
        self.first, self.assign = first, assign

    def forward(self, x: Tensor) -> Tensor:
        if self.assign:
            y = torch.zeros_like(x)
            y[:, -self.first :] = x[:, : self.first] * 2
            y[:, : -self.first] += x[:, self.first :]
            return y
        return torch.cat([x[:, self.first :], x[:, : self.first] * 2], 1)


class SqueezeExcite(nn.Module):
    def __init__(self, c: int, inner: int, conv: bool, act: str) -> None:
        super().__init__()
        self.conv = conv
        self.down = nn.Conv2d(c, inner, 1) if conv else nn.Linear(c, inner)
        self.up = nn.Conv2d(inner, c, 1) if conv else nn.Linear(inner, c)
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, 1) if self.conv else x.mean((2, 3))
        s = torch.sigmoid(self.up(self.act(self.down(s))))
        return x * (s if self.conv else s[:, :, None, None])


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w)
        return x.transpose(1, 2).contiguous().view(b, c, h, w)


class Scale(nn.Module):
    """A parameter for each channel, used directly."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(c, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Twice(nn.Module):
    """One convolution and norm called two times."""

    def __init__(self, c: int, act: str) -> None:
        super().__init__()
        self.body = ConvNorm(c, c, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x)) + x


class PixelGate(nn.Module):
    """One channel that scales every position."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.conv(x))


class Up(nn.Module):
    """A transposed convolution that doubles the size, by its settings or since it is asked to."""

    def __init__(self, c: int, o: int, groups: int, norm: bool, act: str, sized: bool) -> None:
        super().__init__()
        self.sized = sized
        self.conv = nn.ConvTranspose2d(c, o, 3, 2, 1, output_padding=1, groups=groups)
        self.norm = nn.BatchNorm2d(o) if norm else nn.Identity()
        self.act = ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        size = [2 * n for n in x.shape[2:]] if self.sized else None
        return self.act(self.norm(self.conv(x, output_size=size)))


class Pixels(nn.Module):
    """Channels to space and back, with a convolution between; or the other way round."""

    def __init__(self, c: int, up: bool, act: str) -> None:
        super().__init__()
        here, there = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        self.first, self.last = (there, here) if up else (here, there)
        inner = c // 4 if up else c * 4
        self.conv = ConvNorm(inner, inner, 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(self.first(x)))


class Shuffled(nn.Module):
    """Four times the channels, shuffled up; then down again, so that the size stays."""

    def __init__(self, c: int, o: int, bias: bool, pool: bool, act: str) -> None:
        super().__init__()
        self.conv, self.up = ConvNorm(c, 4 * o, bias=bias, norm=not bias, act=act), PixelUp()
        self.down = nn.AvgPool2d(2) if pool else nn.Conv2d(o, o, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.conv(x)))


class PixelUp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x, 2)


class Gated(nn.Module):
    """A gated linear unit, in one of the ways in which they are written."""

    def __init__(self, c: int, o: int, how: str, norm: bool) -> None:
        super().__init__()
        self.how, self.glu = how, nn.GLU(1)
        self.conv = ConvNorm(c, 2 * o, 1, bias=True, norm=norm, act="")

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "chunk":
            a, b = x.chunk(2, 1)
            return a * b.sigmoid()
        return self.glu(x) if self.how == "module" else F.glu(x, dim=1)


class ChannelsLast(nn.Module):
    """A linear layer over channels that are moved to the end, and back."""

    def __init__(self, c: int, o: int, norm: bool, act: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c) if norm else nn.Identity()
        self.fc, self.act = nn.Linear(c, o), ACTIVATIONS[act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(self.norm(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2).contiguous()


class Mixed(nn.Module):
    """Reshapes that mix channels and positions, before and after a convolution."""

    def __init__(self, c: int, size: int, rows: bool, act: str) -> None:
        super().__init__()
        self.shape = (size, c, size) if rows else (c * size, 1, size)
        self.back = (c, size, size)
        self.conv = ConvNorm(self.shape[0], self.shape[0], 1, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(-1, *self.shape)).reshape(x.shape[0], *self.back)


class Mirrored(nn.Module):
    """One convolution for the image and its mirror image."""

    def __init__(self, c: int, act: str) -> None:
        super().__init__()
        self.body = ConvNorm(c, c, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(self.body(x), self.body(x.flip(3)).flip(3))


class Overwrites(nn.Module):
    """In-place arithmetic on a value, on what the step is given, and by way of a view."""

    def __init__(self, c: int, how: str) -> None:
        super().__init__()
        self.conv, self.how = ConvNorm(c, c, act=""), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "view":  # an opaque leaf
            x = x.clone()
            x.flatten(2)[:, :1] *= 2
        elif self.how == "given":
            x.mul_(0.5)
        y = z = self.conv(x)
        z += x
        z *= 1.5
        return F.leaky_relu(y, 0.2, inplace=True)


class Attention(nn.Module):
    """Every channel scaled by a vector, every position by a map."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.vector, self.map = nn.Linear(c, c), nn.Conv2d(c, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        vector = self.vector(x.amax((2, 3))).unsqueeze(-1).unsqueeze(-1)
        return x * vector.sigmoid() * self.map(x).tanh()


class Head(nn.Module):
    def __init__(self, c: int, size: int, kind: str) -> None:
        super().__init__()
        self.kind, self.features = kind, c * size * size
        inputs = c if kind in ("pool", "two outputs") else self.features
        self.fc = nn.Conv2d(c, 3, 1) if kind == "conv" else nn.Linear(inputs, 3)

    def forward(self, x: Tensor) -> Any:
        if self.kind == "conv":
            return self.fc(x)
        if self.kind == "pool":
            return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))
        if self.kind == "two outputs":
            return {"features": x, "scores": self.fc(x.mean((-1, -2)))}
        if self.kind == "hard-coded":
            return self.fc(x.reshape(-1, self.features))
        return self.fc(x.contiguous().view(x.size(0), -1))


class RandomNetwork(nn.Module):
    """Takes `[N, 3, size, size]`, or `[N, size, size, 3]` where channels come `last`."""

    def __init__(self, steps: list[nn.Module], size: int, last: bool = False) -> None:
        super().__init__()
        self.steps, self.size, self.last = nn.Sequential(*steps), size, last

    def forward(self, x: Tensor) -> Any:
        return self.steps(x)

    def inputs(self, seed: int = 0, samples: int = 3, larger: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = samples, 3, self.size + larger, self.size + larger
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.permute(0, 2, 3, 1).contiguous() if self.last else x


@st.composite
def networks(
    draw: st.DrawFn,
    activations: tuple[str, ...] = tuple(ACTIVATIONS),
    without: tuple[str, ...] = (),
) -> RandomNetwork:
    """A network in float64, of at most five steps that are not in `without`, and a head."""
    act = st.sampled_from(activations)
    kinds = st.sampled_from([kind for kind in STEPS if kind not in without])
    start = size = draw(st.integers(6, 9))
    channels = draw(WIDTH)
    steps: list[nn.Module] = [ConvNorm(3, channels, act=draw(act))]
    last = "along" not in without and draw(st.integers(0, 4)) == 0
    if last:
        steps.insert(0, FromLast(tuple(draw(st.lists(st.sampled_from(ALIKE), max_size=2)))))
    for kind in draw(st.lists(kinds, min_size=1, max_size=5)):
        step = STEPS[kind](draw, channels, size, act)
        if step is not None:
            made, channels, size = step
            steps.append(made)
    heads = ["pool", "conv", "flatten", "hard-coded", "two outputs"]
    steps.append(Head(channels, size, draw(st.sampled_from(heads))))
    network = RandomNetwork(steps, start, last)
    randomise(network, draw(st.integers(0, 99)))
    return network.double().eval()


# a step draws itself for `channels` and `size`; None where it cannot follow
Step = tuple[nn.Module, int, int] | None
WIDTH = st.integers(1, 9)
FLAG = st.booleans()
LARGEST = 16


def _conv(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    o, stride, k = draw(WIDTH), draw(st.integers(1, 2)), draw(st.sampled_from([1, 3]))
    mode = draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
    dilation = draw(st.integers(1, 2))
    if size <= k // 2 * dilation:
        mode = "zeros"
    step = ConvNorm(c, o, k, stride, act=draw(act), dilation=dilation, mode=mode)
    return step, o, (size - 1) // stride + 1


def _bare(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    o = draw(WIDTH)
    norm, a = draw(FLAG), draw(st.one_of(st.just(""), act))
    return ConvNorm(c, o, bias=True, norm=norm, act=a), o, size


def _computed(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    kind = draw(st.sampled_from(["weight_norm", "spectral_norm", "orthogonal"]))
    o = draw(WIDTH)
    return Computed(c, o, kind, draw(act), draw(st.integers(0, 9))), o, size


def _residual(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return Residual(c, draw(WIDTH), draw(FLAG), draw(FLAG), draw(act)), c, size


def _concat(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    a, b, dense = draw(WIDTH), draw(WIDTH), draw(FLAG)
    return Concat(c, a, b, dense, draw(act)), a + b + c * dense, size


def _split(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    first = draw(st.integers(1, max(c - 1, 1)))
    return (Split(c, first, draw(FLAG), draw(FLAG), draw(act)), c, size) if c > 1 else None


def _slice(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return (Slice(c, draw(st.integers(1, c - 1)), False), c, size) if c > 1 else None


def _assigned(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return (Slice(c, draw(st.integers(1, c - 1)), True), c, size) if c > 1 else None


def _depthwise(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return ConvNorm(c, c, g=c, bias=draw(FLAG), norm=draw(FLAG), act=draw(act)), c, size


def _grouped(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    groups = draw(st.integers(2, 3))
    inner, o = 4 * groups, groups * draw(st.integers(1, 3))
    first, last = ConvNorm(c, inner, 1, act=draw(act)), ConvNorm(inner, o, g=groups, act=draw(act))
    return nn.Sequential(first, last), o, size


def _grouped_chain(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    """Layers with groups of their own that read each other, whose channels may go unevenly."""
    groups = draw(st.integers(2, 4))
    width = 3 * groups
    steps = [ConvNorm(c, width, 1, act=draw(act))]
    kernels = draw(st.lists(st.sampled_from([1, 3]), min_size=1, max_size=3))
    steps += [ConvNorm(width, width, kernel, g=groups, act=draw(act)) for kernel in kernels]
    return nn.Sequential(*steps), width, size


def _squeeze(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return SqueezeExcite(c, draw(WIDTH), draw(FLAG), draw(act)), c, size


def _shuffle(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    if c % 2:
        return None
    return (Shuffle(2) if draw(FLAG) else nn.ChannelShuffle(2)), c, size


def _pool(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    kind = draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))
    return (kind(2), c, size // 2) if size > 1 else None


def _twice(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return (Twice(c, draw(act)) if draw(FLAG) else Mirrored(c, draw(act))), c, size


def _scale(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return Scale(c), c, size


def _pixel_gate(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return (PixelGate(c) if draw(FLAG) else Attention(c)), c, size


def _up(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    groups = draw(st.sampled_from([g for g in (1, 2, 3, c) if c % g == 0]))
    o = groups * draw(st.integers(1, 3))
    step = Up(c, o, groups, draw(FLAG), draw(act), draw(FLAG))
    return (step, o, 2 * size) if 2 * size <= LARGEST else None


def _pixels(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    up = c % 4 == 0 and 2 * size <= LARGEST and draw(FLAG)
    return (Pixels(c, up, draw(act)), c, size) if up or size % 2 == 0 else None


def _shuffled(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    o = draw(st.integers(1, 5))
    return Shuffled(c, o, draw(FLAG), draw(FLAG), draw(act)), o, size


def _gated(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    o = draw(WIDTH)
    return Gated(c, o, draw(st.sampled_from(["chunk", "module", "function"])), draw(FLAG)), o, size


def _channels_last(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    o = draw(WIDTH)
    return ChannelsLast(c, o, draw(FLAG), draw(act)), o, size


def _mix(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return Mixed(c, size, draw(FLAG), draw(act)), c, size


def _group_norm(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    groups = draw(st.sampled_from([g for g in (1, 2, 3, c) if c % g == 0]))
    return nn.Sequential(nn.GroupNorm(groups, c), ACTIVATIONS[draw(act)]()), c, size


def _instance_norm(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return (nn.InstanceNorm2d(c, affine=draw(FLAG)), c, size) if size > 1 else None


def _along(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return Along(draw(st.sampled_from(ALIKE)), draw(st.integers(2, 3))), c, size


def _tokens(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return Tokens(c, draw(WIDTH), draw(st.sampled_from(["linear", "spelt", "fused"]))), c, size


def _next_block(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return NextBlock(c, draw(WIDTH), draw(st.sampled_from(NORMS)), draw(FLAG)), c, size


def _class_token(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    norm = draw(st.sampled_from(NORMS))
    return ClassToken(c, draw(WIDTH), norm, draw(FLAG), draw(FLAG)), c, size


def _overwrites(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return Overwrites(c, draw(st.sampled_from(["value", "given"]))), c, size


def _opaque(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return Overwrites(c, "view"), c, size


def _parametric(draw: st.DrawFn, c: int, size: int, act: Any) -> Step:
    return nn.PReLU(c if draw(FLAG) else 1), c, size


STEPS = {
    "conv": _conv,
    "bare": _bare,
    "computed": _computed,
    "residual": _residual,
    "concat": _concat,
    "split": _split,
    "slice": _slice,
    "assigned": _assigned,
    "depthwise": _depthwise,
    "grouped": _grouped,
    "grouped chain": _grouped_chain,
    "se": _squeeze,
    "shuffle": _shuffle,
    "pool": _pool,
    "twice": _twice,
    "scale": _scale,
    "pixel gate": _pixel_gate,
    "up": _up,
    "pixels": _pixels,
    "shuffled": _shuffled,
    "gated": _gated,
    "last": _channels_last,
    "mix": _mix,
    "group norm": _group_norm,
    "instance": _instance_norm,
    "prelu": _parametric,
    "overwrites": _overwrites,
    "opaque": _opaque,
    "along": _along,
    "tokens": _tokens,
    "next block": _next_block,
    "class token": _class_token,
}


@dataclass(frozen=True)
class MaskRecipe:
    """How to draw the mask of every gated layer."""

    seed: int
    modes: tuple[str, ...]

    def masks(self, prepared: PreparedModule) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        layers = gated_layers(prepared)
        modes = [self.modes[i % len(self.modes)] for i in range(len(layers))]
        return {
            name: self._mask(mode, *layer.gate.mask.shape, len(layer.gate.logits), generator)
            for mode, (name, layer) in zip(modes, layers.items(), strict=True)
        }

    @staticmethod
    def _mask(mode: str, o: int, c: int, groups: int, generator: torch.Generator) -> Tensor:
        group = torch.randint(groups, (o,), generator=generator)
        keep = torch.rand(groups, c, generator=generator) < 0.5
        if mode == "dead":
            keep[:] = False
        elif mode == "full":
            keep[:] = True
        elif mode == "survivor":
            keep[:] = False
            keep[0, int(torch.randint(c, (), generator=generator))] = True
        elif mode == "empty group":
            keep[0] = False
        mask = keep[group]
        if mode == "dropped":
            mask[torch.rand(o, generator=generator) < 0.4] = False
        return mask


def mask_recipes() -> st.SearchStrategy[MaskRecipe]:
    modes = ["half", "half", "dropped", "dropped", "empty group", "survivor", "full", "dead"]
    return st.builds(
        MaskRecipe,
        st.integers(0, 2**16),
        st.lists(st.sampled_from(modes), min_size=1, max_size=4).map(tuple),
    )
