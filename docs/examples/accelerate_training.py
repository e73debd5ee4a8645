"""Groups learned, pruned and fine-tuned with Hugging Face Accelerate.

    pip install 'dspfx[accelerate,demo]'
    accelerate launch docs/examples/accelerate_training.py

In one process or several, on CPUs or GPUs, in any precision: what `accelerate config` says.
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dspfx
from dspfx.recipe.images.datasets import load
from dspfx.recipe.networks.cifar_resnet import CifarResNet

EPOCHS = 3


def main() -> None:
    accelerator = Accelerator()
    torch.manual_seed(0)
    digits = load("digits")
    images = TensorDataset(digits.train_x, digits.train_y)
    model = CifarResNet(8, in_channels=1)
    prepared = dspfx.prepare(model, digits.test_x[:2], config=dspfx.PrepareConfig(groups=2))
    model, loader = accelerator.prepare(prepared, DataLoader(images, batch_size=32, shuffle=True))

    train(accelerator, model, loader)
    train(accelerator, model, loader, learn_groups=True)
    report = dspfx.prune(model, dspfx.Budget(macs=0.4))  # every process: equal weights and masks
    train(accelerator, model, loader)

    if accelerator.is_main_process:
        compact = dspfx.convert(accelerator.unwrap_model(model, keep_fp32_wrapper=False).cpu())
        with torch.no_grad():
            right = (compact(digits.test_x).argmax(1) == digits.test_y).float().mean()
        print(f"{report}\naccuracy of the compact network: {right:.2%}")
    accelerator.end_training()


def train(
    accelerator: Accelerator, model: nn.Module, loader: DataLoader, *, learn_groups: bool = False
) -> None:
    """Train for some epochs; with group learning, the step of the optimizer is the learner's."""
    model.train()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    steps = EPOCHS * len(loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=0.1, total_steps=steps)
    optimizer = accelerator.prepare(sgd)
    learner = dspfx.GroupLearner(model, optimizer, strength=0.2, total_steps=steps)
    for _ in range(EPOCHS):
        for x, y in loader:
            if (
                learn_groups
            ):  # it scales losses itself, and calls backward, not accelerator.backward
                learner.step(lambda x=x, y=y: cross_entropy(model(x), y), scaler=accelerator.scaler)
            else:
                optimizer.zero_grad()
                accelerator.backward(cross_entropy(model(x), y))
                optimizer.step()
            scheduler.step()


if __name__ == "__main__":
    main()
