"""A single-stage detector: learn groups, prune, fine-tune, convert, detect.

    python detector.py

A small backbone, a neck that upsamples and concatenates as feature pyramids do, and a head on each
of two scales that predicts for every cell whether the centre of an object lies in it, its box, and
its class. What depends on the values, the choice of boxes, stands outside the model. The compact
network has been trained for longer than the dense one, which was trained for a moment only.
"""

from typing import Annotated

import torch
import torchvision
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import dspfx

SIZE = 64
STRIDES = (8, 16)
LARGE = 24  # pixels; larger objects belong to the coarse scale
CLASSES = 3
Boxes = list[tuple[Tensor, Tensor]]  # of every image: [n, 4] as x0, y0, x1, y1 in pixels; classes


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm and SiLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


class Split(nn.Module):
    """One half of the channels goes through a residual block; both halves are merged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.enter, self.merge = conv(width, width, 1), conv(width, width, 1)
        self.inner = nn.Sequential(conv(half, half), conv(half, half))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, width, H, W]` to the same."""
        a, b = self.enter(x).chunk(2, 1)
        return self.merge(torch.cat((a, b + self.inner(b)), 1))


class Detector(nn.Module):
    """Maps `[N, 5 + classes, H / stride, W / stride]`, one for each stride."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        fine, coarse = 4 * width, 6 * width
        self.to_fine = nn.Sequential(
            *(conv(3, width, stride=2), conv(width, 2 * width, stride=2)),
            *(conv(2 * width, fine, stride=2), Split(fine)),
        )
        self.to_coarse = nn.Sequential(conv(fine, coarse, stride=2), Split(coarse))
        self.neck = nn.Sequential(conv(fine + coarse, fine, 1), Split(fine))
        self.heads = nn.ModuleList(
            nn.Sequential(conv(inputs, inputs), nn.Conv2d(inputs, 5 + CLASSES, 1))
            for inputs in (fine, coarse)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps of images `[N, 3, H, W]`: objectness, box and classes of every cell."""
        fine = self.to_fine(x)
        coarse = self.to_coarse(fine)
        up = F.interpolate(coarse, scale_factor=2.0)
        fine = self.neck(torch.cat((fine, up), 1))
        return [head(x) for head, x in zip(self.heads, (fine, coarse), strict=True)]


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Boxes]:
    """Noisy images `[N, 3, H, W]` of two rectangles each, whose colour is their class."""
    images = 0.3 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    boxes: Boxes = []
    for image in images:
        sizes = torch.randint(10, 40, (2, 2), generator=generator)
        corners = torch.stack([_below(SIZE - size, generator) for size in sizes])
        kinds = torch.randint(CLASSES, (2,), generator=generator)
        for (x, y), (w, h), kind in zip(corners, sizes, kinds, strict=True):
            image[:, y : y + h, x : x + w] = torch.eye(3)[kind][:, None, None]
        boxes.append((torch.cat((corners, corners + sizes), 1).float(), kinds))
    return images, boxes


def loss_of(maps: list[Tensor], boxes: Boxes) -> Tensor:
    """Objectness of all cells; boxes and classes of those that the centre of an object lies in."""
    target = [torch.zeros(len(m), *m.shape[2:]) for m in maps]
    found, wanted, kinds = [], [], []
    for number, (corners, labels) in enumerate(boxes):
        for box, kind in zip(corners, labels, strict=True):
            scale = int((box[2:] - box[:2]).max() > LARGE)
            column, row = ((box[:2] + box[2:]) / 2 / STRIDES[scale]).long().tolist()
            target[scale][number, row, column] = 1
            found.append(_cells(maps[scale], STRIDES[scale])[number, row, column])
            wanted.append(box)
            kinds.append(kind)
    cells = torch.stack(found)
    overlap = torchvision.ops.generalized_box_iou_loss(cells[:, 1:5], torch.stack(wanted))
    classes = F.cross_entropy(cells[:, 5:], torch.stack(kinds))
    pairs = zip(maps, target, strict=True)
    objectness = [
        torchvision.ops.sigmoid_focal_loss(m[:, 0], t, alpha=0.75, reduction="sum")
        for m, t in pairs
    ]
    return sum(objectness) / len(cells) + 2 * overlap.mean() + classes


@torch.no_grad()
def detect(model: nn.Module, images: Tensor) -> Boxes:
    """The two best boxes of every image, and their classes."""
    maps = [
        _cells(m, stride).flatten(1, 2) for m, stride in zip(model(images), STRIDES, strict=True)
    ]
    found: Boxes = []
    for cells in torch.cat(maps, 1):
        best = torchvision.ops.nms(cells[:, 1:5], cells[:, 0], 0.5)[:2]
        found.append((cells[best, 1:5], cells[best, 5:].argmax(1)))
    return found


def recall(found: Boxes, boxes: Boxes) -> float:
    """The share of the objects that a box of their class covers, with an IoU of at least 0.5."""
    hits = 0
    for (corners, kinds), (own, own_kinds) in zip(found, boxes, strict=True):
        same = own_kinds[:, None] == kinds[None]
        hits += int(((torchvision.ops.box_iou(own, corners) >= 0.5) & same).any(1).sum())
    return hits / sum(len(corners) for corners, _ in boxes)


def main(
    steps: Annotated[int, typer.Option(min=1, help="of each of the three phases")] = 100,
    keep: Annotated[float, typer.Option(help="fraction of the MACs to keep")] = 0.5,
) -> None:
    """Train for a moment, prune, and compare."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    test_images, test_boxes = scenes(64, generator)

    def train(network: nn.Module, lr: float) -> None:
        optimizer = torch.optim.AdamW(network.parameters(), lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        network.train()
        for _ in range(steps):
            images, boxes = scenes(16, generator)
            optimizer.zero_grad()
            loss_of(network(images), boxes).backward()
            optimizer.step()
            schedule.step()

    model = Detector()
    train(model, 1e-2)
    dense = recall(detect(model.eval(), test_images), test_boxes)

    prepared = dspfx.prepare(model, test_images[:2], config=dspfx.PrepareConfig(groups=2)).train()
    optimizer = torch.optim.AdamW(prepared.parameters(), 2e-3)
    learner = dspfx.GroupLearner(prepared, optimizer, strength=0.2, total_steps=steps)
    for _ in range(steps):
        batch = scenes(16, generator)
        learner.step(lambda batch=batch: loss_of(prepared(batch[0]), batch[1]))
    print(dspfx.prune(prepared, dspfx.Budget(macs=keep)))
    train(prepared, 5e-3)
    compact = dspfx.convert(prepared)
    print(dspfx.report(compact))

    with torch.no_grad():
        pairs = zip(prepared.eval()(test_images), compact(test_images), strict=True)
        difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    if difference > 1e-4:
        raise SystemExit(f"masked and compact model differ by {difference:.1e}")
    print(f"\nmasked and compact are equal: they differ by {difference:.1e} of the largest output")
    print(f"objects found: dense {dense:.1%}")
    print(f"objects found: compact {recall(detect(compact, test_images), test_boxes):.1%}")


def _cells(maps: Tensor, stride: int) -> Tensor:
    """`[N, H, W, 5 + classes]`: objectness, corners in pixels, and logits of the classes."""
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in maps.shape[2:]), indexing="ij")
    centre = stride * (torch.stack((columns, rows)) + 0.5)
    distances = stride * maps[:, 1:5].clamp(max=4).exp()  # of the sides from the cell's centre
    corners = torch.cat((centre - distances[:, :2], centre + distances[:, 2:]), 1)
    return torch.cat((maps[:, :1], corners, maps[:, 5:]), 1).permute(0, 2, 3, 1)


def _below(limits: Tensor, generator: torch.Generator) -> Tensor:
    """Integers from 0 to `limits`, that excluded."""
    return (torch.rand(len(limits), generator=generator) * limits).long()


if __name__ == "__main__":
    typer.run(main)
