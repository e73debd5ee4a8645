"""Networks of torchvision, with fewer layers where one has a great many of the same kind."""

from typing import Any

import torchvision
from torch import nn
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock


def resnet10(**settings: Any) -> nn.Module:
    """Of resnet18 the first block of every stage."""
    return torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], **settings)


def densenet(**settings: Any) -> nn.Module:
    """Of densenet121, which has 6, 12, 24 and 16 layers in its blocks, 21."""
    return torchvision.models.DenseNet(32, (3, 5, 8, 5), **settings)


def regnet_y(**settings: Any) -> nn.Module:
    """Of regnet_y_400mf, which has 16 blocks, 8: of all widths."""
    blocks = BlockParams.from_init_params(8, 48, 55.8, 2.09, 8, se_ratio=0.25)
    return torchvision.models.RegNet(blocks, **settings)


SHORTER = {"resnet10": resnet10, "densenet": densenet, "regnet_y": regnet_y}


def network(name: str, **settings: Any) -> nn.Module:
    """One of `SHORTER`, or the one that torchvision calls so, with random weights."""
    if name in SHORTER:
        return SHORTER[name](**settings)
    made: nn.Module = torchvision.models.get_model(name, weights=None, **settings)
    return made
