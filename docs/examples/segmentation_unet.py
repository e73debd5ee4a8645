"""A U-Net that segments discs and squares: learn groups, prune, fine-tune, convert.

    python segmentation_unet.py

Transposed convolutions upsample, skip connections are concatenated: what either side of a
concatenation loses is found out from the graph. The compact network has been trained for longer
than the dense one, which was trained for a moment only.
"""

from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import dspfx

CLASSES = ("background", "disc", "square")
SIZE = 32


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions of 3x3."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Two levels down and two up."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down_1, self.down_2 = block(1, width), block(width, 2 * width)
        self.bottom = block(2 * width, 4 * width)
        self.grow_2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up_2 = block(4 * width, 2 * width)
        self.grow_1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.up_1 = block(2 * width, width)
        self.head = nn.Conv2d(width, len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[N, 3, H, W]` of images `[N, 1, H, W]`."""
        fine = self.down_1(x)
        coarse = self.down_2(F.max_pool2d(fine, 2))
        x = self.bottom(F.max_pool2d(coarse, 2))
        x = self.up_2(torch.cat((coarse, self.grow_2(x)), 1))
        x = self.up_1(torch.cat((fine, self.grow_1(x)), 1))
        return self.head(x)


def shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images `[N, 1, H, W]` of a disc and a square each, and their classes `[N, H, W]`."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    centre = torch.randint(8, SIZE - 8, (2, 2, count, 1, 1), generator=generator)
    radius = torch.randint(4, 8, (2, count, 1, 1), generator=generator)
    dy, dx = rows - centre[:, 0], columns - centre[:, 1]
    disc = dy[0] ** 2 + dx[0] ** 2 < radius[0] ** 2
    square = torch.maximum(dy[1].abs(), dx[1].abs()) < radius[1]
    labels = torch.where(square, 2, torch.where(disc, 1, 0))
    noise = torch.randn(count, 1, SIZE, SIZE, generator=generator)
    brightness = torch.tensor((0.0, 1.0, 0.6))[labels]
    return brightness[:, None] + 0.3 * noise, labels


@torch.no_grad()
def iou(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Intersection over union, the mean of all classes."""
    found = model(x).argmax(1)
    pairs = [(found == c, labels == c) for c in range(len(CLASSES))]
    return sum(float((a & b).sum() / (a | b).sum()) for a, b in pairs) / len(pairs)


def main(
    steps: Annotated[int, typer.Option(min=1, help="before pruning; twice as many after")] = 100,
    keep: Annotated[float, typer.Option(help="fraction of the MACs to keep")] = 0.5,
) -> None:
    """Train for a moment, prune, and compare."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    test = shapes(64, generator)

    def train(network: nn.Module, steps: int) -> None:
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        network.train()
        for _ in range(steps):
            x, labels = shapes(16, generator)
            optimizer.zero_grad()
            F.cross_entropy(network(x), labels).backward()
            optimizer.step()
            schedule.step()

    model = UNet()
    train(model, steps)
    dense = iou(model.eval(), *test)

    prepared = dspfx.prepare(model, test[0][:2], config=dspfx.PrepareConfig(groups=2)).train()
    optimizer = torch.optim.AdamW(prepared.parameters(), 2e-3)
    learner = dspfx.GroupLearner(prepared, optimizer, strength=0.05, total_steps=steps)
    for _ in range(steps):
        x, labels = shapes(16, generator)
        learner.step(lambda x=x, labels=labels: F.cross_entropy(prepared(x), labels))
    print(dspfx.prune(prepared, dspfx.Budget(macs=keep)))
    train(prepared, 2 * steps)
    compact = dspfx.convert(prepared)
    print(dspfx.report(compact))

    with torch.no_grad():
        masked = prepared.eval()(test[0])
        difference = float((masked - compact(test[0])).abs().max() / masked.abs().max())
    if difference > 1e-4:
        raise SystemExit(f"masked and compact model differ by {difference:.1e}")
    print(f"\nmasked and compact are equal: they differ by {difference:.1e} of the largest logit")
    print(f"IoU dense {dense:.3f}")
    print(f"IoU compact {iou(compact, *test):.3f}")


if __name__ == "__main__":
    typer.run(main)
