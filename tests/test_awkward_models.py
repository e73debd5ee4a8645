"""Ten awkward models: they prepare, train, and are equal after conversion."""

import copy
import pickle
from typing import Any

import pytest
import torch
from models import MODELS, TiedAutoencoder
from torch import Tensor, nn

import dspfx
from dspfx.layers.gated import gated_layers
from helpers import assert_equal, leaves, random_masks, randomise, unchanged

# the layers that have gates; all others read the inputs or come last
GATED = {
    "C2f": ["cv1.0", "m.0.cv1.0", "m.0.cv2.0", "m.1.cv1.0", "m.1.cv2.0", "cv2.0", "head"],
    "UNet": ["down1.2", "down2.0", "bottom.0", "up1", "mix1.0", "up2", "mix2.0", "out"],
    "Generator": ["main.0", "main.3", "main.7"],
    "Siamese": ["trunk.2.0", "embed"],
    "TiedAutoencoder": ["second"],
    "CRNN": ["conv.2.0", "hidden"],
    "Mixer": [f"blocks.{b}.{m}" for b in (0, 1) for m in ("tokens.0", "tokens.3", "channels.2")],
    "ListInput": ["fuse.conv.0", "fuse.out"],
    "FPN": ["stages.1.0", "stages.2.0", *[f"lateral.{i}" for i in range(3)]],
    "Configurable": ["body.0"],
}


def call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*(inputs if isinstance(inputs, tuple) else (inputs,)))


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_equal_after_conversion(kind: type[nn.Module]) -> None:
    model, inputs = randomise(kind()).double().eval(), MODELS[kind]
    with unchanged(model):
        prepared = dspfx.prepare(model, inputs, config=dspfx.PrepareConfig(groups=2))
    assert set(GATED[kind.__name__]) <= gated_layers(prepared).keys()
    keys = [k for k in prepared.state_dict() if "gate" not in k]
    assert keys == list(model.state_dict())
    with torch.no_grad():
        expected = call(model, inputs)
        assert_equal(expected, call(prepared, inputs), tolerance=0)
        for seed in range(6):
            masks = random_masks(prepared, keep=0.5, drop=0.1 * seed, seed=seed)
            dspfx.set_masks(prepared, masks)
            compact = dspfx.convert(prepared)
            assert_equal(call(prepared, inputs), call(compact, inputs))
    assert dspfx.report(compact).after.macs < dspfx.report(compact).before.macs


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_trains_like_the_original(kind: type[nn.Module]) -> None:
    """Outputs and every gradient are those of the model that was prepared."""
    model, inputs = randomise(kind()).double().train(), MODELS[kind]
    prepared = dspfx.prepare(model, inputs)
    results = []
    for module in (model, prepared):
        torch.manual_seed(0)
        out = call(module, inputs)
        sum(leaf.square().mean() for leaf in leaves(out)).backward()
        results.append(out)
    assert_equal(*results, tolerance=0)
    for name, parameter in prepared.named_parameters():
        assert_equal(model.get_parameter(name).grad, parameter.grad, 1e-12)


def test_tied_weights_stay_tied() -> None:
    """A masked layer lends its whole weight to others: the mask is of the layer, not the weight."""
    model = randomise(TiedAutoencoder()).double().eval()
    prepared = dspfx.prepare(model, MODELS[TiedAutoencoder])
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[:3] = False
    dspfx.set_masks(prepared, {"second": mask})

    def by_hand(x: Tensor) -> Tensor:
        first, second, third = model.first, model.second, model.third
        h = torch.relu(first(x.flatten(1)))
        h = torch.relu(torch.where(mask.any(1), second(h), 0.0))
        y = torch.relu(third(h) @ third.weight)
        y = torch.relu(y @ second.weight + model.shift)
        return (y @ first.weight).view(x.shape)

    x = MODELS[TiedAutoencoder]
    assert_equal(by_hand(x), prepared(x), 1e-12)


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_copies_and_pickles(kind: type[nn.Module]) -> None:
    model, inputs = randomise(kind()).double().eval(), MODELS[kind]
    prepared = dspfx.prepare(model, inputs)
    dspfx.set_masks(prepared, random_masks(prepared))
    compact = dspfx.convert(prepared)
    with torch.no_grad():
        for original in (prepared, compact):
            for twin in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
                assert type(twin).__mro__[1] is type(original).__mro__[1]
                assert_equal(call(original, inputs), call(twin, inputs), tolerance=0)
                assert_equal(call(compact, inputs), call(dspfx.convert(twin), inputs), 1e-12)
