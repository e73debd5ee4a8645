"""Ten models as users write them, each awkward in a way of its own."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_block(c: int, o: int, k: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o), nn.SiLU()
    )


class Bottleneck(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = conv_block(c, c), conv_block(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """YOLO's block: split, a growing list of features, one concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_block(3, 8)
        self.cv1 = conv_block(8, 12, 1)
        self.m = nn.ModuleList(Bottleneck(6) for _ in range(2))
        self.cv2 = conv_block(24, 10, 1)
        self.head = nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(self.stem(x)).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.head(self.cv2(torch.cat(y, 1)))


class UNet(nn.Module):
    """Unpadded convolutions, transposed convolutions, and skips cropped to fit."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(6, 8, 3), nn.GroupNorm(2, 8), nn.ReLU())
        self.bottom = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
        self.up1 = nn.ConvTranspose2d(12, 8, 2, 2)
        self.mix1 = nn.Sequential(nn.Conv2d(16, 8, 3), nn.ReLU())
        self.up2 = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.mix2 = nn.Sequential(nn.Conv2d(12, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.out = nn.Conv2d(6, 2, 1)

    @staticmethod
    def crop(x: Tensor, like: Tensor) -> Tensor:
        top, left = (x.shape[2] - like.shape[2]) // 2, (x.shape[3] - like.shape[3]) // 2
        return x[:, :, top : top + like.shape[2], left : left + like.shape[3]]

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        y = self.up1(self.bottom(F.max_pool2d(b, 2)))
        y = self.mix1(torch.cat([self.crop(b, y), y], 1))
        y = self.up2(y)
        return self.out(self.mix2(torch.cat([self.crop(a, y), y], dim=1)))


class Generator(nn.Module):
    """DCGAN's generator: a vector becomes an image, by transposed convolutions alone."""

    def __init__(self, latent: int = 10) -> None:
        super().__init__()
        self.project = nn.Linear(latent, 6)
        self.main = nn.Sequential(
            nn.ConvTranspose2d(6, 12, 4, 1, 0, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(True),
            nn.ConvTranspose2d(12, 8, 4, 2, 1, groups=2),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1, groups=8),
            nn.ConvTranspose2d(8, 3, 3, 1, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(self.project(z)[:, :, None, None])


class Siamese(nn.Module):
    """One trunk called twice; the difference of its features is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            conv_block(3, 6), nn.MaxPool2d(2), conv_block(6, 8), nn.AdaptiveAvgPool2d(1)
        )
        self.embed = nn.Linear(8, 6)
        self.score = nn.Linear(12, 1)

    def features(self, x: Tensor) -> Tensor:
        return self.embed(torch.flatten(self.trunk(x), 1))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.features(left), self.features(right)
        joined = torch.cat([(a - b).abs(), a * b], -1)
        return self.score(joined), F.cosine_similarity(a, b)


class TiedAutoencoder(nn.Module):
    """The decoder's weights are the encoder's, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.second = nn.Linear(8, 6)
        self.third = nn.Linear(6, 4)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        code = self.third(torch.relu(self.second(torch.relu(self.first(x.flatten(1))))))
        y = torch.relu(F.linear(code, self.third.weight.t()))
        y = torch.relu(F.linear(y, self.second.weight.T, self.shift))
        return F.linear(y, self.first.weight.t()).view(x.shape)


class CRNN(nn.Module):
    """Columns of a convolution's features read by an LSTM; an embedding beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv_block(1, 6), nn.MaxPool2d((2, 1)), conv_block(6, 8))
        self.lstm = nn.LSTM(8 * 4, 5, batch_first=True, bidirectional=True)
        self.embedding = nn.Embedding(7, 10)
        self.hidden = nn.Linear(10, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor, language: Tensor) -> Tensor:
        y = self.conv(x)
        b, c, h, w = y.size()
        y = y.permute(0, 3, 1, 2).reshape(b, w, c * h)
        y, _ = self.lstm(y)
        y = y + self.embedding(language)[:, None]
        return self.head(torch.relu(self.hidden(y))).log_softmax(-1)


class Mixer(nn.Module):
    """Patches, channels last, tokens mixed by a linear layer over the transpose."""

    class Block(nn.Module):
        def __init__(self, tokens: int, width: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.tokens = nn.Sequential(
                nn.Linear(tokens, 6), nn.GELU(), nn.Dropout(0.1), nn.Linear(6, tokens)
            )
            self.channels = nn.Sequential(nn.Linear(width, 14), nn.GELU(), nn.Linear(14, width))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
            return x + self.channels(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(self.Block(16, 8), self.Block(16, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).permute(0, 2, 1)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class ListInput(nn.Module):
    """Indexes its list of inputs, and unpacks the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList(conv_block(c, 5) for c in (3, 1, 2))
        self.fuse = nn.ModuleDict({"conv": conv_block(15, 6), "out": nn.Conv2d(6, 2, 3)})

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        first, *others = views
        features = [self.stems[0](first)]
        for i, view in enumerate(others):
            size = tuple(views[0].shape[-2:])
            features.append(F.interpolate(self.stems[i + 1](view), size, mode="nearest"))
        y = self.fuse["conv"](torch.cat(features, 1))
        return [self.fuse["out"](y), y]


@dataclass
class Detections:
    boxes: Tensor
    scores: Tensor


class FPN(nn.Module):
    """Lateral connections, top down, a head shared by all levels; returns a dict of dataclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [conv_block(3, 6, stride=2), conv_block(6, 8, stride=2), conv_block(8, 10, stride=2)]
        )
        self.lateral = nn.ModuleList(nn.Conv2d(c, 7, 1) for c in (6, 8, 10))
        self.smooth = nn.ModuleList(nn.Conv2d(7, 7, 3, padding=1) for _ in range(3))
        self.head = conv_block(7, 6)
        self.boxes, self.scores = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Detections]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        levels = {}
        top = None
        for i in reversed(range(3)):
            y = self.lateral[i](features[i])
            if top is not None:
                y = y + F.interpolate(top, size=y.shape[-2:])
            top = y
            h = self.head(self.smooth[i](y))
            levels[f"p{i}"] = Detections(self.boxes(h), self.scores(h).sigmoid())
        return levels


class Configurable(nn.Module):
    """Takes what it is told by keywords, with defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv_block(3, 6), conv_block(6, 8)
        self.film = nn.Linear(4, 16)
        self.head = nn.Linear(8, 3)

    def forward(self, pixels: Tensor, scale: float = 2.0, **options: Any) -> Any:
        x = self.body(self.stem(pixels * scale))
        condition = options.get("condition")
        if condition is not None:
            gain, shift = self.film(condition).chunk(2, dim=-1)
            x = x * (1 + gain[..., None, None]) + shift[..., None, None]
        scores = self.head(x.mean((2, 3)))
        return (scores, x) if options.get("features") else scores


def image(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    return torch.randn(shape, generator=generator, dtype=torch.float64)


MODELS: dict[type[nn.Module], Any] = {
    C2f: image(2, 3, 9, 9),
    UNet: image(2, 1, 34, 38),
    Generator: image(2, 10),
    Siamese: (image(2, 3, 8, 8), image(2, 3, 8, 8)),
    TiedAutoencoder: image(2, 3, 4),
    CRNN: (image(2, 1, 8, 10), torch.tensor([1, 5])),
    Mixer: image(2, 3, 16, 16),
    ListInput: ([image(2, 3, 8, 8), image(2, 1, 4, 4), image(2, 2, 8, 6)],),
    FPN: image(2, 3, 16, 24),
    Configurable: {"pixels": image(2, 3, 8, 8), "condition": image(2, 4), "features": True},
}
