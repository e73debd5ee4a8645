"""What models in parts multiply outside of their parts is told, since it is not counted."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import dspfx
from helpers import randomise


class Around(nn.Module):
    """Goes on only where its input is bright; its own code multiplies, or does not."""

    def __init__(self, own: str) -> None:
        super().__init__()
        self.own = own
        self.body = nn.Sequential(
            *(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
        )
        self.table = nn.Parameter(torch.eye(8))

    def forward(self, x: Tensor) -> Tensor:
        if x.abs().max() < 0:
            return x
        y: Tensor = self.body(x)
        match self.own:
            case "product":
                y = y @ self.table
            case "convolution":
                y = nn.functional.conv1d(y[:, None], self.table[:1, None, :3]).flatten(1)
        return self.body(y) if self.own == "nothing" else y


@pytest.mark.parametrize(("own", "macs"), [("product", 64), ("convolution", 18), ("nothing", 0)])
def test_macs_outside_of_parts_are_told(own: str, macs: int) -> None:
    model, x = randomise(Around(own)).eval(), torch.randn(2, 8)
    with FlopCounterMode(display=False) as counter:
        model(x)
    times = 2 if own == "nothing" else 1
    assert counter.get_total_flops() == 2 * 2 * (times * 512 + macs)
    prepared = dspfx.prepare(model, x)
    assert isinstance(prepared.body, dspfx.PreparedModule)
    assert not prepared.body._forward_hooks
    assert not prepared.body._forward_pre_hooks
    said = " ".join(str(dspfx.report(prepared)).split())
    share = f"{macs / (512 + macs):.1%}"
    told = f"outside of the parts are {macs} multiply-accumulates for a sample, {share} of all"
    assert (told in said) == (macs > 0)
    assert ("outside of the parts" in said) == (macs > 0)
