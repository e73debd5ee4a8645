"""Networks by name, and the weights they start from."""

import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

import dspfx
from dspfx.recipe.networks.architectures import (
    Architecture,
    input_channels,
    read_weights,
    start_from,
)
from dspfx.recipe.networks.cifar_resnet import CifarResNet
from dspfx.recipe.networks.libraries import Preprocessing, preprocessing_of


def build(name: str, classes: int = 5, channels: int = 3) -> nn.Module:
    return Architecture(name, classes, channels, 32).build()


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("cifar-resnet8", 1),
        ("squeezenet1_1", 3),
        ("torchvision/shufflenet_v2_x0_5", 3),
        ("timm/mobilenetv3_small_050", 1),
        ("mobilenetv3_small_050", 1),
        ("dspfx.recipe.networks.cifar_resnet:CifarResNet", 3),
    ],
)
def test_names(name: str, channels: int) -> None:
    model = build(name, 5 if "models:" not in name else 10, channels).eval()
    assert input_channels(model) == channels
    assert model(torch.zeros(2, channels, 64, 64)).shape[0] == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cifar-resnet20", Preprocessing(32, 37)),
        ("dspfx.recipe.networks.cifar_resnet:CifarResNet", Preprocessing()),
        ("resnet18", Preprocessing()),
        ("inception_v3", Preprocessing(299, 342)),
        ("efficientnet_b4", Preprocessing(380, 384, "bicubic")),
        ("efficientnet_v2_l", Preprocessing(480, 480, "bicubic", (0.5,) * 3, (0.5,) * 3)),
        ("vgg16", Preprocessing()),  # not that of the weights without a classifier
        ("fcn_resnet50", Preprocessing()),
        ("timm/mobilenetv3_small_050", Preprocessing(224, 256, "bicubic")),
        (
            "timm/vit_tiny_patch16_224",
            Preprocessing(224, 248, "bicubic", (0.5,) * 3, (0.5,) * 3),
        ),
    ],
)
def test_images_are_what_weights_are_made_for(name: str, expected: Preprocessing) -> None:
    """ImageNet's mean was subtracted for all; sizes were 224 but for one."""
    assert preprocessing_of(name) == expected


def test_a_factory_is_given_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\n"
        "def small(num_classes, in_chans=3, width=4):\n"
        "    return nn.Sequential(nn.Conv2d(in_chans, width, 3), nn.AdaptiveAvgPool2d(1),\n"
        "                         nn.Flatten(), nn.Linear(width, num_classes))\n"
        "def wrong():\n"
        "    return 3\n"
        "made = small(3)\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert build("own_models:small", 7, 2)(torch.zeros(1, 2, 8, 8)).shape == (1, 7)
    with pytest.raises(dspfx.RecipeError, match="gives a int"):
        build("own_models:wrong")
    for name in ("made", "number"):
        with pytest.raises(dspfx.RecipeError, match="name a function or class that makes"):
            build(f"own_models:{name}")
    for name in ("own_models:missing", "no_such_package:x"):
        with pytest.raises(dspfx.RecipeError, match="cannot be imported"):
            build(name)


def test_versions_of_modules_go_with_their_weights(tmp_path: Path) -> None:
    """MNASNet asks how old the weights are that it loads."""
    model = build("torchvision/mnasnet0_5", 5)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    for state in (model.state_dict(), read_weights(tmp_path / "m.pt")):
        fresh = build("torchvision/mnasnet0_5", 5)
        start_from(fresh, state, "these weights")
        assert torch.equal(fresh.classifier[1].weight, model.classifier[1].weight)


def test_names_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("resnet9000", "timm/resnet9000", "cifar-resnet", "", "a/b/c"):
        with pytest.raises(dspfx.RecipeError, match="there is no model"):
            build(name)
    with pytest.raises(dspfx.DspfxError, match="6n"):
        build("cifar-resnet9")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(dspfx.RecipeError, match=r"pip install 'dspfx\[models\]'"):
        build("timm/resnet18")
    with pytest.raises(dspfx.RecipeError, match="there is no model"):
        build("mobilenetv3_small_050")


def test_offered_weights_keep_all_but_the_last_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = torchvision.models.squeezenet1_1()  # of 1000 classes
    monkeypatch.setattr(
        torchvision.models.SqueezeNet1_1_Weights,
        "get_state_dict",
        lambda *_, **__: offered.state_dict(),
    )
    with pytest.warns(dspfx.DspfxWarning, match="stay random"):
        model = Architecture("squeezenet1_1", 5, 3, 224, pretrained=True).build(load=True)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    own, theirs = model.state_dict(), offered.state_dict()
    equal = {name for name in own if own[name].shape == theirs[name].shape}
    assert own.keys() - equal == {"classifier.1.weight", "classifier.1.bias"}
    assert all(torch.equal(own[name], theirs[name]) for name in equal)


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.models.SqueezeNet1_1_Weights, "get_state_dict", fails)
    with pytest.raises(dspfx.RecipeError, match="cannot be had: no route"):
        Architecture("squeezenet1_1", 5, 3, 224, pretrained=True).build(load=True)
    with pytest.raises(dspfx.RecipeError, match="there are no weights"):
        Architecture("cifar-resnet8", 5, 3, 32, pretrained=True).build(load=True)


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_what_offered_weights_do_to_their_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GoogLeNet's weights are for images in [-1, 1], which the network then makes itself."""
    offered = torchvision.models.googlenet(transform_input=True, init_weights=False).eval()
    monkeypatch.setattr(
        torchvision.models.GoogLeNet_Weights,
        "get_state_dict",
        lambda *_, **__: offered.state_dict(),
    )
    architecture = Architecture("googlenet", 1000, 3, 64, pretrained=True)
    model, x = architecture.build(load=True).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), offered(x))
    prepared = dspfx.prepare(model, x)
    dspfx.prune(prepared, dspfx.Budget(macs=0.9))
    path = tmp_path / "model.safetensors"
    compact = dspfx.convert(prepared)
    dspfx.save(compact, path)
    architecture.write(path)
    found = Architecture.beside(path)
    assert found == architecture
    loaded = dspfx.load(path, found.build().eval())
    with torch.no_grad():
        assert torch.equal(loaded(x), compact(x))


def test_offered_weights_have_a_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest of vgg16 have none: it is all NaN."""
    asked = []

    def state_of(weights: object, **_: object) -> None:
        asked.append(weights)
        raise OSError

    monkeypatch.setattr(torchvision.models.VGG16_Weights, "get_state_dict", state_of)
    with pytest.raises(dspfx.RecipeError, match="cannot be had"):
        Architecture("vgg16", 1000, 3, 224, pretrained=True).build(load=True)
    assert asked == [torchvision.models.VGG16_Weights.IMAGENET1K_V1]


def test_weights_in_files(tmp_path: Path) -> None:
    state = CifarResNet(8).state_dict()
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save({"state_dict": {f"module.{n}": t for n, t in state.items()}}, tmp_path / "c.pt")
    dspfx.save_checkpoint(tmp_path / "d.pt", model=CifarResNet(8), epoch=3)
    for name in ("a.safetensors", "b.pt", "c.pt"):
        found = read_weights(tmp_path / name)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[n], t) for n, t in state.items())
    assert read_weights(tmp_path / "d.pt").keys() == state.keys()
    (tmp_path / "text.pt").write_text("text")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("missing.pt", "text.pt", "list.pt", "text.safetensors"):
        with pytest.raises(dspfx.RecipeError, match="weights"):
            read_weights(tmp_path / name)


def test_weights_of_others_are_refused() -> None:
    model = CifarResNet(8, classes=5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wide = CifarResNet(8, widths=(8, 16, 32))
    for state in (CifarResNet(14).state_dict(), {}, wide.state_dict()):
        with pytest.raises(dspfx.RecipeError, match="are not of this CifarResNet"):
            start_from(model, state, "the weights")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(dspfx.RecipeError, match=r"see conv_1_3x3\.weight"):
        start_from(model, CifarResNet(8, classes=5, in_channels=1).state_dict(), "the weights")
    with pytest.warns(dspfx.DspfxWarning, match=r"classifier\.bias stay random"):
        start_from(model, CifarResNet(8, classes=9).state_dict(), "the weights")
    assert torch.equal(model.classifier.weight, before["classifier.weight"])


def test_old_files_do_not_count_batches() -> None:
    other, model = CifarResNet(8), CifarResNet(8)
    state = {n: t for n, t in other.state_dict().items() if not n.endswith("num_batches_tracked")}
    start_from(model, state, "the weights")
    assert torch.equal(model.classifier.weight, other.classifier.weight)


def test_the_file_beside_a_model(tmp_path: Path) -> None:
    own, path = Architecture("cifar-resnet8", 10, 1, 16), tmp_path / "model.safetensors"
    assert Architecture.beside(path) is None
    own.write(path)
    assert Architecture.beside(path) == own
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors.json"]
    beside = tmp_path / "model.safetensors.json"
    beside.write_text(beside.read_text().replace(',\n  "pretrained": false', ""))  # as once
    assert Architecture.beside(path) == own
    (tmp_path / "model.safetensors.json").write_text('{"name": 3}')
    with pytest.raises(dspfx.RecipeError, match="is damaged"):
        Architecture.beside(path)
