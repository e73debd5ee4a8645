"""Groups learned, pruned and fine-tuned with Lightning.

pip install 'dspfx[lightning,demo]'
python docs/examples/lightning_training.py --devices 2
"""

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dspfx
from dspfx.lightning import GroupLearning
from dspfx.recipe.images.datasets import load
from dspfx.recipe.networks.cifar_resnet import CifarResNet

EPOCHS = 3


class Classifier(lightning.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        loss = cross_entropy(self.network(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=self.trainer.estimated_stepping_batches
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def main(devices: int, accelerator: str) -> None:
    lightning.seed_everything(0, verbose=False)
    digits = load("digits")
    images = TensorDataset(digits.train_x, digits.train_y)
    loader = DataLoader(images, batch_size=32, shuffle=True)
    network = CifarResNet(8, in_channels=1)
    prepared = dspfx.prepare(network, digits.test_x[:2], config=dspfx.PrepareConfig(groups=2))
    module = Classifier(prepared)

    def fit(*callbacks: lightning.Callback) -> None:
        trainer = lightning.Trainer(
            max_epochs=EPOCHS,
            callbacks=list(callbacks),
            devices=devices,
            accelerator=accelerator,
            strategy="ddp" if devices > 1 else "auto",
            **{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False},
        )
        trainer.fit(module, loader)

    fit()
    fit(GroupLearning(strength=0.2))
    report = dspfx.prune(module, dspfx.Budget(macs=0.4))  # every process: equal weights and masks
    fit()

    if module.global_rank == 0:
        compact = dspfx.convert(module.network)
        with torch.no_grad():
            right = (compact(digits.test_x).argmax(1) == digits.test_y).float().mean()
        print(f"{report}\naccuracy of the compact network: {right:.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    arguments = parser.parse_args()
    main(arguments.devices, arguments.accelerator)
