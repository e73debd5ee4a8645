"""Accelerate and Lightning: the examples, and what they do compared with a plain loop."""

import importlib
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from data_parallel import SETTINGS, X, Y, normed, sgd, state
from launch import run, torchrun
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dspfx
from dspfx.recipe.networks.cifar_resnet import CifarResNet

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

# what the trainers warn of is theirs
pytestmark = pytest.mark.filterwarnings("default")


def needs(package: str) -> Any:
    """The package; without it the test is skipped, unless everything has to be there."""
    if os.environ.get("DSPFX_TEST_DATA") == "required":
        return importlib.import_module(package)
    return pytest.importorskip(package)


def assert_trained(printed: str) -> None:
    """One process printed what came out, and it is a good small network."""
    accuracy = re.findall(r"accuracy of the compact network: ([\d.]+)%", printed)
    kept = re.findall(r"kept ([\d.]+)% \(budget 40.00%\)", printed)
    assert len(accuracy) == len(kept) == 1
    assert float(accuracy[0]) > 90
    assert 35 < float(kept[0]) <= 40


# -- the examples ----------------------------------------------------------------------------------


def test_ddp_example(tmp_path: Path) -> None:
    assert_trained(torchrun(str(EXAMPLES / "ddp_training.py"), cwd=tmp_path))
    assert dspfx.load(tmp_path / "digits.safetensors", CifarResNet(8, in_channels=1))


def test_accelerate_example(tmp_path: Path) -> None:
    """By two processes; what one does is compared with a plain loop below."""
    needs("accelerate")
    able = torch.cpu.get_capabilities()  # without instructions for bfloat16, it takes minutes
    half = able.get("amx_bf16") or able.get("avx512_bf16") or False
    settings = {
        "ACCELERATE_USE_CPU": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16" if half else "no",
    }
    script = str(EXAMPLES / "accelerate_training.py")
    assert_trained(torchrun(script, cwd=tmp_path, **settings))


def test_lightning_example(tmp_path: Path) -> None:
    needs("lightning")
    options = ("--accelerator", "cpu", "--devices", "2")
    assert_trained(run(str(EXAMPLES / "lightning_training.py"), *options, cwd=tmp_path))


# -- Accelerate ------------------------------------------------------------------------------------


def reference(steps: int = 2 * len(X), **options: Any) -> tuple[dict[str, Tensor], list[float]]:
    """The state after the same steps in a plain loop, and the losses."""
    model = normed()
    learner = dspfx.GroupLearner(model, sgd(model.parameters()), **settings())
    if options.pop("clip", False):
        options["before_step"] = lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    losses = []
    for _, (x, y) in zip(range(steps), itertools.cycle(zip(X, Y, strict=True))):
        losses.append(
            float(
                learner.step(lambda x=x, y=y: nn.functional.cross_entropy(model(x), y), **options)
            )
        )
    return state(model), losses


def settings() -> dict[str, Any]:
    return {**SETTINGS, "generator": torch.Generator().manual_seed(5)}


def assert_same_state(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


def test_accelerates_optimizer_is_the_one_inside() -> None:
    """Its own would neither step nor forget gradients while it accumulates some."""
    accelerate = needs("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(normed())
    optimizer = accelerator.prepare(sgd(model.parameters()))
    learner = dspfx.GroupLearner(model, optimizer, **settings())
    assert learner.optimizer is optimizer.optimizer
    for step in range(len(X)):
        with accelerator.accumulate(model):
            learner.step(lambda x=X[step], y=Y[step]: nn.functional.cross_entropy(model(x), y))
    assert_same_state(state(model), reference(len(X))[0])
    accelerator.end_training()


def test_an_object_of_a_trainer_that_holds_no_optimizer() -> None:
    """Accelerate's placeholder for DeepSpeed's, for instance."""
    needs("accelerate")
    placeholder = importlib.import_module("accelerate.utils.deepspeed").DummyOptim
    model = normed()
    with pytest.raises(dspfx.LearnError, match="got DummyOptim; pass"):
        dspfx.GroupLearner(model, placeholder(model.parameters()), **settings())


# -- Lightning -------------------------------------------------------------------------------------


def module_of(network: nn.Module, **overrides: Any) -> Any:
    lightning = needs("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.losses = network, []
            self.logged: list[float] = []

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
            self.losses.append(float(loss.detach()))
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

        def on_train_epoch_end(self) -> None:
            self.logged.append(float(self.trainer.callback_metrics["loss"]))

        def configure_optimizers(self) -> Any:
            return sgd(self.parameters())

    for name, value in overrides.items():
        setattr(Module, name, value)
    return Module()


def fit(module: Any, *callbacks: Any, resume: Any = None, **options: Any) -> Any:
    lightning = needs("lightning")
    trainer = lightning.Trainer(
        **{"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        **{"enable_checkpointing": False, "enable_model_summary": False},
        callbacks=list(callbacks),
        **{"max_epochs": 2, **options},
    )
    loader = DataLoader(TensorDataset(X.flatten(0, 1), Y.flatten()), batch_size=X.shape[1])
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def callback(**changes: Any) -> Any:
    needs("lightning")
    return importlib.import_module("dspfx.lightning").GroupLearning(**{**settings(), **changes})


@pytest.mark.parametrize("clip", [False, True])
def test_fitting_is_the_plain_loop(clip: bool) -> None:
    module, learning = module_of(normed()), callback()
    trainer = fit(module, learning, gradient_clip_val=0.05 if clip else None)
    expected, losses = reference(clip=clip)
    assert_same_state(state(module.network), expected)
    assert learning.learner.steps_done == trainer.global_step == 6
    # both calls of training_step, of which the first one logs
    assert module.losses[::2] == losses
    assert len(module.losses) == 12
    assert module.logged == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])
    assert "log" not in vars(module)
    assert "optimizer_step" not in vars(trainer.precision_plugin)


@pytest.mark.parametrize("every", [1, 2])
def test_outputs_are_those_of_the_first_call(every: int) -> None:
    outputs: list[float] = []

    def look(self: Any, given: Any, batch: Any, _: int) -> None:
        outputs.append(float(given["loss"]))

    fit(module_of(normed(), on_train_batch_end=look), callback(strength=0.0, logits_every=every))
    model, losses = normed(), []
    optimizer = sgd(model.parameters())
    for x, y in [*zip(X, Y, strict=True)] * 2:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert outputs == losses


def test_fitting_with_scaled_losses() -> None:
    """Powers of two change no bit, and a step that is skipped changes nothing."""
    needs("lightning")
    plugin = importlib.import_module("lightning.pytorch.plugins").MixedPrecision
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    precision = plugin("16-mixed", "cpu", scaler)
    precision.autocast_context_manager = torch.enable_grad  # in float64 all the same
    module = module_of(normed())
    fit(module, callback(), plugins=[precision])
    assert_same_state(state(module.network), reference()[0])


def test_fitting_by_manual_optimization() -> None:
    def start(self: Any) -> None:
        self.learner = dspfx.GroupLearner(self, self.optimizers(), **settings())

    def step(self: Any, batch: list[Tensor], _: int) -> None:
        self.learner.step(lambda: nn.functional.cross_entropy(self.network(batch[0]), batch[1]))

    own = {"automatic_optimization": False, "on_train_start": start, "training_step": step}
    module = module_of(normed(), **own, on_train_epoch_end=lambda self: None)
    fit(module)
    assert_same_state(state(module.network), reference()[0])


def test_a_fit_that_is_resumed(tmp_path: Path) -> None:
    module = module_of(normed())
    trainer = fit(module, callback(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    resumed, learning = module_of(normed()), callback()
    fit(resumed, learning, resume=tmp_path / "fit.ckpt")
    assert learning.learner.steps_done == 6
    assert_same_state(state(resumed.network), reference()[0])


def test_an_error_while_fitting_leaves_the_trainer_as_it_was() -> None:
    def fail(self: Any, batch: Any, _: int) -> Tensor:
        raise KeyError("batch")

    learning = callback()
    trainer = None

    class Watch(importlib.import_module("lightning").Callback):
        def on_train_start(self, started: Any, module: Any) -> None:
            nonlocal trainer
            trainer = started

    with pytest.raises(KeyError):
        fit(module_of(normed(), training_step=fail), Watch(), learning)
    assert "optimizer_step" not in vars(trainer.precision_plugin)


def test_the_steps_are_the_trainers() -> None:
    learning = callback()
    del learning.settings["total_steps"]
    fit(module_of(normed()), learning)
    assert learning.learner.total_steps == 6
    with pytest.raises(dspfx.LearnError, match="the trainer has no end"):
        fit(module_of(normed()), learning, max_epochs=-1)


def test_a_trainer_without_an_end() -> None:
    def stop(self: Any) -> None:
        self.trainer.should_stop = True

    learning = callback(total_steps=9)
    fit(module_of(normed(), on_train_epoch_end=stop), learning, max_epochs=-1)
    assert (learning.learner.total_steps, learning.learner.steps_done) == (9, 3)


def test_what_cannot_be_learned_with() -> None:
    def two(self: Any) -> Any:
        return [sgd([p]) for p in list(self.parameters())[:2]]

    cases = [
        ({"automatic_optimization": False}, {}, "optimizes manually"),
        ({}, {"accumulate_grad_batches": 2}, "cannot be accumulated"),
        ({"training_step": lambda self, batch, _: None}, {}, "cannot skip a batch"),
    ]
    for overrides, options, words in cases:
        with pytest.raises(dspfx.LearnError, match=words):
            fit(module_of(normed(), **overrides), callback(), **options)
    strategies = importlib.import_module("lightning.pytorch.strategies")
    for kind in (strategies.FSDPStrategy, strategies.DeepSpeedStrategy):
        facts = {"optimizers": [None], "accumulate_grad_batches": 1}
        trainer = mock.Mock(strategy=mock.Mock(spec=kind), **facts)
        with pytest.raises(dspfx.LearnError, match="groups cannot be learned with a "):
            callback().on_train_start(trainer, module_of(normed()))
    plain = nn.Sequential(nn.Conv2d(2, 4, 2), nn.Flatten(), nn.Linear(64, 3)).double()
    with pytest.raises(dspfx.LearnError, match="no gated layer"):
        fit(module_of(plain), callback())


def test_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dspfx.lightning", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(dspfx.LearnError, match=r"pip install 'dspfx\[lightning\]'"):
        importlib.import_module("dspfx.lightning")
