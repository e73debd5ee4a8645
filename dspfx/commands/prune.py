"""`dspfx prune`: a smaller network without training."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dspfx.budget import Budget
from dspfx.cluster import cluster_groups
from dspfx.commands import subjects
from dspfx.commands.session import AsJson, Debug, Threads, say, session
from dspfx.config import PrepareConfig
from dspfx.convert import convert
from dspfx.errors import BudgetError, ExportError
from dspfx.export import SUFFIXES, export
from dspfx.prepare import prepare
from dspfx.prune import prune as prune_to
from dspfx.recalibrate import recalibrate
from dspfx.recipe.networks import check, right_answers
from dspfx.recipe.settings import Recipe
from dspfx.recipe.sources import Source, in_batches, open_source
from dspfx.records import to_json
from dspfx.report import report
from dspfx.save import save

BATCH = 64


def prune(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="cifar-resnetN, a name of torchvision or timm, or package.module:factory.",
            show_default=False,
        ),
    ],
    keep_macs: Annotated[float | None, typer.Option(help="Fraction of the MACs to keep.")] = None,
    keep_params: Annotated[
        float | None, typer.Option(help="Fraction of the parameters to keep instead.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help=f"File to write: .safetensors, or {', '.join(SUFFIXES)}, which run without "
            "dspfx. MODEL-pruned.safetensors if left out.",
        ),
    ] = None,
    pretrained: subjects.Pretrained = False,
    weights: subjects.Weights = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Recalibrate batch norms on these images, and measure the accuracy: digits, "
            "fashion-mnist, cifar10 or a folder with train and val."
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=2, help="Images to recalibrate with.")] = 1024,
    classes: subjects.Classes = None,
    channels: subjects.Channels = None,
    image_size: subjects.ImageSize = None,
    groups: Annotated[int, typer.Option(min=1, help="Per layer.")] = 4,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layers to leave alone; more than once.")
    ] = None,
    round_to: Annotated[int, typer.Option(min=1, help="Keep widths to multiples of it.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the clustering.")] = 0,
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prune a trained network by its weights alone, without training.

    Filters are grouped by clustering, channels chosen by energy. With --data, batch norms are
    recalibrated on training images, and the accuracy is measured.
    """
    with session(debug=debug, as_json=as_json, threads=threads) as own:
        if keep_macs is None and keep_params is None:
            raise BudgetError("say how much may remain: --keep-macs or --keep-params")
        budget = Budget(macs=keep_macs, params=keep_params)
        path = output or Path(f"{model.replace('/', '-').replace(':', '-')}-pruned.safetensors")
        if not path.name.endswith((".safetensors", *SUFFIXES)):
            raise ExportError(
                f"the suffix of {path.name} does not say in which format to write; .safetensors, "
                f"{', '.join(SUFFIXES)} do"
            )
        if not path.parent.is_dir():
            raise ExportError(f"there is no folder {path.parent} to write {path.name} into")
        config = PrepareConfig(groups=groups, ignore=tuple(ignore or ()), round_to=round_to)
        source = None
        if data is not None:
            source = open_source(Recipe(data=data, image_size=image_size, validation=0.0))
            classes, channels = classes or source.classes, channels or source.channels
            image_size = source.image_size
        if not (pretrained or weights or ":" in model):
            say("warning: the weights are random; --pretrained or --weights FILE brings others")
        subject = subjects.open_model(
            model,
            classes=classes,
            channels=channels,
            image_size=image_size,
            pretrained=pretrained,
            weights=weights,
        )
        if source is not None and source.channels != subject.architecture.channels:
            source = source.coloured()
        example = subject.images(2)
        accuracies: dict[str, float] = {}
        if source is not None:
            check(subject.dense, example, source.classes)
            accuracies["dense"] = _accuracy(subject.dense, source)
        prepared = prepare(subject.dense, example, config=config)
        cluster_groups(prepared, seed=seed)
        pruned = prune_to(prepared, budget)
        say(str(pruned))
        if source is not None:
            accuracies["pruned"] = _accuracy(prepared, source)
            numbers = source.numbers["train"][:images]
            recalibrate(prepared, source.batches("train", in_batches(numbers, BATCH)))
            accuracies["recalibrated"] = _accuracy(prepared, source)
        compact = convert(prepared)
        if path.suffix == ".safetensors":
            save(compact, path)
            subject.architecture.write(path)
        else:
            export(compact, example, path)
        found = report(compact)
        lines = [f"test accuracy, {name}: {share:.2%}" for name, share in accuracies.items()]
        text = "\n".join([str(found), *lines, f"written: {path}"])
        plain: dict[str, Any] = {"file": str(path), "pruned": to_json(pruned)}
        own.give(text, {**plain, "accuracy": accuracies, "report": found.to_dict()})


def _accuracy(model: Any, source: Source) -> float:
    numbers = source.numbers["test"]
    return right_answers(model, source.batches("test", torch.split(numbers, 256))) / len(numbers)
