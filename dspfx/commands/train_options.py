"""The options of `dspfx train`, in panels of its help."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dspfx.engines.engines import NAMES
from dspfx.export import SUFFIXES
from dspfx.recipe.epochs import LOGGERS
from dspfx.recipe.images.calibration import CALIBRATION
from dspfx.recipe.presets import PRESETS
from dspfx.recipe.settings import PRECISIONS

DEVICE, WORKERS, CHECKPOINT_MINUTES = "auto", 4, 10.0
MODEL, TRAINING, PRUNING, RUNNING = "Model and data", "Training", "Pruning", "Running"


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, **more)


Model = Annotated[
    str | None,
    _option(MODEL, "cifar-resnetN, a name of torchvision or timm, or package.module:factory."),
]
Data = Annotated[
    str | None,
    _option(MODEL, "digits, fashion-mnist, cifar10, or a folder with train and val in it."),
]
Folder = Annotated[Path | None, _option(MODEL, "Where the files of the data are.")]
Pretrained = Annotated[
    bool | None,
    _option(
        MODEL,
        "Start from the pretrained weights that torchvision or timm offers.",
        "--pretrained/--no-pretrained",
    ),
]
Weights = Annotated[
    Path | None, _option(MODEL, "Start from the weights in this file (.safetensors, .pt).")
]
ImageSize = Annotated[int | None, _option(MODEL, "Resize images to so many pixels.")]
Images = Annotated[int | None, _option(MODEL, "Use only so many training images.")]
Validation = Annotated[
    float | None,
    _option(MODEL, "Share of the training images that chooses the best weights (default 0.1)."),
]
PresetName = Annotated[
    str | None,
    _option(TRAINING, f"Start from these settings: {', '.join(PRESETS)}.", "--preset"),
]
EpochsDense = Annotated[int | None, _option(TRAINING, "Before pruning; 0 for none.")]
EpochsLearn = Annotated[
    int | None,
    _option(TRAINING, "Of gradual pruning, or group learning; 0 to cluster the weights instead."),
]
EpochsTune = Annotated[
    int | None, _option(TRAINING, "Of fine-tuning; 0 to recalibrate batch norms instead.")
]
LrDense = Annotated[
    float | None,
    _option(
        TRAINING,
        "Learning rate before pruning; where weights are given a tenth of the usual one.",
    ),
]
LrLearn = Annotated[float | None, _option(TRAINING, "Learning rate in these epochs.")]
LrTune = Annotated[float | None, _option(TRAINING, "Learning rate of fine-tuning.")]
WeightDecay = Annotated[float | None, _option(TRAINING, "In all phases.")]
Cycles = Annotated[int | None, _option(TRAINING, "Of fine-tuning.")]
Batch = Annotated[int | None, _option(TRAINING, "Images in a step.")]
Precision = Annotated[str | None, _option(TRAINING, " or ".join(PRECISIONS) + ".")]
Distill = Annotated[
    bool | None,
    _option(TRAINING, "Fine-tune with the dense network's outputs.", "--distill/--no-distill"),
]
Temperature = Annotated[float | None, _option(TRAINING, "Of the distillation (default 4).")]
DistillWeight = Annotated[
    float | None,
    _option(TRAINING, "Of the dense network's outputs, the labels' being 1 - it (default 0.9)."),
]
Seed = Annotated[int | None, _option(TRAINING, "Of everything random (default 0).")]
Method = Annotated[
    str | None,
    _option(
        PRUNING,
        "gradual (default): channels and groups go while the network trains, by what the loss "
        "says. channels: likewise, whole channels only. learned: groups are learned, then "
        "pruned.",
    ),
]
Groups = Annotated[int | None, _option(PRUNING, "Per layer.")]
KeepMacs = Annotated[float | None, _option(PRUNING, "Fraction of the MACs to keep.")]
KeepLatency = Annotated[
    float | None,
    _option(PRUNING, "Fraction of the time to keep instead; layers are measured here."),
]
Engine = Annotated[
    str | None,
    _option(PRUNING, f"What will run it, where --keep-latency is measured: {', '.join(NAMES)}."),
]
Quantize = Annotated[
    bool | None,
    _option(
        PRUNING,
        f"Round weights and activations to 8 bits in the end, by {CALIBRATION} training images.",
        "--quantize/--no-quantize",
    ),
]
Strength = Annotated[float | None, _option(PRUNING, "Of the group learning (--method learned).")]
LogitsEvery = Annotated[
    int | None,
    _option(PRUNING, "Learn groups in every n-th step only, which is faster (default 1)."),
]
PruneMore = Annotated[
    float | None,
    _option(
        PRUNING,
        "Of --method learned: fraction of the MACs that a cycle takes away (default 0.001).",
    ),
]
Ignore = Annotated[
    list[str] | None,
    _option(PRUNING, "Layers to leave alone, such as '*.downsample.*'; more than once."),
]
RunDir = Annotated[
    Path | None,
    _option(
        RUNNING,
        "Folder of the run; runs/, the model if given, and the data or preset if left out.",
    ),
]
Output = Annotated[
    Path | None,
    _option(
        RUNNING,
        f"Write the compact network to this file, too: {', '.join(SUFFIXES)}; the method is "
        "channels then, if none is asked for.",
        "--output",
        "-o",
    ),
]
Resume = Annotated[bool, _option(RUNNING, "Go on with the run in this folder.", "--resume")]
Device = Annotated[
    str, _option(RUNNING, f"cpu, cuda, or auto for a GPU if there is one (default {DEVICE}).")
]
Workers = Annotated[
    int, _option(RUNNING, f"Processes that read image files (default {WORKERS}).", min=0)
]
CheckpointMinutes = Annotated[
    float,
    _option(
        RUNNING, f"Between checkpoints within an epoch (default {CHECKPOINT_MINUTES:g}).", min=0
    ),
]
Log = Annotated[
    str | None,
    _option(
        RUNNING,
        f"Write every epoch to other logs, too, in the folder of the run: {', '.join(LOGGERS)}, or "
        "both with a comma between.",
    ),
]
