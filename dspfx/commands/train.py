"""`dspfx train`: the whole road from a dense network to a compact one."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from dspfx.commands import train_options as options
from dspfx.commands.files import check_writable, write, written
from dspfx.commands.session import AsJson, Debug, Session, Threads, say, session
from dspfx.commands.targets import open_subject
from dspfx.commands.unused_options import check_effects
from dspfx.errors import RecipeError
from dspfx.export import SUFFIXES
from dspfx.recipe.epochs import Logger, loggers
from dspfx.recipe.folder import RunFolder
from dspfx.recipe.images.datasets import LOADERS
from dspfx.recipe.presets import preset
from dspfx.recipe.run import Machine
from dspfx.recipe.run import run as run_recipe
from dspfx.recipe.settings import Recipe
from dspfx.recipe.team import rank

PHASES = ("dense", "learn", "tune")
PARTS = ("epochs", "lr", "weight_decay")
GENTLER = 0.1  # of the dense network's rate, where it has learned before


def train(
    model: options.Model = None,
    data: options.Data = None,
    folder: options.Folder = None,
    pretrained: options.Pretrained = None,
    weights: options.Weights = None,
    image_size: options.ImageSize = None,
    images: options.Images = None,
    validation: options.Validation = None,
    preset_name: options.PresetName = None,
    epochs_dense: options.EpochsDense = None,
    epochs_learn: options.EpochsLearn = None,
    epochs_tune: options.EpochsTune = None,
    lr_dense: options.LrDense = None,
    lr_learn: options.LrLearn = None,
    lr_tune: options.LrTune = None,
    weight_decay: options.WeightDecay = None,
    cycles: options.Cycles = None,
    batch: options.Batch = None,
    precision: options.Precision = None,
    distill: options.Distill = None,
    temperature: options.Temperature = None,
    distill_weight: options.DistillWeight = None,
    seed: options.Seed = None,
    method: options.Method = None,
    groups: options.Groups = None,
    keep_macs: options.KeepMacs = None,
    keep_latency: options.KeepLatency = None,
    engine: options.Engine = None,
    quantize: options.Quantize = None,
    strength: options.Strength = None,
    logits_every: options.LogitsEvery = None,
    prune_more: options.PruneMore = None,
    ignore: options.Ignore = None,
    run_dir: options.RunDir = None,
    output: options.Output = None,
    resume: options.Resume = False,
    log: options.Log = None,
    device: options.Device = options.DEVICE,
    threads: Threads = None,
    workers: options.Workers = options.WORKERS,
    checkpoint_minutes: options.CheckpointMinutes = options.CHECKPOINT_MINUTES,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train, prune, fine-tune and convert a network; --resume goes on.

    Settings come from --preset, or from the preset that is called as the data; options change
    single ones. All of a run is in its folder: config.json, metrics.jsonl, checkpoint.pt,
    model.safetensors, report.txt and report.html. Under torchrun, all processes train together.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    with session(debug=debug, as_json=as_json, threads=threads) as own:
        if output is not None:
            check_writable(output, tuple(SUFFIXES))
        path = run_dir or Path("runs") / _name(model, data, preset_name)
        recipe = _resumed(given, path) if resume else _asked(given)
        own.machine = of_this_machine(given)
        machine = Machine(device, workers, checkpoint_minutes)
        logs = loggers(log.split(","), path) if log is not None and rank() == 0 else []
        _go(own, recipe, path, resume, machine, logs, output)


def _asked(given: dict[str, Any]) -> Recipe:
    """The recipe of a new run with the options `given`.

    Raises:
        RecipeError: they contradict each other, one is missing, or one has no effect.
    """
    _check_one_budget(given)
    base = _base(given.get("preset_name"), given.get("model"), given.get("data"))
    if "output" in given:
        given = for_other_programs(base, given)
    recipe = changed(base, given)
    check_effects(recipe, given)
    return gentler(recipe, given)


def _resumed(given: dict[str, Any], path: Path) -> Recipe:
    """The recipe of the run in `path`, which the options `given` do not change.

    Raises:
        RecipeError: they do, or there is no run, or it is not said which.
    """
    if "preset_name" in given:
        raise RecipeError("a run that goes on has its settings; leave out --preset")
    _check_one_budget(given)
    if "run_dir" not in given and "data" not in given:
        raise RecipeError("say which run is to go on: --run-dir")
    recipe = RunFolder(path).recipe()
    if changed(recipe, given) != recipe:
        raise RecipeError(
            f"the run in {path} has other settings, see its config.json; leave these options "
            "out, or begin another run"
        )
    return recipe


def _check_one_budget(given: dict[str, Any]) -> None:
    if "keep_macs" in given and "keep_latency" in given:
        raise RecipeError("give one of --keep-macs and --keep-latency")


def of_this_machine(given: dict[str, Any]) -> list[str]:
    """The options `given` that no file of a run remembers, but for those that are defaults."""
    usual = {
        "threads": None,
        "log": None,
        "device": options.DEVICE,
        "workers": options.WORKERS,
        "checkpoint_minutes": options.CHECKPOINT_MINUTES,
    }
    changed = {name: given.get(name, value) for name, value in usual.items()}
    words = [
        (f"--{name.replace('_', '-')}", str(value))
        for name, value in changed.items()
        if value != usual[name]
    ]
    return [word for pair in words for word in pair]


def _go(
    own: Session,
    recipe: Recipe,
    path: Path,
    resume: bool,
    machine: Machine,
    logs: list[Logger],
    output: Path | None,
) -> None:
    started = time.monotonic()
    own.folder = path
    if resume and rank() == 0:
        say(f"going on with the run in {path}")
    outcome = run_recipe(recipe, path, resume=resume, machine=machine, say=say, loggers=logs)
    seconds = time.monotonic() - started
    lines = [f"finished in {seconds:.0f} s; the compact network is in {outcome.model}"]
    plain: dict[str, Any] = {"run": str(path), "seconds": seconds, **outcome.to_dict()}
    if output is not None and rank() == 0:
        subject = open_subject(str(path), model=recipe.model)
        compact = subject.compact()
        assert compact is not None  # the run has just written it
        write(compact, output, subject)
        lines.append(written(output, outcome.report))
        plain["file"] = str(output)
    own.give("\n".join([f"{outcome}\n", *lines]), plain)


def changed(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """`recipe` with the settings in `given`, by the names of options; others are ignored."""
    own = {field.name for field in dataclasses.fields(Recipe)} - set(PHASES)
    values = {name: value for name, value in given.items() if name in own}
    values = {name: _plain(name, value) for name, value in values.items()}
    for phase in PHASES:
        parts = {part: given.get(f"{part}_{phase}", given.get(part)) for part in PARTS}
        parts = {part: value for part, value in parts.items() if value is not None}
        values[phase] = dataclasses.replace(getattr(recipe, phase), **parts)
    if "cycles" not in values and "epochs_tune" in given:  # as many as fit
        values["cycles"] = min(recipe.cycles, max(1, values["tune"].epochs))
    return dataclasses.replace(recipe, **values)


def gentler(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """With a lower rate for the dense network if it is given weights, unless one is asked for."""
    if not (given.get("pretrained") or "weights" in given) or "lr_dense" in given:
        return recipe
    dense = dataclasses.replace(recipe.dense, lr=GENTLER * recipe.dense.lr)
    return dataclasses.replace(recipe, dense=dense)


def for_other_programs(recipe: Recipe, given: dict[str, Any]) -> dict[str, Any]:
    """The options `given`, with whole channels where neither they nor `recipe` ask for groups.

    Other programs run groups more slowly than whole channels, if faster than the dense layer. Of an
    engine that is named the times decide.
    """
    if recipe.method != "gradual" or {"method", "groups", "engine"} & given.keys():
        return given
    say("pruning whole channels, which other programs run fast; groups, too, by --method gradual")
    return {**given, "method": "channels"}


def _plain(name: str, value: Any) -> Any:
    """An option as a setting; paths are absolute, for the run may be resumed from elsewhere."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, Path) or (name == "data" and value not in LOADERS):
        return str(Path(value).resolve())
    return value


def _base(preset_name: str | None, model: str | None, data: str | None) -> Recipe:
    """What the options change."""
    if preset_name is not None:
        return preset(preset_name)
    if data is None:
        raise RecipeError("say what to learn: --data, or --preset; or go on with a run: --resume")
    if data in LOADERS:
        return preset(data)
    if model is None:
        raise RecipeError("say which network is to learn this: --model")
    return Recipe(data=data)


def _name(model: str | None, data: str | None, preset_name: str | None) -> str:
    """The usual name of the folder of a run."""
    known = preset_name or data or "run"
    text = "-".join([*([model] if model else []), Path(known).name])
    return text.replace("/", "-").replace(":", "-")
