"""The tensors of a model by name."""

from torch import Tensor, nn


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of `module`, by every name they go by."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def aliases(model: nn.Module) -> dict[str, str]:
    """The further names of the parameters and buffers of `model`, each with the first one."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(t), name) for name, t in named_tensors(model).items()}
    return {name: own for name, own in names.items() if name != own}
