"""A run as a whole: what it leaves, and that it goes on bit for bit wherever it stopped."""

import csv
import dataclasses
import importlib
import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.utils import save_image

import dspfx
from dspfx.pruning.latency import Latency
from dspfx.pruning.layer_times import LayerTimes
from dspfx.pruning.whole_times import WholeTimes
from dspfx.recipe import PRESETS, Machine, Outcome, Recipe, Schedule, preset, run, training
from dspfx.recipe.comparison import compare
from dspfx.recipe.epochs import Epoch, loggers
from dspfx.recipe.folder import RunFolder
from dspfx.recipe.images.sources import open_source
from dspfx.recipe.networks.architectures import Architecture
from dspfx.recipe.networks.cifar_resnet import CifarResNet
from dspfx.recipe.networks.outputs import classification_loss, logits_of
from dspfx.utils.typed_json import from_json, to_json

# 90 images in batches of 32: three steps an epoch
TINY = Recipe(
    images=100,
    batch=32,
    dense=Schedule(2, 0.1, warm_up=0.3),
    learn=Schedule(1, 0.05),
    tune=Schedule(2, 0.05),
    method="learned",
    strength=0.05,
    keep_macs=0.4,
    cycles=2,
    prune_more=0.05,
)
EVERY_STEP = Machine("cpu", workers=0, checkpoint_minutes=0.0)

# networks that have learned so little may well collapse
pytestmark = pytest.mark.filterwarnings("ignore::dspfx.DspfxWarning")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert (one / "report.txt").read_text() == (other / "report.txt").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    outcome = run(TINY, folder, machine=Machine("cpu"))
    torch.set_num_threads(threads)
    return folder, outcome


def test_what_a_run_leaves(whole: tuple[Path, Outcome]) -> None:
    folder, outcome = whole
    assert sorted(path.name for path in folder.iterdir()) == [
        *("checkpoint.pt", "config.json", "dense.pt", "metrics.jsonl", "model.safetensors"),
        *("model.safetensors.json", "report.html", "report.json", "report.txt"),
    ]
    assert RunFolder(folder).recipe() == TINY
    phases = [(line.get("phase"), line.get("epoch"), line.get("event")) for line in metrics(folder)]
    assert phases == [
        *(("dense", 1, None), ("dense", 2, None), (None, None, "dense"), ("learn", 1, None)),
        *((None, None, "prune"), ("tune", 1, None), (None, None, "prune"), ("tune", 2, None)),
    ]
    kept = [line["kept"] for line in metrics(folder) if line.get("event") == "prune"]
    assert kept[0] > kept[1]
    assert kept[1] <= 0.4
    report = json.loads((folder / "report.json").read_text())
    assert report["compact"] == outcome.compact
    assert str(outcome) == (folder / "report.txt").read_text().rstrip("\n")
    assert outcome.masked == outcome.compact
    assert outcome.equal_predictions == outcome.test_images == 360
    assert 0 <= outcome.largest_difference < 1e-4
    assert outcome.report.after.macs <= 0.4 * outcome.report.before.macs


EPOCHS = [("dense", 1), ("dense", 2), ("learn", 1), ("tune", 1), ("tune", 2)]


@pytest.mark.parametrize("method", ["learned", "gradual"])
def test_every_epoch_is_told(method: str, tmp_path: Path) -> None:
    recipe = dataclasses.replace(TINY, method=method)
    told: list[Epoch] = []
    said: list[str] = []
    outcome = run(recipe, tmp_path, machine=EVERY_STEP, say=said.append, loggers=[told.append])
    assert [(epoch.phase, epoch.number) for epoch in told] == EPOCHS
    assert [epoch.done for epoch in told] == [1, 2, 3, 4, 5]
    assert [epoch.remaining > 0 for epoch in told] == [True] * 4 + [False]
    logged = [record for record in metrics(tmp_path) if "loss" in record]
    for epoch, record in zip(told, logged, strict=True):
        assert (epoch.loss, epoch.accuracy) == (record["loss"], record["validation"])
        assert str(epoch) in said
    assert told[0].macs == told[1].macs == 1.0
    kept = outcome.report.after.macs / outcome.report.before.macs
    assert told[-1].macs == kept <= recipe.keep_macs
    assert (told[2].macs == 1.0) is (method == "learned")
    assert str(dataclasses.replace(told[1], loss=0.5, seconds=61.3, remaining=7300.0)) == (
        f"dense 2/2: loss 0.5000, validation accuracy {told[1].accuracy:.2%}, 100.0% of the MACs, "
        "1 min 1 s, about 2 h 1 min left"
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in ("seconds", "remaining")} for row in found]


def test_a_log_of_a_run_that_goes_on_has_every_epoch_once(tmp_path: Path) -> None:
    """As if it had never stopped; that it told of an epoch before it died makes no second row."""
    recipe = dataclasses.replace(TINY, method="gradual", dense=Schedule(1, 0.1))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(recipe, whole, machine=EVERY_STEP, loggers=loggers(["csv"], whole))
    assert [(row["phase"], int(row["number"])) for row in rows(whole / "metrics.csv")] == (
        [("dense", 1), *EPOCHS[2:]]
    )

    def die(epoch: Epoch) -> None:
        if epoch.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, broken, machine=EVERY_STEP, loggers=[*loggers(["csv"], broken), die])
    assert len(rows(broken / "metrics.csv")) == 3
    run(recipe, broken, resume=True, machine=EVERY_STEP, loggers=loggers(["csv"], broken))
    assert rows(broken / "metrics.csv") == rows(whole / "metrics.csv")


def test_logs_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(dspfx.RecipeError, match="there is no log 'wandb'; choose from csv, tens"):
        loggers(["wandb"], tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(dspfx.RecipeError, match="pip install tensorboard"):
        loggers(["tensorboard"], tmp_path)
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    epoch = Epoch("dense", 1, 2, 1, 0.5, None, 1.0, 0.1, 1.0, 1.0)
    with pytest.raises(dspfx.RecipeError, match=r"metrics.csv is no log of a run; move it away"):
        loggers(["csv"], tmp_path)[0](epoch)


def test_tensorboard_shows_the_same(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    (log,) = loggers(["tensorboard"], tmp_path)
    for done in (1, 2):
        log(Epoch("dense", done, 2, done, 0.5 / done, None, 0.25, 0.1, 1.0, 1.0))
    (again,) = loggers(["tensorboard"], tmp_path)  # of a run that goes on
    again(Epoch("dense", 2, 2, 2, 0.125, 0.75, 0.25, 0.1, 1.0, 1.0))
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 0.5), (2, 0.125)]
    assert [(e.step, e.value) for e in found.Scalars("macs")] == [(1, 0.25), (2, 0.25)]
    assert [(e.step, e.value) for e in found.Scalars("accuracy")] == [(2, 0.75)]


def test_few_test_images_are_said_to_be_few(whole: tuple[Path, Outcome]) -> None:
    outcome = dataclasses.replace(whole[1], compact=0.99, test_images=360)
    assert "An accuracy on 360 images is uncertain by ±0.6 points" in str(outcome)
    outcome = dataclasses.replace(whole[1], compact=1.0, test_images=10_000)
    assert "An accuracy on 10,000 images is uncertain by ±0.0 points" in str(outcome)


def test_the_model_can_be_loaded(whole: tuple[Path, Outcome]) -> None:
    path = whole[0] / "model.safetensors"
    architecture = Architecture.beside(path)
    assert architecture == Architecture("cifar-resnet8", 10, 1, 16)
    compact = dspfx.load(path, architecture.build())
    right = 0
    data = dspfx.recipe.images.datasets.load("digits")
    with torch.no_grad():
        right = int((compact(data.test_x).argmax(1) == data.test_y).sum())
    assert right == round(whole[1].compact * 360)


class KilledError(BaseException):
    """As if the process had been killed: nothing in the library catches it."""


def run_in_lives(recipe: Recipe, folder: Path, every: int, patch: pytest.MonkeyPatch) -> None:
    """Killed just before, and just after, every so many checkpoints, in turns."""
    saves, save = itertools.count(1), training.save_checkpoint

    def save_and_die(*args: Any, **kwargs: Any) -> None:
        number = next(saves)
        if number % every:
            save(*args, **kwargs)
            return
        if (number // every) % 2:
            save(*args, **kwargs)
        raise KilledError

    patch.setattr(training, "save_checkpoint", save_and_die)
    lives = 0
    while True:
        lives += 1
        assert lives < 40
        try:
            run(recipe, folder, resume=lives > 1, machine=EVERY_STEP)
            break
        except KilledError:
            pass
    patch.undo()
    assert lives > 2


@pytest.mark.parametrize("every", [2, 5])
def test_a_run_goes_on_from_any_checkpoint(
    whole: tuple[Path, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    run_in_lives(TINY, tmp_path / "run", every, monkeypatch)
    assert_same_run(tmp_path / "run", whole[0])


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("gradual", {"distill": True, "precision": "bfloat16"}),
        ("channels", {"tune": Schedule(0, 0.05)}),
    ],
)
def test_pruned_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, more: dict[str, Any]
) -> None:
    recipe = dataclasses.replace(TINY, method=method, learn=Schedule(3, 0.05), **more)
    outcome = run(recipe, tmp_path / "whole", machine=Machine("cpu"))
    found = [line for line in metrics(tmp_path / "whole") if line.get("event") == "prune"]
    assert [line["cycle"] for line in found] == [0]
    assert 0.3 < found[0]["kept"] <= 0.4
    assert outcome.report.after.macs == found[0]["macs"]
    assert outcome.pruned == found[0]["test"]
    if method == "channels":  # all filters of a layer read the same inputs
        assert all(len(set(layer.inputs[1])) == 1 for layer in outcome.report.layers)
    else:
        pruned, tuned = (
            weights_in(tmp_path / "whole" / name) for name in ("pruned.pt", "checkpoint.pt")
        )
        assert tuned < 0.8 * pruned  # what is dead was not trained
        run_in_lives(recipe, tmp_path / "run", 4, monkeypatch)
        assert_same_run(tmp_path / "run", tmp_path / "whole")


def weights_in(path: Path) -> int:
    """How many weights the model in a checkpoint has."""
    state = torch.load(path, weights_only=True)["states"]["model"]
    return sum(tensor.numel() for name, tensor in state.items() if name.endswith("weight"))


def test_a_killed_process_goes_on_bit_for_bit(whole: tuple[Path, Outcome], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = RunFolder(folder)
    config.begin(TINY, open_source(TINY).fingerprint)
    words = f"train --resume --run-dir {folder} --threads 1 --device cpu --checkpoint-minutes 0"
    command = [sys.executable, "-m", "dspfx", *words.split()]
    for _ in range(2):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        before = _state(config)
        changes = random.randrange(1, 6)
        while changes and process.poll() is None:
            time.sleep(0.01)
            now = _state(config)
            changes, before = changes - (now != before), now
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(TINY, folder, resume=True, machine=EVERY_STEP)
    assert metrics(folder) == metrics(whole[0])
    ours, theirs = ((f / "model.safetensors").read_bytes() for f in (folder, whole[0]))
    assert ours == theirs


def _state(folder: RunFolder) -> tuple[int, int]:
    path = folder.checkpoint
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else (0, 0)


def test_a_finished_run_can_be_resumed(whole: tuple[Path, Outcome]) -> None:
    folder, outcome = whole
    model, lines = (folder / "model.safetensors").read_bytes(), metrics(folder)
    again = run(TINY, folder, resume=True, machine=Machine("cpu"))
    assert to_json(again) == to_json(outcome)
    assert (folder / "model.safetensors").read_bytes() == model
    assert metrics(folder) == lines


def test_folders_are_not_mixed_up(whole: tuple[Path, Outcome], tmp_path: Path) -> None:
    folder, _ = whole
    before = sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir())
    with pytest.raises(dspfx.RecipeError, match="there is a run in"):
        run(TINY, folder)
    with pytest.raises(dspfx.RecipeError, match="another recipe"):
        run(dataclasses.replace(TINY, seed=1), folder, resume=True)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in folder.iterdir()) == before
    with pytest.raises(dspfx.RecipeError, match="there is no run in"):
        run(TINY, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(dspfx.RecipeError, match="is damaged"):
        run(TINY, tmp_path, resume=True)


def test_what_cannot_work_is_found_before_anything_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for changes, error, message in (
        ({"model": "nosuchmodel"}, dspfx.RecipeError, "there is no model"),
        ({"data": "nosuchdata"}, dspfx.DataError, "no data set"),
        ({"ignore": ("nothing.*",)}, dspfx.PrepareError, "matches no module"),
        (
            {"model": "timm/vit_tiny_patch16_224"},
            dspfx.RecipeError,
            "--image-size gives them another",
        ),
        ({"model": "lraspp_mobilenet_v3_large"}, dspfx.RecipeError, "only classifiers"),
        ({"weights": str(tmp_path / "none.pt")}, dspfx.RecipeError, "no weights"),
        ({"keep_macs": 0.001, "cycles": 1}, dspfx.BudgetError, "0.1"),
        ({"keep_macs": 0.001, "method": "gradual"}, dspfx.BudgetError, "one channel left"),
        ({"data": str(tmp_path), "folder": "elsewhere"}, dspfx.DataError, "leave out --folder"),
    ):
        with pytest.raises(error, match=message):
            run(dataclasses.replace(TINY, **changes), folder)
        assert not folder.exists()


@pytest.mark.parametrize("method", ["gradual", "learned"])
def test_a_share_of_the_time_is_kept(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([{}] * 2 + [{"stage_1_0_conv_a": (1e-3,) * 5}] * 9)  # at first like MACs
    monkeypatch.setattr(
        dspfx.pruning.latency,
        "layer_times",
        lambda *_: LayerTimes(next(times) if method == "gradual" else {}, {}),
    )
    monkeypatch.setattr(Latency, "corrected", lambda self, *_: self)
    monkeypatch.setattr(WholeTimes, "__init__", lambda *_: None)
    monkeypatch.setattr(WholeTimes, "fraction", lambda *_: 0.5)
    recipe = dataclasses.replace(
        TINY, method=method, keep_latency=0.6, keep_macs=0.1, prune_more=0.0
    )
    found = run(recipe, tmp_path / "run").report
    assert 0.5 < found.after.macs / found.before.macs <= 0.6


def test_what_is_quantised_is_the_model(tmp_path: Path) -> None:
    """And its accuracy is said; the one before stays beside it."""
    pytest.importorskip("torchao")
    recipe = dataclasses.replace(TINY, method="channels", cycles=1, quantize=True)
    outcome = run(recipe, tmp_path / "run", machine=Machine("cpu"))
    assert outcome.quantized is not None
    assert f"compact, quantised to 8 bits  {outcome.quantized:.2%}" in str(outcome)
    files = RunFolder(tmp_path / "run")
    images = open_source(recipe)
    before, after = (
        dspfx.load(path, Architecture.beside(files.model).build().eval())  # type: ignore[union-attr]
        for path in (files.float32, files.model)
    )
    right = [0, 0]
    with torch.no_grad():
        for x, y in images.batches("test", [images.numbers["test"]]):
            right = [
                count + int((model(x).argmax(1) == y).sum())
                for count, model in zip(right, (before, after), strict=True)
            ]
    count = len(images.numbers["test"])
    assert right[0] / count == outcome.compact
    assert right[1] / count == outcome.quantized
    again = run(recipe, tmp_path / "run", resume=True, machine=Machine("cpu"))
    assert to_json(again) == to_json(outcome)


def test_without_learning_and_fine_tuning(tmp_path: Path) -> None:
    """Clusters and recalibration instead, on given weights, and a teacher nobody asks."""
    dspfx.save_checkpoint(tmp_path / "weights.pt", model=CifarResNet(8, in_channels=1))
    none = Schedule(0, 0.1)
    recipe = dataclasses.replace(
        TINY, dense=none, learn=none, tune=none, weights=str(tmp_path / "weights.pt")
    )
    outcome = run(recipe, tmp_path / "run", machine=Machine("cpu"))
    assert [line["event"] for line in metrics(tmp_path / "run")] == ["dense", "prune"]
    assert outcome.report.after.macs <= 0.4 * outcome.report.before.macs
    assert outcome.validation is not None
    assert "masked, recalibrated" in str(outcome)
    assert "fine-tun" not in str(outcome)
    again = run(recipe, tmp_path / "run", resume=True, machine=Machine("cpu"))
    assert to_json(again) == to_json(outcome)


def test_a_run_that_has_begun_does_without_the_first_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, save = tmp_path / "weights.pt", training.save_checkpoint
    save(weights, model=CifarResNet(8, in_channels=1))
    recipe = dataclasses.replace(
        TINY, learn=Schedule(0, 0.05), tune=Schedule(0, 0.05), weights=str(weights)
    )

    def save_and_die(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        raise KilledError

    monkeypatch.setattr(training, "save_checkpoint", save_and_die)
    with pytest.raises(KilledError):
        run(recipe, tmp_path / "run", machine=Machine("cpu"))
    monkeypatch.undo()
    weights.unlink()
    assert run(recipe, tmp_path / "run", resume=True, machine=Machine("cpu")).test_images == 360


def test_a_run_goes_on_with_the_images_it_began_with_only(tmp_path: Path) -> None:
    """One that was gone made training images of those kept for validation."""
    generator = torch.Generator().manual_seed(0)
    for part, name, number in itertools.product(("train", "val"), ("cats", "dogs"), range(6)):
        path = tmp_path / "images" / part / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(torch.rand(3, 16, 16, generator=generator), path)
    phases = {"dense": Schedule(1, 0.1), "learn": Schedule(0, 0.1), "tune": Schedule(0, 0.1)}
    recipe = Recipe(data=str(tmp_path / "images"), image_size=16, batch=4, **phases)
    folder, machine = tmp_path / "run", Machine("cpu", workers=0)
    run(recipe, folder, machine=machine)
    lines = metrics(folder)
    run(recipe, folder, resume=True, machine=machine)
    path.rename(path.with_name("new.png"))
    with pytest.raises(dspfx.RecipeError, match="the images are not those"):
        run(recipe, folder, resume=True, machine=machine)
    assert metrics(folder) == lines


def test_distillation_bfloat16_and_grey_images_in_colour(tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        TINY,
        model="dspfx.recipe.networks.cifar_resnet:CifarResNet",
        data="digits",
        distill=True,
        precision="bfloat16",
        learn=Schedule(1, 0.05),
        logits_every=2,
        validation=0.0,
        cycles=1,
        tune=Schedule(1, 0.05),
    )
    factory = "dspfx.recipe.networks.architectures.Architecture._imported"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, lambda self: CifarResNet(8, in_channels=3))
        outcome = run(recipe, tmp_path, machine=Machine("cpu"))
    assert outcome.validation is None
    assert outcome.equal_predictions == 360
    assert outcome.report.layers[0].inputs[0] == 3


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    recipe = dataclasses.replace(TINY, dense=Schedule(1, 1e30))
    with pytest.raises(dspfx.LearnError, match=r"phase dense is (nan|inf): lower its"):
        run(recipe, tmp_path, machine=Machine("cpu", checkpoint_minutes=0.0))
    states = dspfx.load_checkpoint(RunFolder(tmp_path).checkpoint)  # the last good one
    assert math.isfinite(states["place"]["loss"])


def test_metrics_are_cut_but_not_made_longer(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log(epoch=1)
    size = folder.logged()
    folder.cut_metrics(size + 5)
    assert folder.logged() == size
    folder.cut_metrics(size - 5)
    assert folder.logged() == size - 5


def test_several_outputs_and_their_losses() -> None:
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    alone = classification_loss(logits, labels)
    for output in (logits, (logits,), [logits, None], {"logits": logits}, {"out": logits}):
        assert torch.equal(logits_of(output), logits)
        assert torch.equal(classification_loss(output, labels), alone)
    both = classification_loss((logits, logits), labels)
    assert float(both) == pytest.approx(1.3 * float(alone))
    for wrong in (None, {}, (), torch.zeros(2, 3, 4, 4)):
        with pytest.raises(dspfx.RecipeError, match="only classifiers"):
            logits_of(wrong)


def test_presets_are_what_the_authors_did() -> None:
    for name, depth, strength in (("cifar10-resnet20", 20, 2e-3), ("cifar10-resnet56", 56, 5e-4)):
        own = preset(name)
        assert own.model == f"cifar-resnet{depth}"
        assert own.strength == strength
        assert (own.dense.epochs, own.learn.epochs, own.tune.epochs, own.cycles) == (
            164,
            120,
            400,
            5,
        )
        assert (own.dense.lr, own.learn.lr, own.tune.lr) == (0.1, 0.05, 0.015)
        decays = [s.weight_decay for s in (own.dense, own.learn, own.tune)]
        assert decays == [1e-4, 1e-3, 1e-3]
        assert (own.batch, own.prune_more, own.groups) == (128, 0.001, 4)
    with pytest.raises(dspfx.RecipeError, match="choose from digits"):
        preset("mnist")


def test_recipes_are_json() -> None:
    for recipe in (*PRESETS.values(), Recipe(ignore=["stem"])):  # type: ignore[arg-type]
        assert from_json(Recipe, json.loads(json.dumps(to_json(recipe)))) == recipe


def test_the_engine_of_a_budget() -> None:
    recipe = Recipe(keep_latency=0.5, engine="openvino", quantize=True)
    assert recipe.budget == dspfx.Budget(latency=0.5, engine="openvino", precision="int8")
    for given, message in (
        ({"engine": "openvino"}, "ask for that"),
        ({"keep_latency": 0.5, "engine": "none"}, "no engine 'none'"),
    ):
        with pytest.raises(dspfx.DspfxError, match=message):
            Recipe(**given)  # type: ignore[arg-type]


def test_settings_out_of_range() -> None:
    for wrong in (
        {"batch": 0},
        {"validation": 1.0},
        {"precision": "float16"},
        {"cycles": 21},
        {"distill_weight": 2.0},
        {"temperature": 0.0},
        {"dense": Schedule(-1, 0.1)},
        {"tune": Schedule(1, 0.0)},
        {"tune": Schedule(1, float("inf"))},
        {"tune": Schedule(20, 0.1, warm_up=0.3)},
        {"learn": Schedule(1, 0.1, weight_decay=-1.0)},
        {"strength": -1.0},
        {"method": "magnitude"},
        {"method": "channels", "learn": Schedule(0, 0.1)},
        {"strength": float("nan")},
        {"prune_more": 1.5},
        {"temperature": float("inf")},
        {"pretrained": True, "weights": "x.pt"},
    ):
        with pytest.raises(dspfx.RecipeError):
            Recipe(**wrong)
    with pytest.raises(dspfx.BudgetError):
        Recipe(keep_macs=0.0)
    with pytest.raises(dspfx.BudgetError):
        Recipe(keep_latency=1.5)
    with pytest.raises(dspfx.PrepareError):
        Recipe(groups=0)


def test_differences_that_are_no_numbers() -> None:
    one, other = nn.Linear(2, 3), nn.Linear(2, 3)
    nn.init.constant_(other.weight, float("nan"))
    batches = [(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))] * 2
    assert math.isnan(compare(one, other, batches).largest_difference)
    assert compare(one, one, batches).largest_difference == 0


class Drops(nn.Module):
    """A network whose training draws from torch's own generator."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.3)),
            *(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def test_dropout_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "network_that_drops", sys.modules[__name__])
    recipe = dataclasses.replace(TINY, model="network_that_drops:Drops", groups=2)
    run(recipe, tmp_path / "whole", machine=Machine("cpu"))
    save, saves = training.save_checkpoint, itertools.count(1)

    def save_and_die(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        if next(saves) in (2, 5, 9, 11):
            raise KilledError

    monkeypatch.setattr(training, "save_checkpoint", save_and_die)
    for life in range(5):
        try:
            run(recipe, tmp_path / "killed", resume=life > 0, machine=EVERY_STEP)
        except KilledError:
            assert life < 4
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
