"""Steps and networks whose positions lie where channels usually do, or are moved themselves.

Whatever the code does with rows, columns, frames or tokens it does at every size: a compact model
that has learned their number from the example is wrong for the next image.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import randomise

# of [N, T, C]: moves along dimension 1, and does something else at every T
ALONG: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "shift by half": lambda x: torch.cat([x[:, x.shape[1] // 2 :], x[:, : x.shape[1] // 2]], 1),
    "slice": lambda x: x[:, 1:],
    "stride": lambda x: x[:, ::2],
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split": lambda x: torch.cat(torch.split(x, 2, 1)[1:], 1),
    "double": lambda x: torch.cat([x, x], 1),
    "interleave": lambda x: x.repeat_interleave(2, 1),
    "last first": lambda x: torch.cat([x[:, -1:], x], 1),
    "select": lambda x: x + x[:, -1].unsqueeze(1),
    "pad": lambda x: F.pad(x, (0, 0, 1, 2)),
    "pad with ones": lambda x: F.pad(x, (0, 0, 0, 1), value=1.0),
    "reflect": lambda x: F.pad(x.transpose(1, 2), (2, 1), mode="reflect").transpose(1, 2),
    "replicate": lambda x: F.pad(x.transpose(1, 2), (1, 2), mode="replicate").transpose(1, 2),
    "circular": lambda x: F.pad(x.transpose(1, 2), (1, 1), mode="circular").transpose(1, 2),
    "difference": lambda x: x[:, 1:] - x[:, :-1],
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "size": lambda x: x * x.shape[1] ** -0.5,
    "softmax": lambda x: x * x.softmax(1),
    "windows": lambda x: x.unfold(1, 3, 1).mean(-1),
}
# of these, the ones that leave as many as there were
ALIKE = ("flip", "roll", "shift by half", "chunk", "select", "mean", "size", "softmax")


class Along(nn.Module):
    """Moves along one dimension of an image, through `[N, T, C]`, channels first or last."""

    def __init__(self, name: str, dim: int) -> None:
        super().__init__()
        self.name, self.dim = name, dim

    def forward(self, x: Tensor) -> Tensor:
        lines = x.permute(0, 3, 2, 1) if self.dim == 2 else x.permute(0, 2, 3, 1)
        n, other, t, c = lines.shape
        moved = ALONG[self.name](lines.reshape(n * other, t, c)).reshape(n, other, -1, c)
        back = (0, 3, 2, 1) if self.dim == 2 else (0, 3, 1, 2)
        return moved.permute(back).contiguous()


class SingleHead(nn.Module):
    """Attention of tokens `[N, T, C]`, its shapes spelt out as in many vision transformers."""

    def __init__(self, c: int, inner: int, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(c, inner) for _ in range(3))
        self.out, self.fused = nn.Linear(inner, c), fused

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            layer(x).reshape(b, n, 1, layer.out_features).permute(0, 2, 1, 3)
            for layer in (self.q, self.k, self.v)
        )
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).reshape(b, n, self.out.in_features))


class Tokens(nn.Module):
    """An image as tokens, attention or a linear layer, and back."""

    def __init__(self, c: int, inner: int, kind: str) -> None:
        super().__init__()
        self.body = nn.Linear(c, c) if kind == "linear" else SingleHead(c, inner, kind == "fused")

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.body(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(n, c, h, w).contiguous()


class FromLast(nn.Module):
    """The first step for images `[N, H, W, C]`: something along H, W or both, then channels."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            n, h, w, c = x.shape
            x = ALONG[name](x.transpose(1, 2).reshape(n * w, h, c)).reshape(n, w, -1, c)
        return x.permute(0, 3, 1, 2).contiguous()


class SequenceNetwork(nn.Module):
    """Takes `[N, T, features]`, or `[N, features, T]` where `first`."""

    def __init__(self, steps: list[nn.Module], first: bool, features: int, head: nn.Linear) -> None:
        super().__init__()
        self.steps, self.head = nn.ModuleList(steps), head
        self.first, self.features = first, features

    def forward(self, x: Tensor) -> Any:
        x = x.transpose(1, 2) if self.first else x
        for step in self.steps:
            x = step(x)
        return {"pooled": self.head(x.mean(1)), "frames": x}

    def inputs(self, length: int, samples: int = 2, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = (samples, self.features, length) if self.first else (samples, length, self.features)
        return torch.randn(shape, generator=generator, dtype=torch.float64)


class Frames(nn.Module):
    """A function of frames `[N, T, C]`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ALONG[self.name](x)


class Convolved(nn.Module):
    """A convolution along the frames, channels moved to where it wants them and back."""

    def __init__(self, c: int, o: int, mode: str, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(c, o, 3, padding=1, padding_mode=mode)
        self.norm = nn.BatchNorm1d(o) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.transpose(1, 2))).relu().transpose(1, 2)


class Mapped(nn.Module):
    """A linear layer for every frame, normalised or not."""

    def __init__(self, c: int, o: int, norm: bool) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(c, o), nn.LayerNorm(o) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x)).relu()


class NextBlock(nn.Module):
    """As in ConvNeXt: a depthwise layer, a norm over channels at the end, two layers, a scale."""

    def __init__(self, c: int, inner: int, how: str, scaled: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.norm = ChannelNorm(c, how)
        self.up, self.down = nn.Linear(c, inner), nn.Linear(inner, c)
        self.gamma = nn.Parameter(torch.rand(c)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y)))
        y = y if self.gamma is None else self.gamma * y
        return x + y.permute(0, 3, 1, 2)


NORMS = ("module", "function", "plain", "rms", "rms function")


class ChannelNorm(nn.Module):
    """A norm over the last dimension, in one of the ways in which they are written."""

    def __init__(self, c: int, how: str) -> None:
        super().__init__()
        self.how = how
        kind = nn.RMSNorm if how.startswith("rms") else nn.LayerNorm
        self.norm = kind(c, elementwise_affine=how != "plain", eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "function":
            return F.layer_norm(x, (x.shape[-1],), self.norm.weight, self.norm.bias)
        if self.how == "rms function":
            return F.rms_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.eps)
        return self.norm(x)


class ClassToken(nn.Module):
    """As in ViT: tokens with one more, which is a parameter, an embedding, and a block of layers.

    The token is read by every position, or forgotten.
    """

    def __init__(self, c: int, inner: int, how: str, repeat: bool, embedded: bool) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, c))
        self.embedding = nn.Parameter(torch.randn(1, 1, c)) if embedded else None
        self.repeat, self.norm = repeat, ChannelNorm(c, how)
        self.up, self.down = nn.Linear(c, inner), nn.Linear(inner, c)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        token = self.token.repeat(n, 1, 1) if self.repeat else self.token.expand(n, -1, -1)
        y = torch.cat([token, x.flatten(2).transpose(1, 2)], 1)
        y = y if self.embedding is None else y + self.embedding
        y = y + self.down(self.up(self.norm(y)).relu())
        y = y[:, 1:] + y[:, :1]
        return y.transpose(1, 2).reshape(n, -1, h, w)


LENGTH = 12  # of the example; what is left of it after three halvings is 2


@st.composite
def sequences(draw: st.DrawFn) -> SequenceNetwork:
    """A network of frames in float64, of two to five steps, at most two of which halve them."""
    features = channels = draw(st.integers(2, 6))
    width, flag = st.integers(2, 8), st.booleans()
    steps: list[nn.Module] = []
    for kind in draw(
        st.lists(
            st.sampled_from(["conv", "conv", "linear", "attention", "along", "along"]),
            min_size=2,
            max_size=5,
        )
    ):
        if kind == "conv":
            o = draw(width)
            mode = draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
            steps.append(Convolved(channels, o, mode, draw(flag)))
            channels = o
        elif kind == "linear":
            o = draw(width)
            steps.append(Mapped(channels, o, draw(flag)))
            channels = o
        elif kind == "attention":
            steps.append(SingleHead(channels, draw(width), draw(flag)))
        else:
            steps.append(Frames(draw(st.sampled_from(sorted(ALONG)))))
    steps.append(Convolved(channels, channels, "zeros", draw(flag)))
    network = SequenceNetwork(steps, draw(flag), features, nn.Linear(channels, 3))
    randomise(network, draw(st.integers(0, 99)))
    return network.double().eval()
