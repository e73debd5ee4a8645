"""`export` of a model in parts whose own code makes a mask in a trace, and none elsewhere."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dspfx
from helpers import assert_equal, random_masks, randomise


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.b(torch.relu(self.a(x)))
        return x + (y if mask is None else y * mask)


class Masking(nn.Module):
    """As the models of transformers: what masks nothing is left out, but not in a trace."""

    def __init__(self, mask: Callable[[Tensor], Tensor], keyword: bool) -> None:
        super().__init__()
        self.mask, self.keyword = mask, keyword
        self.stem = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mask: Tensor | None = self.mask(x)
        assert mask is not None
        if not torch.compiler.is_compiling() and bool(mask.all()):
            mask = None
        y = self.stem(x)
        for block in self.blocks:
            y = block(y, mask=mask) if self.keyword else block(y, mask)
        return {"logits": self.head(y)}


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "of sizes": lambda x: torch.ones(x.shape[0], 1, dtype=x.dtype),
    "like an input": lambda x: torch.ones_like(x[:, :1]),
    "new, compared": lambda x: torch.arange(x.shape[0])[:, None] >= x.new_zeros(x.shape[0], 1),
}


def compact_of(mask: Callable[[Tensor], Tensor], keyword: bool, x: Tensor) -> nn.Module:
    prepared = dspfx.prepare(randomise(Masking(mask, keyword)).double().eval(), x)
    assert isinstance(prepared.blocks[0], dspfx.PreparedModule)
    dspfx.set_masks(prepared, random_masks(prepared, drop=0.3))
    return dspfx.convert(prepared)


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_that_masks_nothing(kind: str, keyword: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    compact = compact_of(MASKS[kind], keyword, x)
    dspfx.export(compact, x, tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2")
    assert program.state_dict.keys() == compact.state_dict().keys()
    assert not any(part._forward_pre_hooks for part in compact.modules())
    for samples in (1, 2, 5):
        y = torch.randn(samples, 8, dtype=torch.float64)
        assert_equal(compact(y), program.module()(y), 1e-12)


def test_a_mask_of_values_is_refused(tmp_path: Path) -> None:
    x = torch.rand(2, 8, dtype=torch.float64) + 1
    for mask in (lambda x: x[:, :1] > 0, lambda x: torch.ones_like(x[:, :1]) * (x[:, 1:2] != 0)):
        with pytest.raises(dspfx.ExportError, match=r"'blocks\.0' a tensor for 'mask', which dep"):
            dspfx.export(compact_of(mask, True, x), x, tmp_path / "m.pt2")
        # an example with a mask is the way out, as the message says
        padded = torch.cat([x, x - x])
        compact = compact_of(mask, True, padded)
        dspfx.export(compact, padded, tmp_path / "m.pt2")
        program = torch.export.load(tmp_path / "m.pt2")
        assert_equal(compact(padded), program.module()(padded), 1e-12)
        (tmp_path / "m.pt2").unlink()


def test_a_mask_of_other_sizes_is_refused(tmp_path: Path) -> None:
    """What it does without a mask is compared for another batch, not for another height."""
    x = torch.randn(2, 8, dtype=torch.float64)
    compact = compact_of(MASKS["of sizes"], True, x)
    with pytest.raises(dspfx.ExportError, match="dynamic_size=False"):
        dspfx.export(compact, x, tmp_path / "m.pt2", dynamic_size=True)
    assert not list(tmp_path.iterdir())
