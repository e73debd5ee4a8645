"""The command line, as a user meets it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from command_line import SMALL, TINY, invoke, saved
from typer.testing import CliRunner

import dspfx
from dspfx.commands import app as cli
from dspfx.commands import bench as bench_command
from dspfx.commands.session import Session, in_options
from dspfx.commands.train import PHASES, _base, changed, gentler, of_this_machine
from dspfx.recipe import Recipe, Schedule, Speed, preset
from dspfx.recipe.networks.architectures import Architecture

__all__ = ["saved"]  # a fixture


def dspfx_process(words: str, folder: Path) -> subprocess.Popen:
    """Runs `dspfx`; Ctrl-C reaches it, also where shells let jobs in the background ignore it."""
    return subprocess.Popen(
        [sys.executable, "-m", "dspfx", *words.split()],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509, no threads
    )


def test_help_and_version() -> None:
    code, text, _ = invoke("--help")
    assert code == 0
    for command in ("train", "prune", "export", "inspect", "bench", "demo"):
        assert command in text
        code, own, _ = invoke(command, "--help")
        assert code == 0
        assert "--json" in own
        assert "--debug" in own
    assert invoke("--version")[1] == f"dspfx {version('dspfx')}\n"


def test_every_setting_of_a_recipe_is_an_option() -> None:
    text = re.sub(r"\s+", " ", invoke("train", "--help")[1])
    names = set(vars(Recipe())) - set(PHASES)
    names |= {
        f"{part}_{phase}" for part in ("epochs", "lr") for phase in ("dense", "learn", "tune")
    }
    for name in names:
        assert f"--{name.replace('_', '-')} " in text


def test_given_weights_learn_at_a_lower_rate() -> None:
    base = Recipe()
    for given in ({"pretrained": True}, {"weights": Path("w.pt")}):
        assert gentler(base, given).dense == Schedule(20, pytest.approx(0.01), warm_up=0.3)
        assert gentler(base, {**given, "lr_dense": 0.1}) == base
    for given in ({}, {"pretrained": False}):
        assert gentler(base, given) == base


def test_options_change_single_settings() -> None:
    given = {"lr_tune": 0.2, "weight_decay": 0.5, "ignore": ["a", "b"], "folder": Path("x")}
    recipe = changed(Recipe(), {**given, "threads": 3})
    assert recipe.tune == Schedule(20, 0.2, 0.5)
    assert recipe.dense == Schedule(20, 0.1, 0.5, 0.3)
    assert (recipe.ignore, recipe.folder) == (("a", "b"), str(Path("x").resolve()))
    assert changed(Recipe(), {}) == Recipe()
    assert changed(Recipe(), {"epochs_tune": 1}).cycles == 1  # more would not fit


@pytest.mark.parametrize(
    "words",
    [
        "demo --data imagenet",
        "demo --data fashion-mnist --folder /nowhere",
        "demo --depth 9",
        "demo --keep-macs 0",
        "train",
        "train --preset nothing",
        "train --data /nowhere --model resnet18",
        "train --data digits --cycles 99 --run-dir /nowhere",
        "train --resume --run-dir /nowhere",
        "inspect nosuchmodel",
        "inspect nosuchfile.safetensors",
        "train --resume",
        "train --resume --preset digits --run-dir /nowhere",
        "prune cifar-resnet8",
        "prune cifar-resnet8 --keep-macs 0.5 -o /nowhere/small.onnx",
        "prune cifar-resnet8 --keep-macs 2",
        "prune cifar-resnet8 --keep-macs 0.5 --keep-latency 0.5",
        "inspect small.onnx --model cifar-resnet8",
        "train --data digits --model cifar-resnet8 --keep-macs 0.5 --keep-latency 0.5",
        "bench no.such.module:model",
        "bench cifar-resnet8 --device bogus",
        "bench cifar-resnet8 --groups 2",
        "bench cifar-resnet8 --precision int8",
        "inspect resnet18 --channels 1",
        "prune cifar-resnet8 --keep-macs 0.5 --images 8",
        "prune cifar-resnet8 --keep-macs 0.5 --engine openvino",
        "prune cifar-resnet8 --keep-macs 0.5 --precision int8",
        "prune cifar-resnet8 --keep-latency 0.5 --engine nothing",
        "prune cifar-resnet8 --keep-latency 0.5 --precision int8",
        "train --data digits --model cifar-resnet8 --engine openvino",
        "train --data digits --model cifar-resnet8 --keep-latency 0.5 --engine nothing",
        "prune cifar-resnet8 --keep-macs 0.5 --passes 0",
        "prune resnet18 --keep-macs 0.5 --pretrained --weights resnet18.pt",
        "prune resnet18 --keep-macs 0.5 --data digits --channels 1",
        "train --data digits --strength 0.1",
        "train --data digits --prune-more 0.1",
        "train --data digits --temperature 2",
        "train --data digits --method channels --groups 2",
        "train --data digits --epochs-tune 0 --cycles 2",
        "train --data digits --epochs-dense 0 --lr-dense 0.1",
    ],
)
def test_errors_are_one_line(words: str) -> None:
    code, out, err = invoke(*words.split())
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in err
    code, out, _ = invoke(*words.split(), "--json")
    assert code == 1
    assert list(json.loads(out)) == ["error"]


def test_debug_shows_where_an_error_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(cli.app, ["inspect", "nosuchmodel", "--debug"])
    assert isinstance(result.exception, dspfx.RecipeError)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("dspfx.commands.targets.open_subject", broken)
    code, _, err = invoke("inspect", "resnet18")
    assert code == 1
    assert err == "error: unexpected ZeroDivisionError: division by zero (--debug shows where)\n"


def test_wrong_options_are_exit_code_2() -> None:
    assert invoke("train", "--nothing")[0] == 2
    assert invoke("bench", "resnet18", "--batch", "0")[0] == 2


def test_inspect_models_and_files(saved: Path) -> None:
    code, text, _ = invoke("inspect", "cifar-resnet8", *SMALL.split())
    assert code == 0
    assert "free filters" in text
    assert re.match(r"[\d.]+% of the MACs, [\d.]+% of the parameters can go at most", text)
    code, text, _ = invoke("inspect", str(saved / "compact.safetensors"))
    assert code == 0
    assert "MACs as emitted" in text
    code, text, _ = invoke("inspect", str(saved / "prepared.safetensors"), "--json")
    found = json.loads(text)
    assert found["after"]["macs"] <= 0.5 * found["before"]["macs"]
    assert found["layers"][0]["layer"] == "conv_1_3x3"


@pytest.mark.parametrize(
    "options",
    ["--classes 5", "--channels 3", "--image-size 32", "--groups 2", "--ignore layer"],
)
def test_a_file_says_itself_what_it_is(options: str, saved: Path) -> None:
    file = str(saved / "compact.safetensors")
    code, _, err = invoke("inspect", file, *options.split())
    assert code == 1
    assert f"{options.split(maxsplit=1)[0]} would have no effect on" in err
    assert invoke("inspect", file, *SMALL.split())[0] == 0  # what it says


def test_files_without_a_name_beside_them(saved: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((saved / "compact.safetensors").read_bytes())
    code, _, err = invoke("inspect", str(alone))
    assert code == 1
    assert "--model NAME --classes N" in err
    code, text, _ = invoke("inspect", str(alone), "--model", "cifar-resnet8", *SMALL.split())
    assert code == 0
    assert "whole model, MACs" in text
    code, _, err = invoke("inspect", str(alone), "--model", "cifar-resnet14", *SMALL.split())
    assert code == 1
    assert "cannot be loaded" in err


def test_what_was_exported_is_no_file_of_dspfx(tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    path.write_bytes(b"of another program")
    for command in ("inspect", "bench"):
        code, _, err = invoke(command, str(path), "--model", "cifar-resnet8")
        assert code == 1
        assert "was exported" in err


def test_filters_of_streams_stay_without_training(saved: Path, tmp_path: Path) -> None:
    """By the weights alone they are no measure of what the stream would lose."""
    words = f"prune cifar-resnet8 --keep-macs 0.9 {SMALL} --weights {saved / 'weights.pt'} --json"
    code, text, err = invoke(*words.split(), "-o", str(tmp_path / "small.safetensors"))
    assert code == 0, err
    layers = json.loads(text)["report"]["layers"]
    writers = [layer for layer in layers if layer["layer"].endswith("conv_b")]
    assert len(writers) == 3
    assert all(layer["filters_before"] == layer["filters_after"] for layer in writers)


@pytest.mark.parametrize("passes", [0, 10])
def test_prune_writes_what_it_says(saved: Path, tmp_path: Path, passes: int) -> None:
    path = tmp_path / "small.safetensors"
    words = f"prune cifar-resnet8 --keep-macs 0.6 --weights {saved / 'weights.pt'} --data digits"
    words += f" --passes {passes} --images 100"
    code, text, err = invoke(*words.split(), "-o", str(path), "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["file"] == str(path)
    assert found["pruned"]["achieved"] <= 0.6
    assert found["accuracy"].keys() == {"dense", "pruned", "compensated"}
    compact = dspfx.load(path, Architecture.beside(path).build())
    data = dspfx.recipe.images.datasets.load("digits")
    with torch.no_grad():
        right = (compact(data.test_x).argmax(1) == data.test_y).float().mean()
    assert float(right) == pytest.approx(found["accuracy"]["compensated"])


def test_a_folder_called_as_a_preset_is_a_folder() -> None:
    assert _base(None, "resnet18", "cifar10-resnet20") == Recipe(data="cifar10-resnet20")
    assert _base(None, None, "digits") == preset("digits")


def test_prune_takes_dense_networks_only(saved: Path, tmp_path: Path) -> None:
    """Beside a file the dense network has random weights; these were pruned."""
    file, weights = saved / "compact.safetensors", saved / "weights.pt"
    code, _, err = invoke(*f"prune {file} --keep-macs 0.5 --weights {weights}".split())
    assert code == 1
    assert "no dense network" in err


def test_prune_says_what_is_random(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    words = f"prune cifar-resnet8 --keep-macs 0.6 --channels 1 --image-size 16 -o {path}"
    assert "warning: the weights are random" in invoke(*words.split(), "--classes", "10")[2]
    words += f" --weights {saved / 'weights.pt'}"
    assert "warning" not in invoke(*words.split(), "--classes", "10")[2]
    code, _, err = invoke(*words.split(), "--classes", "5")
    assert code == 0
    assert "classifier.weight, classifier.bias stay random" in err.replace("\n", " ")


def test_files_of_others_run_no_code(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((saved / "compact.safetensors").read_bytes())
    (tmp_path / "a_hostile_module.py").write_text("raise SystemExit('code was run')")
    Architecture("a_hostile_module:net", 10, 1, 16).write(path)
    monkeypatch.chdir(tmp_path)
    for command in ("inspect", "bench"):
        code, _, err = invoke(command, str(path))
        assert code == 1
        assert "--model a_hostile_module:net" in err
    code, _, err = invoke("inspect", str(path), "--model", "cifar-resnet8", *SMALL.split())
    assert code == 0, err


def test_folders_named_like_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar-resnet8").mkdir()
    assert invoke("inspect", "cifar-resnet8", *SMALL.split())[0] == 0


def test_one_of_several_processes_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    code, out, err = invoke("inspect", "nosuchmodel", "--json")
    assert (code, out) == (1, "")
    assert "there is no model" in err


def test_prune_exports(tmp_path: Path) -> None:
    path = tmp_path / "small.pt2"
    words = f"prune cifar-resnet8 --keep-params 0.6 {SMALL} -o {path}"
    code, text, err = invoke(*words.split())
    assert code == 0, err
    assert text.splitlines()[-1].startswith(f"written: {path}, {path.stat().st_size:,} bytes, ")
    program = torch.export.load(path).module()
    assert program(torch.zeros(3, 1, 16, 16)).shape == (3, 10)
    code, _, err = invoke(*words.split()[:-1], str(tmp_path / "small.exe"))
    assert code == 1
    assert "does not say in which format" in err


def test_prune_quantizes(saved: Path, tmp_path: Path) -> None:
    """The accuracy that is said is that of the file, in a runtime that knows nothing of dspfx."""
    pytest.importorskip("torchao")
    path = tmp_path / "small.onnx"
    words = f"prune cifar-resnet8 --keep-macs 0.6 --weights {saved / 'weights.pt'} --quantize"
    code, text, err = invoke(*words.split(), "-o", str(path))
    assert code == 1
    assert "--quantize would have no effect without --data" in err
    words += " --data digits --passes 0"
    code, text, err = invoke(*words.split(), "-o", str(path), "--json")
    assert code == 0, err
    found = json.loads(text)
    session = onnxruntime.InferenceSession(path)
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}
    data = dspfx.recipe.images.datasets.load("digits")
    (scores,) = session.run(None, {session.get_inputs()[0].name: data.test_x.numpy()})
    right = float((torch.from_numpy(scores).argmax(1) == data.test_y).float().mean())
    assert right == pytest.approx(found["accuracy"]["quantised"], abs=0.006)


@pytest.mark.usefixtures("own_cache")
def test_prune_for_an_engine(saved: Path, tmp_path: Path) -> None:
    """What is measured is what will run: the engine, in integers as it is quantised."""
    pytest.importorskip("torchao")
    path = tmp_path / "small.onnx"
    words = f"prune cifar-resnet8 --keep-latency 0.8 --weights {saved / 'weights.pt'} --quantize"
    words += " --data digits --passes 0 --engine onnxruntime --json"
    code, text, err = invoke(*words.split(), "-o", str(path))
    assert code == 0, err
    found = json.loads(text)
    assert found["pruned"]["achieved"] <= 0.8
    assert found["pruned"]["measured"] > 0
    assert found["report"]["after"]["macs"] < found["report"]["before"]["macs"]
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("words", ["compact.safetensors", "cifar-resnet8 --keep-macs 0.5"])
def test_bench(saved: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed, and how it is shown; that compiling works has tests of its own."""
    timed: list[Any] = []

    def speed(dense: Any, compact: Any, x: torch.Tensor, **_: Any) -> Speed:
        with torch.no_grad():
            timed.append((dense(x).shape, compact(x).shape))
        times = {"dense, eager": 3.0, "dense, compiled": 2.0, "compact, compiled": 0.5}
        return Speed(len(x), 1, times)

    monkeypatch.setattr(bench_command, "speed", speed)
    monkeypatch.chdir(saved)
    small = SMALL.split() if "keep" in words else []
    code, text, err = invoke("bench", *words.split(), *small, "--batch", "4")
    assert code == 0, err
    assert timed == [((4, 10), (4, 10))]
    assert "batch of 4" in text
    assert text.splitlines()[-1] == "compact is 4.00 times as fast, each in its fastest engine"
    code, text, _ = invoke("bench", *words.split(), *small, "--json")
    assert json.loads(text)["milliseconds"]["compact, compiled"] == 0.5


def test_train_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, as users run it; Ctrl-C comes whenever it comes."""
    long = f"{TINY} --epochs-tune 20"  # it is not to end before the signal comes
    process = dspfx_process(f"train {long} --checkpoint-minutes 0 --run-dir run", tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not metrics.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    again = "dspfx train --resume --run-dir run --threads 1 --device cpu --checkpoint-minutes 0.0"
    assert err.splitlines()[-1] == f"interrupted; to go on: {again}"
    assert "Traceback" not in err
    words = "train --resume --run-dir run"
    code, _, err = invoke(*words.split()[:-1], str(tmp_path / "run"), "--keep-macs", "0.9")
    assert code == 1
    assert "has other settings" in err.replace("\n", " ")
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke(*words.split(), "--json", "--threads", "1")
    assert code == 0, err
    result = json.loads(out)
    assert result["run"] == "run"
    assert result["masked"] == result["compact"]
    code, text, _ = invoke("inspect", str(tmp_path / "run"))
    assert code == 0
    assert "whole model, MACs" in text


def test_what_is_usual_is_not_asked_for_again() -> None:
    """The hint to resume holds the options of this machine that are no defaults."""
    usual = {"device": "auto", "workers": 4, "checkpoint_minutes": 10.0, "seed": 3}
    assert of_this_machine(usual) == []
    given = {**usual, "workers": 0, "log": "csv", "threads": 2}
    assert of_this_machine(given) == ["--threads", "2", "--log", "csv", "--workers", "0"]


def test_several_processes_go_on_as_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Session(as_json=False)
    own.folder = tmp_path
    assert own.how_to_go_on() == ""
    (tmp_path / "config.json").touch()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    command = f"torchrun --nproc-per-node 2 -m dspfx train --resume --run-dir {tmp_path}"
    assert own.how_to_go_on() == f"; to go on: {command}"


def test_warnings_are_lines_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(*_: object, **__: object) -> None:
        warnings.warn("mind the gap", dspfx.DspfxWarning, stacklevel=2)
        raise dspfx.RecipeError("and the step")

    monkeypatch.setattr("dspfx.commands.targets.open_subject", warns)
    code, out, err = invoke("inspect", "resnet18")
    assert (code, out) == (1, "")
    assert err == "warning: mind the gap\nerror: and the step\n"


def test_settings_are_called_as_options_are() -> None:
    _, _, err = invoke("inspect", "cifar-resnet8", "--ignore", "nope")
    assert err.startswith("error: --ignore 'nope' matches no module; names look like conv_1_3x3,")
    text = "let PrepareConfig(ignore=...) leave these layers alone"
    assert in_options(text) == "let --ignore leave these layers alone"


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("yolov8n", "error: there is no model 'yolov8n' (the nearest names are "),
        ("resnext", "(the nearest names are resnext"),
        ("runs/nope", "error: there is no file or folder runs/nope, and no model is called like"),
        ("runs", "error: there is no run of dspfx train in the folder runs, and no model is"),
        ("runs/begun", "error: the run in runs/begun has no model yet; to go on with it: dspfx "),
    ],
)
def test_what_is_not_there_is_said_and_nothing_else(
    named: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "begun").mkdir(parents=True)
    (tmp_path / "runs" / "begun" / "config.json").touch()
    code, out, err = invoke("inspect", named)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert said in err


def test_models_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_model_of_mine.py").write_text(
        "from dspfx.recipe.networks.cifar_resnet import CifarResNet\n"
        "def net(num_classes):\n"
        "    print('constructed')\n"
        "    return CifarResNet(8, classes=num_classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    words = "inspect a_model_of_mine:net --classes 7 --image-size 16 --json"
    code, out, err = invoke(*words.split())
    assert code == 0, err
    assert json.loads(out)["layers"][-1]["filters_after"] == 7
    assert "constructed" in err  # whatever others print is no part of the document
    assert sys.path == path


def test_the_whole_demo_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "demo --images 256 --epochs-dense 2 --epochs-learn 2 --epochs-tune 1 --keep-macs 0.5"
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke(*words.split())
    assert code == 0, err
    assert "360 of 360 predictions equal" in out
    tuned = re.search(r"masked, fine-tuned +(\S+%)", out)[1]
    assert re.search(r"compact +(\S+%)", out)[1] == tuned
    kept = float(re.search(r"whole model, MACs.* (\S+)%", out)[1])
    assert 49 < kept <= 50
    assert "stage_3.0.conv_b" in out
    assert re.search(r"compact is \d+\.\d+ times as fast", out)
    difference = float(re.search(r"outputs differ by at most (\S+)", out)[1])
    assert difference < 1e-3
    assert os.listdir(tmp_path) == []
