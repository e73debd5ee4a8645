"""`fake_quantize`: training with the rounding that there will be."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from detector import IMAGES, Detector
from groups import grouped
from runtimes import runtimes
from small import Small, X, pruned
from torch import Tensor, nn

import dspfx
from helpers import assert_equal, unchanged

pytest.importorskip("torchao")

GENERATOR = torch.Generator().manual_seed(0)
BATCHES = list(torch.randn(64, 3, 10, 10, generator=GENERATOR).split(16))


def trained(model: nn.Module, steps: int = 30) -> list[float]:
    """Losses of a task that it has not learned yet."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        x = BATCHES[step % len(BATCHES)]
        loss = (model.train()(x) - x.mean((2, 3)) @ torch.ones(3, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def assert_close(expected: Tensor, actual: Tensor) -> None:
    """Equal but for values in the middle of two integers."""
    differences, largest = (expected - actual).detach().abs(), float(expected.detach().abs().max())
    assert float(differences.max()) < 0.02 * largest
    assert float(differences.mean()) < 0.002 * largest


@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_trained_is_quantised(groups: int, tmp_path: Path) -> None:
    compact = dspfx.convert(pruned(Small(16))) if groups == 1 else grouped(Small(16))
    with unchanged(compact):
        trainable = dspfx.fake_quantize(compact, BATCHES)
        assert not trainable.training
        losses = trained(trainable)
    assert losses[-1] < 0.5 * losses[0]
    with unchanged(trainable):
        quantized = dspfx.quantize(trainable)
    assert isinstance(quantized, dspfx.CompactModule)
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    for size in (1, 5):
        x = torch.randn(size, 3, 12, 9, generator=GENERATOR)
        assert_close(trainable(x), quantized(x))
    found = runtimes(quantized, tmp_path)
    for name in ("onnxruntime", "openvino"):
        assert_close(quantized(X), found[name](X))
    dspfx.save(quantized, tmp_path / "m")
    assert_equal(quantized(X), dspfx.load(tmp_path / "m", Small(16))(X), tolerance=0)


def test_before_training_it_rounds_already() -> None:
    compact = dspfx.convert(pruned(Small()))
    trainable = dspfx.fake_quantize(compact, BATCHES)
    assert not torch.equal(trainable(X), compact(X))
    assert_close(trainable(X), dspfx.quantize(trainable)(X))
    with torch.no_grad():
        assert float((trainable(X) - compact(X)).abs().max()) < 0.1 * float(compact(X).abs().max())


def test_under_autocast_it_computes_in_float32() -> None:
    trainable = dspfx.fake_quantize(dspfx.convert(pruned(Small())), BATCHES).train()
    with torch.autocast("cpu", torch.bfloat16):
        result = trainable(X)
    assert result.dtype == torch.float32
    result.square().mean().backward()
    assert all(p.grad is not None for p in trainable.parameters() if p.requires_grad)


def test_ranges_follow_in_training_mode_alone() -> None:
    trainable = dspfx.fake_quantize(dspfx.convert(pruned(Small())), BATCHES)
    before = trainable(X)
    trainable(5 * X)
    assert_equal(before, trainable(X), tolerance=0)
    trainable.train()
    for _ in range(100):
        trainable(5 * X)
    assert not torch.equal(before, trainable.eval()(X))
    scales = [dspfx.quantize(trainable).quantization.scales[0].scale for _ in range(2)]
    assert scales[0] == scales[1] > 0.1


def test_copies_and_state_dicts_are_independent() -> None:
    trainable = dspfx.fake_quantize(dspfx.convert(pruned(Small())), BATCHES)
    before = trainable(X)
    twin = copy.deepcopy(trainable)
    state = copy.deepcopy(trainable.state_dict())
    trained(trainable, 5)
    assert not torch.equal(trainable(X), before)
    assert_equal(before, twin(X), tolerance=0)
    assert_close(before, dspfx.quantize(twin)(X))
    trainable.load_state_dict(state)
    assert_close(before, dspfx.quantize(trainable)(X))


def test_models_in_parts() -> None:
    images = [image.float() for image in IMAGES]
    compact = dspfx.convert(pruned(Detector(), (images,)))
    trainable = dspfx.fake_quantize(compact, [images], call=compact)
    assert type(trainable) is Detector
    quantized = dspfx.quantize(trainable)
    assert all(
        part.quantization for part in quantized.modules() if isinstance(part, dspfx.CompactModule)
    )
    quantized(images)


def test_what_is_refused() -> None:
    compact = dspfx.convert(pruned(Small()))
    trainable = dspfx.fake_quantize(compact, [X])
    with pytest.raises(dspfx.QuantizeError, match="needs no batches"):
        dspfx.quantize(trainable, [X])
    with pytest.raises(dspfx.QuantizeError, match="give batches to calibrate with"):
        dspfx.quantize(compact)
    with pytest.raises(dspfx.QuantizeError, match="quantised already"):
        dspfx.fake_quantize(dspfx.quantize(compact, [X]), [X])
    with pytest.raises(dspfx.QuantizeError, match="there is no batch"):
        dspfx.fake_quantize(compact, [])


class Deep(nn.Module):
    """Convolutions with batch norms, which `convert` folds away; the last has none."""

    def __init__(self, depth: int = 12) -> None:
        super().__init__()
        widths = [3, *[16] * depth]
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
                )
                for i, o in itertools.pairwise(widths)
            )
        )
        self.plain = nn.Conv2d(16, 16, 1, bias=False)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.plain(self.layers(x)).relu()).mean((2, 3))


def test_deep_networks_train_at_the_rates_of_their_own_training() -> None:
    """Without batch norms, they diverged."""
    torch.manual_seed(0)
    model = Deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        fitted(model, optimizer)
    compact = dspfx.convert(dspfx.prepare(model.eval(), X))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in compact.modules())
    trainable = dspfx.fake_quantize(compact, BATCHES)
    norms = [name for name, _ in trainable.named_modules() if name.endswith("_norm")]
    assert len(norms) == 12  # neither the one without a bias, nor the one that makes the results
    optimizer = torch.optim.SGD(trainable.parameters(), lr=0.1, momentum=0.9)
    more = [fitted(trainable, optimizer) for _ in range(30)]
    assert more[-1] < more[0]
    quantized = dspfx.quantize(trainable.eval())
    assert not any(name.endswith("_norm") for name, _ in quantized.named_modules())
    assert_close(trainable(X), quantized(X))


def fitted(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """The loss before a step, of telling the brightest quarter."""
    x = torch.cat(BATCHES)
    quarters = x.mean(1).unflatten(1, (2, 5)).unflatten(3, (2, 5)).mean((2, 4)).flatten(1)
    loss = nn.functional.cross_entropy(model.train()(x), quarters.argmax(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def test_a_single_value_a_channel_is_not_normed_by_itself() -> None:
    compact = dspfx.convert(dspfx.prepare(Deep(2).eval(), X))
    trainable = dspfx.fake_quantize(compact, BATCHES)
    expected = trainable(X[:1, :, :1, :1])
    assert_equal(expected, trainable.train()(X[:1, :, :1, :1]), tolerance=0.2)
