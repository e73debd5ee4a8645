"""Models that draw random numbers in evaluation mode: the compact one draws the same."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dspfx

C = nn.Conv2d


class Draws(nn.Module):
    """Convolutions with something random after each of them."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = C(3, 16, 3, padding=1), C(16, 16, 3), C(16, 8, 3)
        self.last, self.draw = nn.Linear(8, 4), draw

    def forward(self, x: Tensor) -> Tensor:
        x = self.draw(self.first(x).relu())
        x = self.draw(self.second(x).relu())
        return self.last(self.third(x).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout(x, 0.5, training=True),
        lambda x: F.dropout2d(x, 0.5, training=True),
        lambda x: F.rrelu(x - 0.5, training=True),
        lambda x: x + torch.randn_like(x),
        lambda x: x * torch.bernoulli(torch.full_like(x[:, :1], 0.5)),
    ],
    ids=["dropout", "channels dropped", "rrelu", "noise", "a mask of positions"],
)
def test_what_is_random_in_evaluation_mode_is_drawn_alike(draw: Callable[[Tensor], Tensor]) -> None:
    """The graph was refused: it was run with other random numbers than the model."""
    model = Draws(draw).double().eval()
    x = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    prepared = dspfx.prepare(model, x)
    dspfx.prune_channels(prepared, dspfx.Budget(macs=0.85))
    before = torch.get_rng_state()
    compact = dspfx.convert(prepared)
    assert dspfx.report(compact).after.macs <= 0.85 * dspfx.report(compact).before.macs
    assert torch.equal(torch.get_rng_state(), before)
    for shape in ((2, 3, 16, 16), (3, 3, 20, 13)):
        x, outputs = torch.rand(shape, dtype=torch.float64), []
        for module in (prepared.eval(), compact, compact):
            torch.manual_seed(len(outputs) // 2)
            outputs.append(module(x))
        assert torch.allclose(outputs[0], outputs[1], rtol=0, atol=1e-9)
        assert not torch.allclose(outputs[1], outputs[2], rtol=0, atol=1e-4)  # drawn again
