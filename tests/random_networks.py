"""Random networks and random masks, drawn by hypothesis so that failures shrink.

A network is a list of steps. Every step transforms the running tensor, of `channels` x `size` x
`size`, and is written so that `fx` can trace it as a user's model would be.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from dspfx import PreparedModule
from dspfx.gates import gated_layers
from helpers import randomise

ACTIVATIONS = {
    "relu": nn.ReLU,
    "inplace": lambda: nn.ReLU(inplace=True),
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "elu": nn.ELU,
}
SMOOTH = ("silu", "leaky", "elu", "hardswish")


class ConvNorm(nn.Module):
    def __init__(self, c: int, o: int, k: int = 3, s: int = 1, g: int = 1, **how: Any) -> None:
        super().__init__()
        bias, norm, act = how.get("bias", False), how.get("norm", True), how.get("act", "relu")
        self.conv = nn.Conv2d(c, o, k, s, k // 2, groups=g, bias=bias)
        self.norm = nn.BatchNorm2d(o) if norm else None
        self.act = ACTIVATIONS[act]() if act else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.act is None else self.act(x)


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
    """Uneven parts; one is convolved, both are concatenated, swapped or not."""

    def __init__(self, c: int, first: int, swap: bool, chunk: bool, act: str) -> None:
        super().__init__()
        self.sizes = [c // 2, c - c // 2] if chunk else [first, c - first]
        self.chunk, self.swap = chunk and c % 2 == 0, swap
        self.conv = ConvNorm(self.sizes[1], self.sizes[1], act=act)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1) if self.chunk else torch.split(x, self.sizes, 1)
        b = self.conv(b)
        return torch.cat((b, a) if self.swap else (a, b), dim=1)


class Slice(nn.Module):
    def __init__(self, c: int, first: int) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
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
        return self.fc(x.view(x.size(0), -1))


class RandomNetwork(nn.Module):
    def __init__(self, steps: list[nn.Module]) -> None:
        super().__init__()
        self.steps = nn.Sequential(*steps)

    def forward(self, x: Tensor) -> Any:
        return self.steps(x)


@st.composite
def networks(draw: st.DrawFn, activations: tuple[str, ...] = tuple(ACTIVATIONS)) -> nn.Module:
    """A network in float64 that takes `[N, 3, 8, 8]`."""
    act = st.sampled_from(activations)
    width = st.integers(2, 9)
    flag = st.booleans()
    channels, size = draw(width), 8
    steps: list[nn.Module] = [ConvNorm(3, channels, act=draw(act))]
    for kind in draw(
        st.lists(
            st.sampled_from(
                (
                    *("conv", "conv", "residual", "residual", "concat", "split", "slice"),
                    *("depthwise", "grouped", "se", "shuffle", "pool", "twice", "scale"),
                    *("pixel", "bare"),
                )
            ),
            min_size=1,
            max_size=5,
        )
    ):
        c = channels
        if kind == "conv":
            channels, stride = draw(width), draw(st.integers(1, 2))
            steps.append(
                ConvNorm(c, channels, draw(st.sampled_from([1, 3])), stride, act=draw(act))
            )
            size = (size - 1) // stride + 1
        elif kind == "bare":
            channels = draw(width)
            norm, a = draw(flag), draw(st.sampled_from(["", *activations]))
            steps.append(ConvNorm(c, channels, bias=True, norm=norm, act=a))
        elif kind == "residual":
            steps.append(Residual(c, draw(width), draw(flag), draw(flag), draw(act)))
        elif kind == "concat":
            a, b, dense = draw(width), draw(width), draw(flag)
            steps.append(Concat(c, a, b, dense, draw(act)))
            channels = a + b + c * dense
        elif kind == "split" and c > 1:
            first = draw(st.integers(1, c - 1))
            steps.append(Split(c, first, draw(flag), draw(flag), draw(act)))
        elif kind == "slice" and c > 1:
            steps.append(Slice(c, draw(st.integers(1, c - 1))))
        elif kind == "depthwise":
            steps.append(ConvNorm(c, c, g=c, bias=draw(flag), norm=draw(flag), act=draw(act)))
        elif kind == "grouped":
            groups = draw(st.integers(2, 3))
            steps.append(ConvNorm(c, 2 * groups * 2, 1, act=draw(act)))
            channels = groups * draw(st.integers(1, 3))
            steps.append(ConvNorm(2 * groups * 2, channels, g=groups, act=draw(act)))
        elif kind == "se":
            steps.append(SqueezeExcite(c, draw(width), draw(flag), draw(act)))
        elif kind == "shuffle" and c % 2 == 0:
            steps.append(Shuffle(2))
        elif kind == "pool" and size > 1:
            steps.append(draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))(2))
            size //= 2
        elif kind == "twice":
            steps.append(Twice(c, draw(act)))
        elif kind == "scale":
            steps.append(Scale(c))
        elif kind == "pixel":
            steps.append(PixelGate(c))
    heads = ["pool", "conv", "flatten", "hard-coded", "two outputs"]
    steps.append(Head(channels, size, draw(st.sampled_from(heads))))
    return randomise(RandomNetwork(steps), draw(st.integers(0, 99))).double().eval()


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
