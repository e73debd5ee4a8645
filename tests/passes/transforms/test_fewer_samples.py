"""Verification of large inputs: one sample of most sizes, all samples where that tells nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.passes.transforms import verify, widest
from helpers import randomise

SIZE, SAMPLES = 96, 2


class Net(nn.Module):
    """`start` sees the input."""

    def __init__(self, start: Callable[[Tensor], Any] = lambda _: None) -> None:
        super().__init__()
        self.start = start
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.start(x)
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that masked and compact models are run on, from now on."""
    found: list[torch.Size] = []
    outputs_of = widest.outputs_of

    def noting(module: Any, inputs: Any) -> Any:
        outputs = outputs_of(module, inputs)
        assert outputs.dtype == torch.float64
        found.append(inputs[0].shape)
        return outputs

    monkeypatch.setattr(widest, "outputs_of", noting)
    monkeypatch.setattr(verify, "outputs_of", noting)
    return found


def pruned(model: nn.Module, size: int = SIZE) -> nn.Module:
    """`model`, half of which is masked."""
    prepared = dspfx.prepare(randomise(model), torch.zeros(SAMPLES, 3, size, size))
    dspfx.prune_channels(prepared, dspfx.Budget(macs=0.5))
    return prepared


def test_one_sample_of_the_example_and_all_of_another_size(
    compared: list[torch.Size],
) -> None:
    dspfx.convert(pruned(Net()))
    sizes = compared[::2]
    assert sizes == compared[1::2]  # masked, compact
    assert sizes[0] == (1, 3, SIZE, SIZE)
    assert sizes[1][0] == SAMPLES
    assert sizes[1][2] < SIZE
    assert sizes[2][0] == 1
    assert len(sizes) == 3


def test_all_samples_of_small_inputs(compared: list[torch.Size]) -> None:
    dspfx.convert(pruned(Net(), 24))
    assert compared[0] == (SAMPLES, 3, 24, 24)


def test_all_samples_where_one_is_refused(compared: list[torch.Size]) -> None:
    def several(x: Tensor) -> None:
        torch._assert(x.shape[0] > 1, "one sample alone")

    dspfx.convert(pruned(Net(several)))
    assert compared[0] == (SAMPLES, 3, SIZE, SIZE)


def test_what_differs_is_told_of_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    compact = verify.compact

    def broken(*args: Any) -> Any:
        compacted = compact(*args)
        with torch.no_grad():
            next(compacted.root.parameters()).add_(1e-6)
        return compacted

    monkeypatch.setattr(verify, "compact", broken)
    prepared = pruned(Net())
    with pytest.raises(dspfx.EquivalenceError, match="first at call_module 'body_1'"):
        dspfx.convert(prepared)


class Casting(nn.Module):
    """Rounds what has another size than the example."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[-1] in (6, SIZE // 4) else x.to(torch.float32).to(x.dtype)


@pytest.mark.parametrize("size", [24, SIZE])
def test_casts_at_another_size_alone_are_replaced(size: int, compared: list[torch.Size]) -> None:
    net = Net()
    net.body.append(Casting())
    config = dspfx.PrepareConfig(opaque=("body.4",))
    prepared = dspfx.prepare(randomise(net), torch.zeros(SAMPLES, 3, size, size), config=config)
    dspfx.prune_channels(prepared, dspfx.Budget(macs=0.6))
    dspfx.convert(prepared)
    assert any(shape[-1] != size for shape in compared)


class Tied(nn.Module):
    """Two layers share a weight, which is read besides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)))
        return self.last(y + x @ self.first.weight)


def test_a_weight_that_is_read_besides_is_not_masked_for_all() -> None:
    config = dspfx.PrepareConfig(groups=8)
    prepared: Any = dspfx.prepare(randomise(Tied()), torch.randn(4, 8), config=config)
    masks = {name: torch.rand(mask.shape) < 0.5 for name, mask in dspfx.get_masks(prepared).items()}
    dspfx.set_masks(prepared, masks)
    assert dspfx.convert(prepared).difference[1] == torch.float64
