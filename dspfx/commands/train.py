"""`dspfx train`: the whole road from a dense network to a compact one."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dspfx.commands.files import check_writable, write, written
from dspfx.commands.session import AsJson, Debug, Session, Threads, say, session
from dspfx.commands.targets import open_subject
from dspfx.commands.unused_options import check_effects
from dspfx.errors import RecipeError
from dspfx.export import SUFFIXES
from dspfx.recipe.folder import RunFolder
from dspfx.recipe.images.datasets import LOADERS
from dspfx.recipe.presets import PRESETS, preset
from dspfx.recipe.run import Machine
from dspfx.recipe.run import run as run_recipe
from dspfx.recipe.settings import PRECISIONS, Recipe
from dspfx.recipe.team import rank

PHASES = ("dense", "learn", "tune")
PARTS = ("epochs", "lr", "weight_decay")
GENTLER = 0.1  # of the dense network's rate, where it has learned before
MODEL, TRAINING, PRUNING, RUNNING = "Model and data", "Training", "Pruning", "Running"


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)


def train(
    model: Annotated[
        str | None,
        _option(MODEL, "cifar-resnetN, a name of torchvision or timm, or package.module:factory."),
    ] = None,
    data: Annotated[
        str | None,
        _option(MODEL, "digits, fashion-mnist, cifar10, or a folder with train and val in it."),
    ] = None,
    folder: Annotated[Path | None, _option(MODEL, "Where the files of the data are.")] = None,
    pretrained: Annotated[
        bool | None,
        _option(
            MODEL,
            "Start from the pretrained weights that torchvision or timm offers.",
            "--pretrained/--no-pretrained",
        ),
    ] = None,
    weights: Annotated[
        Path | None, _option(MODEL, "Start from the weights in this file (.safetensors, .pt).")
    ] = None,
    image_size: Annotated[int | None, _option(MODEL, "Resize images to so many pixels.")] = None,
    images: Annotated[int | None, _option(MODEL, "Use only so many training images.")] = None,
    validation: Annotated[
        float | None,
        _option(MODEL, "Share of the training images that chooses the best weights (default 0.1)."),
    ] = None,
    preset_name: Annotated[
        str | None,
        _option(TRAINING, f"Start from these settings: {', '.join(PRESETS)}.", "--preset"),
    ] = None,
    epochs_dense: Annotated[int | None, _option(TRAINING, "Before pruning; 0 for none.")] = None,
    epochs_learn: Annotated[
        int | None,
        _option(
            TRAINING, "Of gradual pruning, or group learning; 0 to cluster the weights instead."
        ),
    ] = None,
    epochs_tune: Annotated[
        int | None, _option(TRAINING, "Of fine-tuning; 0 to recalibrate batch norms instead.")
    ] = None,
    lr_dense: Annotated[
        float | None,
        _option(
            TRAINING,
            "Learning rate before pruning; where weights are given a tenth of the usual one.",
        ),
    ] = None,
    lr_learn: Annotated[float | None, _option(TRAINING, "Learning rate in these epochs.")] = None,
    lr_tune: Annotated[float | None, _option(TRAINING, "Learning rate of fine-tuning.")] = None,
    weight_decay: Annotated[float | None, _option(TRAINING, "In all phases.")] = None,
    cycles: Annotated[int | None, _option(TRAINING, "Of fine-tuning.")] = None,
    batch: Annotated[int | None, _option(TRAINING, "Images in a step.")] = None,
    precision: Annotated[str | None, _option(TRAINING, " or ".join(PRECISIONS) + ".")] = None,
    distill: Annotated[
        bool | None,
        _option(TRAINING, "Fine-tune with the dense network's answers.", "--distill/--no-distill"),
    ] = None,
    temperature: Annotated[
        float | None, _option(TRAINING, "Of the distillation (default 4).")
    ] = None,
    distill_weight: Annotated[
        float | None,
        _option(
            TRAINING, "Of the dense network's answers, the labels' being 1 - it (default 0.9)."
        ),
    ] = None,
    seed: Annotated[int | None, _option(TRAINING, "Of everything random (default 0).")] = None,
    method: Annotated[
        str | None,
        _option(
            PRUNING,
            "gradual (default): channels and groups go while the network trains, by what the loss "
            "says. channels: likewise, whole channels only. learned: groups are learned, then "
            "pruned.",
        ),
    ] = None,
    groups: Annotated[int | None, _option(PRUNING, "Per layer.")] = None,
    keep_macs: Annotated[float | None, _option(PRUNING, "Fraction of the MACs to keep.")] = None,
    keep_latency: Annotated[
        float | None,
        _option(PRUNING, "Fraction of the time to keep instead; layers are measured here."),
    ] = None,
    strength: Annotated[
        float | None, _option(PRUNING, "Of the group learning (--method learned).")
    ] = None,
    logits_every: Annotated[
        int | None,
        _option(PRUNING, "Learn groups in every n-th step only, which is faster (default 1)."),
    ] = None,
    prune_more: Annotated[
        float | None,
        _option(
            PRUNING,
            "Of --method learned: fraction of the MACs that a cycle takes away (default 0.001).",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        _option(PRUNING, "Layers to leave alone, such as '*.downsample.*'; more than once."),
    ] = None,
    run_dir: Annotated[
        Path | None,
        _option(
            RUNNING,
            "Folder of the run; runs/, the model if given, and the data or preset if left out.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        _option(
            RUNNING,
            f"Write the compact network to this file, too: {', '.join(SUFFIXES)}; the method is "
            "channels then, if none is asked for.",
            "--output",
            "-o",
        ),
    ] = None,
    resume: Annotated[
        bool, _option(RUNNING, "Go on with the run in this folder.", "--resume")
    ] = False,
    device: Annotated[
        str, _option(RUNNING, "cpu, cuda, or auto for a GPU if there is one (default auto).")
    ] = "auto",
    threads: Threads = None,
    workers: Annotated[
        int, _option(RUNNING, "Processes that read image files (default 4).", min=0)
    ] = 4,
    checkpoint_minutes: Annotated[
        float, _option(RUNNING, "Between checkpoints within an epoch (default 10).", min=0)
    ] = 10.0,
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
        if resume and preset_name is not None:
            raise RecipeError("a run that goes on has its settings; leave out --preset")
        if keep_macs is not None and keep_latency is not None:
            raise RecipeError("give one of --keep-macs and --keep-latency")
        if resume and run_dir is None and data is None:
            raise RecipeError("say which run is to go on: --run-dir")
        path = run_dir or Path("runs") / _name(model, data, preset_name)
        base = RunFolder(path).recipe() if resume else _base(preset_name, model, data)
        if output is not None and not resume:
            given = for_other_programs(base, given)
        recipe = changed(base, given)
        if resume and recipe != base:
            raise RecipeError(
                f"the run in {path} has other settings, see its config.json; leave these options "
                "out, or begin another run"
            )
        if not resume:
            check_effects(recipe, given)
            recipe = gentler(recipe, given)
        own.machine = [*(["--threads", str(threads)] if threads else []), "--device", device]
        machine = Machine(device, workers, checkpoint_minutes)
        _go(own, recipe, path, resume, machine, output)


def _go(
    own: Session, recipe: Recipe, path: Path, resume: bool, machine: Machine, output: Path | None
) -> None:
    started = time.monotonic()
    own.folder = path
    if resume and rank() == 0:
        say(f"going on with the run in {path}")
    outcome = run_recipe(recipe, path, resume=resume, machine=machine, say=say)
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

    Other programs run groups more slowly than whole channels, if faster than the dense layer.
    """
    if recipe.method != "gradual" or "method" in given or "groups" in given:
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
