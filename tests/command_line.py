"""The command line, called in the process of the test."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import dspfx
from dspfx.commands import app as cli
from dspfx.recipe.networks.architectures import Architecture
from dspfx.recipe.networks.cifar_resnet import CifarResNet

SMALL = "--classes 10 --channels 1 --image-size 16"
TINY = (
    "--data digits --images 100 --batch 32 --epochs-dense 1 --epochs-learn 1 --epochs-tune 1 "
    "--cycles 1 --keep-macs 0.5 --threads 1 --device cpu"
)


def invoke(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    result = CliRunner().invoke(cli.app, words, env={"COLUMNS": "100", "NO_COLOR": "1"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a compact and a prepared model, files that say what they are, and weights."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = CifarResNet(8, in_channels=1)
    torch.save(model.state_dict(), folder / "weights.pt")
    prepared = dspfx.prepare(model, torch.zeros(2, 1, 16, 16))
    dspfx.prune(prepared, dspfx.Budget(macs=0.5))
    dspfx.save(prepared.eval(), folder / "prepared.safetensors")
    dspfx.save(dspfx.convert(prepared), folder / "compact.safetensors")
    for name in ("prepared", "compact"):
        Architecture("cifar-resnet8", 10, 1, 16).write(folder / f"{name}.safetensors")
    return folder
