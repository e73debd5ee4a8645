"""A training run that can be killed at any moment and started again: the test of checkpoints.

    python tests/resumable_run.py FOLDER STEPS

Before every step it waits for a line on its standard input, afterwards it prints the step's number;
in the end it writes the model's state to FOLDER/final.pt. All generators of random numbers have a
part in what it computes.
"""

import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import dspfx


def main(folder: Path, steps: int) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3)),
    )
    prepared = dspfx.prepare(model, torch.zeros(2, 2, 8, 8)).train()
    optimizer = torch.optim.AdamW(prepared.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    run = {
        "model": prepared,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps),
        "scaler": torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3),
        "learner": dspfx.GroupLearner(
            prepared, optimizer, 0.1, total_steps=steps, logits_every=2, generator=generator
        ),
    }
    checkpoint, done = folder / "run.pt", 0
    if checkpoint.exists():
        done = dspfx.load_checkpoint(checkpoint, **run)["done"]
    while done < steps:
        sys.stdin.readline()
        step(run)
        done += 1
        dspfx.save_checkpoint(checkpoint, **run, done=done)
        print(done, flush=True)
    torch.save(prepared.state_dict(), folder / "final.pt")


def step(run: dict) -> None:
    """One step on a batch that is random in three ways."""
    x = torch.randn(6, 2, 8, 8) + random.gauss(0, 1)
    y = torch.from_numpy(np.random.randint(0, 3, 6))
    run["learner"].step(
        lambda: nn.functional.cross_entropy(run["model"](x), y), scaler=run["scaler"]
    )
    run["scheduler"].step()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
