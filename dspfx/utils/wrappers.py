"""What people put around models and optimizers: data parallelism, compilation, other trainers."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from dspfx.errors import ConvertError, LearnError

# their optimizers pass everything on to the one inside, but step and forget gradients as they like
TRAINERS = ("accelerate.", "lightning.", "pytorch_lightning.")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside data parallelism, `AveragedModel` and `torch.compile`.

    Raises:
        ConvertError: it is no module at all.
    """
    if not isinstance(model, nn.Module):
        raise ConvertError(f"a torch.nn.Module is wanted, got a {type(model).__name__}")
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel | AveragedModel):
            model = model.module
        elif "_orig_mod" in model._modules:  # a module that was compiled
            model = model.get_submodule("_orig_mod")
        else:
            return model


def plain_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside those of Accelerate and Lightning.

    Raises:
        LearnError: there is none.
    """
    inner: Any = optimizer
    while any(kind.__module__.startswith(TRAINERS) for kind in type(inner).__mro__):
        inner = getattr(inner, "optimizer", None)
    if not isinstance(inner, Optimizer):
        raise LearnError(
            f"the optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; pass "
            "for instance torch.optim.SGD(prepared.parameters(), lr=0.05)"
        )
    return inner


def check_whole(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse weights, and states of the optimizer, of which every process has a part only.

    Raises:
        LearnError: there are such.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    from torch.distributed.optim import ZeroRedundancyOptimizer  # noqa: PLC0415, takes a while
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    # named, for its import takes longer still
    if sharded or any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise LearnError(
            "the weights are sharded, and the groups of a layer are learned from the whole of it; "
            "use torch.nn.parallel.DistributedDataParallel instead, at least while groups are "
            "learned"
        )
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        raise LearnError(
            "a ZeroRedundancyOptimizer has no state to look ahead with; use the optimizer that it "
            "shards"
        )


def trained_parameters(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    """The parameters that `optimizer` trains at present."""
    return {p for group in optimizer.param_groups for p in group["params"]}
