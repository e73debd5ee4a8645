"""`compress`: from a model and its data to a compact model, in one call."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import dspfx
from helpers import assert_equal, unchanged

SIDE = 32
SHAPES = ("circle", "square", "cross")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )


def images(batches: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches, 8, 3, 12, 12, generator=generator)
    y = torch.randint(4, (batches, 8), generator=generator)
    return list(zip(x, y, strict=True))


def loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return cross_entropy(model(x), y)


def compress(model: nn.Module, batches: Any = None, how: Any = loss, **options: Any) -> Any:
    given = {"keep_macs": 0.5, "steps": 8, **options}
    return dspfx.compress(model, images() if batches is None else batches, how, **given)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("groups", [True, False])
def test_one_call(training: bool, groups: bool) -> None:
    model = network().train(training)
    told: list[tuple[int, float, float]] = []
    with unchanged(model):
        found = compress(model, groups=groups, progress=lambda *step: told.append(step))
    compact, report = found
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())
    assert not compact.training
    assert 0.4 < report.after.macs / report.before.macs <= 0.5
    assert str(found) == str(report)
    assert repr(found).startswith("Compressed(Sequential: ")
    assert len(repr(found)) < 100
    assert [step for step, _, _ in told] == list(range(1, 9))
    assert 1 >= told[0][2] > told[-1][2]
    assert told[-1][2] == report.after.macs / report.before.macs
    assert all(math.isfinite(value) for _, value, _ in told)


def test_what_comes_out_is_what_the_three_verbs_make() -> None:
    """Written out by hand in float64, on the same batches: nothing else is done."""
    batches = [(x.double(), y) for x, y in images()]
    model = network().double()
    torch.manual_seed(3)
    compact, _ = compress(model, batches, steps=7, prune_until=0.5, learning_rate=0.02)
    prepared = dspfx.prepare(model, batches[0][0]).train()
    settings = {"begin": 0.05, "end": 0.5, "groups": False}
    pruning = dspfx.GradualPruning(prepared, dspfx.Budget(macs=0.5), total_steps=7, **settings)
    optimizer = torch.optim.SGD(prepared.parameters(), 0.02, 0.9, weight_decay=1e-4)
    torch.manual_seed(3)
    for step in range(7):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / 7))
        optimizer.zero_grad()
        loss(prepared, batches[step % 3]).backward()
        pruning.step()
        optimizer.step()
    for size in (12, 9):
        x = torch.randn(2, 3, size, size, dtype=torch.float64)
        assert_equal(dspfx.convert(prepared)(x), compact(x), 1e-9)
        assert_equal(prepared.eval()(x), compact(x), 1e-9)


def test_a_data_loader_and_a_seed() -> None:
    x, y = (torch.cat(parts) for parts in zip(*images(), strict=True))
    results = []
    for seed in (5, 5, 6):
        model = network()
        torch.manual_seed(seed)
        loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
        results.append(compress(model, loader).model.state_dict())
    same, other = results[1:]
    assert all(torch.equal(value, same[name]) for name, value in results[0].items())
    assert not all(
        torch.equal(value, other[name]) if value.shape == other[name].shape else False
        for name, value in same.items()
        if name in other
    )


class Captioner(nn.Module):
    """Reads a dict of two inputs, and is called by name; it returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3))
        self.numbers = nn.Linear(5, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, pixels: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        features = self.images(pixels).relu().mean((2, 3)) + self.numbers(numbers)
        return {"out": self.head(features.relu())}


def test_batches_of_any_kind() -> None:
    batches = [
        {"pixels": torch.randn(4, 3, 8, 8), "numbers": torch.randn(4, 5), "names": ["a"] * 4}
        for _ in range(2)
    ]

    def own_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        out = model(pixels=batch["pixels"], numbers=batch["numbers"])["out"]
        return mse_loss(out, torch.ones_like(out))

    model = Captioner()
    compact, report = compress(model, batches, own_loss, steps=5)
    assert report.after.macs <= 0.5 * report.before.macs
    given = {name: batches[0][name] for name in ("pixels", "numbers")}
    assert compact(**given)["out"].shape == (4, 2)


def test_another_optimizer() -> None:
    made: list[torch.optim.Optimizer] = []

    def adam(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.AdamW(parameters, 1e-3))
        return made[-1]

    compress(network(), optimizer=adam)
    assert made[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)  # along a cosine
    assert len(made) == 1


def test_layers_that_are_to_stay() -> None:
    config = dspfx.PrepareConfig(ignore=("0",), round_to=4)
    report = compress(network(), config=config, keep_macs=0.6).report
    assert not report.layers[0].gated
    assert all(layer.filters[1] % 4 == 0 for layer in report.layers)
    assert 0 < report.after.macs <= 0.6 * report.before.macs


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whatever_the_caller_is_doing(mode: Any) -> None:
    with mode():
        found = compress(network(), steps=3).report
    assert 0 < found.after.macs <= 0.5 * found.before.macs


def once() -> Iterator[Any]:
    yield from images(2)


def of_another(_: nn.Module, batch: Any) -> Tensor:
    return loss(network(), batch)


def after_two(value: float) -> Callable[[nn.Module, Any], Tensor]:
    seen = []

    def own(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return loss(model, batch) * (value if len(seen) > 3 else 1)

    return own


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"batches": []}, dspfx.DataError, "holds no batch"),
        ({"batches": once()}, dspfx.DataError, "only once"),
        ({"keep_macs": 0}, dspfx.BudgetError, "fraction in"),
        ({"keep_macs": 1.5}, dspfx.BudgetError, "fraction in"),
        ({"keep_macs": 1e-6}, dspfx.BudgetError, "remains"),
        ({"steps": 0}, dspfx.LearnError, "steps must be"),
        ({"steps": 2.5}, dspfx.LearnError, "steps must be"),
        ({"prune_until": 0}, dspfx.LearnError, "prune_until"),
        ({"learning_rate": float("nan")}, dspfx.LearnError, "learning_rate"),
        (
            {"learning_rate": 0.1, "optimizer": torch.optim.SGD},
            dspfx.LearnError,
            "its own learning rate",
        ),
        ({"optimizer": lambda parameters: None}, dspfx.LearnError, "made a NoneType"),
        ({"how": nn.CrossEntropyLoss()}, dspfx.LearnError, r"loss\(model, batch\)"),
        ({"how": cross_entropy}, dspfx.LearnError, r"loss\(model, batch\)"),
        ({"how": of_another}, dspfx.LearnError, "never calls the model"),
        ({"how": lambda m, b: m(b[0])}, dspfx.LearnError, r"no scalar tensor but \(8, 4\)"),
        ({"how": lambda m, b: loss(m, b).item()}, dspfx.LearnError, "but float"),
        ({"how": lambda m, b: loss(m, b).detach()}, dspfx.LearnError, "does not depend"),
        ({"how": after_two(math.nan)}, dspfx.LearnError, "is nan at step 3"),
        ({"how": after_two(math.inf)}, dspfx.LearnError, "is inf at step 3"),
    ],
)
def test_what_cannot_work_is_refused(given: dict[str, Any], kind: type, text: str) -> None:
    model = network()
    with unchanged(model), pytest.raises(kind, match=text):
        compress(model, **given)
    assert issubclass(kind, dspfx.DspfxError)


def drawn(shape: str, place: int) -> Image.Image:
    """A white shape somewhere on grey."""
    image = Image.new("RGB", (SIDE, SIDE), (60 + 5 * (place % 7),) * 3)
    pen, left, top = ImageDraw.Draw(image), 4 + 3 * (place % 5), 4 + 2 * (place % 6)
    box = (left, top, left + 12, top + 12)
    if shape == "circle":
        pen.ellipse(box, "white")
    elif shape == "square":
        pen.rectangle(box, "white")
    else:
        pen.line(box, "white", 5)
        pen.line((box[0], box[3], box[2], box[1]), "white", 5)
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in one folder for each class."""
    for shape in SHAPES:
        (tmp_path / "images" / shape).mkdir(parents=True)
        for place in range(16):
            drawn(shape, place).save(tmp_path / "images" / shape / f"{place}.png")
    return tmp_path / "images"


@pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="needs onnxscript")
@pytest.mark.parametrize(("name", "keep"), [("resnet10t", 0.5), ("mobilenetv3_small_050", 0.7)])
def test_a_model_of_timm_on_a_folder_of_images_to_a_smaller_file(
    name: str, keep: float, folder: Path, tmp_path: Path
) -> None:
    """Counted from the graph that other programs run, the MACs are those that were asked for."""
    timm, runtime = pytest.importorskip("timm"), pytest.importorskip("onnxruntime")
    from torchvision import transforms  # noqa: PLC0415
    from torchvision.datasets import ImageFolder  # noqa: PLC0415

    from onnx_graphs import macs_of, parameters_of  # noqa: PLC0415

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(SHAPES))
    data = ImageFolder(str(folder), transforms.ToTensor())
    loader = DataLoader(data, batch_size=16, shuffle=True)
    compact, report = dspfx.compress(model, loader, loss, keep_macs=keep, steps=12)
    x = next(iter(loader))[0]
    files = tmp_path / "dense.onnx", tmp_path / "small.onnx"
    for network, path in zip((model.eval(), compact), files, strict=True):
        dspfx.export(network, x, path)
    dense, small = (macs_of(path) for path in files)
    assert dense == report.before.macs
    assert small == report.after.macs == report.emitted.macs
    assert small / dense == pytest.approx(keep, rel=0.01)
    assert parameters_of(files[1]) < parameters_of(files[0])
    assert files[1].stat().st_size < files[0].stat().st_size
    session = runtime.InferenceSession(str(files[1]), providers=["CPUExecutionProvider"])
    (answers,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_equal(compact(x), torch.from_numpy(answers), 1e-4)
