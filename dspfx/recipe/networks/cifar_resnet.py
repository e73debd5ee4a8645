"""The plain CIFAR ResNet: 6n + 2 layers, three stages of n blocks, one linear classifier.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, with
projection shortcuts (option B) where a block changes the shape of its input:

    conv 3x3, bn, relu | stage_1: n blocks | stage_2, stage_3: n blocks, stride 2 | mean | linear
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dspfx.errors import DspfxError

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3x3 convolutions, `relu(bn_b(conv_b(relu(bn_a(conv_a(x))))) + shortcut(x))`.

    Maps `[N, channels, H, W]` to `[N, out, ceil(H / stride), ceil(W / stride)]`; between the two
    convolutions there are `inner` channels.
    """

    def __init__(self, channels: int, inner: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(channels, inner, 3, stride, padding=1, bias=False)
        self.bn_a = nn.BatchNorm2d(inner)
        self.conv_b = nn.Conv2d(inner, out, 3, padding=1, bias=False)
        self.bn_b = nn.BatchNorm2d(out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = torch.relu(self.bn_a(self.conv_a(x)))
        return torch.relu(self.bn_b(self.conv_b(y)) + self.downsample(x))


class CifarResNet(nn.Module):
    """The CIFAR ResNet of a given depth, He-initialised.

    Args:
        depth: 6n + 2 with n >= 1, such as 8, 14, 20, 56.
        in_channels: channels of the images.
        classes: length of the output.
        widths: channels of the residual stream in the three stages; the stem has the first.
        inner: channels between the two convolutions of every block, in order; by default each
            block's own output width.

    Raises:
        DspfxError: `depth` is not 6n + 2, or `inner` does not name one width for each block.
    """

    def __init__(
        self,
        depth: int = 20,
        *,
        in_channels: int = 3,
        classes: int = 10,
        widths: tuple[int, int, int] = WIDTHS,
        inner: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise DspfxError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, ...), not {depth}")
        inner = [width for width in widths for _ in range(blocks)] if inner is None else inner
        if len(inner) != 3 * blocks:
            raise DspfxError(
                f"inner needs one width for each of the {3 * blocks} blocks, got {len(inner)}"
            )
        first, second, third = widths
        inner_widths = iter(inner)
        self.conv_1_3x3 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(first)
        self.stage_1 = _stage(first, first, 1, blocks, inner_widths)
        self.stage_2 = _stage(first, second, 2, blocks, inner_widths)
        self.stage_3 = _stage(second, third, 2, blocks, inner_widths)
        self.classifier = nn.Linear(third, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, classes]` of images `[N, in_channels, H, W]`, H and W at least 1."""
        y = torch.relu(self.bn_1(self.conv_1_3x3(x)))
        y = self.stage_3(self.stage_2(self.stage_1(y)))
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(y, 1).flatten(1))
        return logits


def _stage(
    channels: int, out: int, stride: int, blocks: int, inner: Iterator[int]
) -> nn.Sequential:
    first = Block(channels, next(inner), out, stride)
    return nn.Sequential(first, *(Block(out, next(inner), out) for _ in range(blocks - 1)))


def _initialise(model: nn.Module) -> None:
    """Initialise as in "Delving Deep into Rectifiers", ICCV 2015, all but the norms."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
