"""Groups learned, pruned and fine-tuned by several processes, with a share of every batch each.

    torchrun --nproc-per-node 2 docs/examples/ddp_training.py

With one GPU for each process if there are any, else on the CPU. On several machines, run on each

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 ...
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dspfx
from dspfx.recipe.images.datasets import load
from dspfx.recipe.networks.cifar_resnet import CifarResNet

EPOCHS = 3


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.manual_seed(dist.get_rank())

    digits = load("digits")
    images = TensorDataset(digits.train_x, digits.train_y)
    loader = DataLoader(images, batch_size=32, sampler=DistributedSampler(images))
    model = CifarResNet(8, in_channels=1)
    prepared = dspfx.prepare(model, digits.test_x[:2], config=dspfx.PrepareConfig(groups=2))
    ddp = DistributedDataParallel(prepared.to(device), device_ids=[device] if on_gpu else None)

    train(ddp, loader, device)
    train(ddp, loader, device, learn_groups=True)
    report = dspfx.prune(ddp, dspfx.Budget(macs=0.4))  # every process: equal weights, equal masks
    train(ddp, loader, device)

    if dist.get_rank() == 0:
        compact = dspfx.convert(prepared.cpu())
        with torch.no_grad():
            right = (compact(digits.test_x).argmax(1) == digits.test_y).float().mean()
        print(f"{report}\naccuracy of the compact network: {right:.2%}")
        dspfx.save(compact, "digits.safetensors")
    dist.destroy_process_group()


def train(
    ddp: nn.Module, loader: DataLoader, device: torch.device, *, learn_groups: bool = False
) -> None:
    """Train for some epochs; with group learning, the step of the optimizer is the learner's."""
    ddp.train()
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    steps = EPOCHS * len(loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    learner = dspfx.GroupLearner(ddp, optimizer, strength=0.2, total_steps=steps)
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)
        for x, y in loader:
            images, labels = x.to(device), y.to(device)
            if learn_groups:
                learner.step(lambda x=images, y=labels: cross_entropy(ddp(x), y))
            else:
                optimizer.zero_grad()
                cross_entropy(ddp(images), labels).backward()
                optimizer.step()
            scheduler.step()


if __name__ == "__main__":
    main()
