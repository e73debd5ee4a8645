"""What running a model must not change."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def buffers_kept(root: nn.Module) -> Iterator[None]:
    """The buffers of `root` are afterwards the tensors that they were, with the same values."""
    own = {module: dict(module._buffers) for module in root.modules()}
    values = [(buffer, buffer._version, buffer.clone()) for buffer in root.buffers()]
    try:
        yield
    finally:
        for module, before in own.items():
            module._buffers.update(before)
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)
