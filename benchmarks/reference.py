"""The reference networks: CIFAR ResNets that the method's authors pruned and trained.

One `.safetensors` file a network: `state/<name>` holds weights, `mask/<layer>` bool masks `[O, C]`,
`check/input` and `check/output` what the authors' program computes, the metadata everything else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import dspfx
from dspfx.errors import DataError
from dspfx.recipe.networks.cifar_resnet import CifarResNet

DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "reference"
# the authors gate neither; the stem reads the image and is never gated
NOT_GATED = ("conv_1_3x3", "*.downsample.*")


@dataclass(frozen=True, eq=False)
class Reference:
    """One reference network.

    Attributes:
        name: of its file, without the ending.
        depth: of the ResNet.
        groups: the authors' number of groups per layer.
        inner: width between the two convolutions of each block, dead filters removed already.
        state: the state dict of the masked network; masked weights are zero.
        masks: layer name -> bool `[O, C]`.
        check_input, check_output: float32 `[4, 3, 32, 32]` and `[4, 10]`.
        cifar10_top1: the authors' accuracy on the CIFAR-10 test images, in percent.
        pruned_macs_percent, pruned_params_percent: the authors' figures, for the gated layers
            alone, against the network of full width.
    """

    name: str
    depth: int
    groups: int
    inner: tuple[int, ...]
    state: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    check_input: Tensor
    check_output: Tensor
    cifar10_top1: float
    pruned_macs_percent: float
    pruned_params_percent: float

    def model(self) -> CifarResNet:
        """The plain network with the trained weights, in evaluation mode."""
        model = CifarResNet(self.depth, inner=self.inner)
        model.load_state_dict(dict(self.state))
        return model.eval()

    def dense(self) -> CifarResNet:
        """The network before pruning, at full width; its weights are random."""
        return CifarResNet(self.depth).eval()

    def prepared(self) -> dspfx.PreparedModule:
        """The trained network, gated where the authors do it, with their masks set."""
        config = dspfx.PrepareConfig(groups=self.groups, ignore=NOT_GATED)
        prepared = dspfx.prepare(self.model(), self.check_input, config=config)
        dspfx.set_masks(prepared, self.masks)
        return prepared

    def at_full_width(self) -> dspfx.PreparedModule:
        """The network before pruning, gated alike, with the authors' masks; weights are random.

        Which filters the authors had removed is not recorded: here the last ones read nothing.
        """
        config = dspfx.PrepareConfig(groups=self.groups, ignore=NOT_GATED)
        prepared = dspfx.prepare(self.dense(), self.check_input, config=config)
        masks = {}
        for name, whole in dspfx.get_masks(prepared).items():
            own = self.masks[name]
            masks[name] = torch.zeros_like(whole)
            masks[name][: own.shape[0], : own.shape[1]] = own
        dspfx.set_masks(prepared, masks)
        return prepared


def find(folder: Path = DEFAULT_FOLDER) -> list[Path]:
    """The files of all reference networks in `folder`, sorted.

    Raises:
        DataError: there is none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"no reference networks (*.safetensors) in {folder}; name their folder")
    return files


def load(path: Path) -> Reference:
    """Read one reference network.

    Raises:
        DataError: the file is missing, damaged or lacks something.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stages = json.loads(metadata["blocks"])
        return Reference(
            name=path.stem,
            depth=int(metadata["depth"]),
            groups=int(metadata["groups"]),
            inner=tuple(block["inner"] for stage in stages for block in stage),
            state=_under("state/", tensors),
            masks=_under("mask/", tensors),
            check_input=tensors["check/input"],
            check_output=tensors["check/output"],
            cifar10_top1=float(metadata["cifar10_top1"]),
            pruned_macs_percent=float(metadata["reported_pruned_flops_percent"]),
            pruned_params_percent=float(metadata["reported_pruned_params_percent"]),
        )
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} is no reference network: {error} is missing or wrong") from error


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
