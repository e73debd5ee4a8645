"""Models of operators and layers that no table has, rules for them, and a model with a memory."""

from typing import Any

import torch
from torch import Tensor, nn


class Squash(nn.Module):
    """A user's own layer with a parameter for each channel, whose code cannot be traced."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(c) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.isnan().any():
            raise ValueError("NaN")
        return torch.tanh(x * self.gain[:, None, None]).cumsum(-1)


class Unusual(nn.Module):
    """Operators that no table has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1)
        self.squash = Squash(8)
        self.b, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.special.expit(torch.sinc(self.a(self.stem(x))))
        x = self.b(self.squash(x))
        return self.head(torch.special.entr(x.abs()).mean((2, 3)))


RULES: dict[Any, Any] = {
    Squash: "channelwise",
    torch.sinc: "elementwise",
    torch.special.expit: "elementwise",
    torch.special.entr: "elementwise",
}


class CountsCalls(nn.Module):
    """Writes into a buffer, which no file can do."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.relu(self.conv(x))
