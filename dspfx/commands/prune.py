"""`dspfx prune`: a smaller network without training."""

import itertools
import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm

from dspfx.commands import targets as subjects
from dspfx.commands.files import OWN, check_writable, write, written
from dspfx.commands.session import AsJson, Debug, Threads, say, session
from dspfx.commands.unused_options import refuse
from dspfx.convert import convert
from dspfx.errors import BudgetError
from dspfx.export import SUFFIXES
from dspfx.model.config import PrepareConfig
from dspfx.prepare import prepare
from dspfx.pruning.budget import Budget, PruneReport
from dspfx.pruning.gradual import GradualPruning
from dspfx.pruning.prune import prune as prune_to
from dspfx.pruning.prune_channels import prune_channels
from dspfx.recipe.images.sources import Source, in_batches, open_source
from dspfx.recipe.networks.outputs import check, classification_loss, right_answers
from dspfx.recipe.settings import Recipe
from dspfx.reporting.report import report
from dspfx.training.groups.cluster import cluster_groups
from dspfx.training.recalibrate import recalibrate
from dspfx.utils.typed_json import to_json

BATCH, SAMPLE = 64, 32  # images to recalibrate with, and to ask for gradients, at a time
IMAGES, PASSES = 1024, 40


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
    keep_latency: Annotated[
        float | None,
        typer.Option(help="Fraction of the time to keep instead; layers are measured."),
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
            help="Images whose loss decides what goes, batch norms are recalibrated on, and the "
            "accuracy is measured with: digits, fashion-mnist, cifar10 or a folder with train and "
            "val."
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=2, help=f"Training images to use of them; {IMAGES} if left out."),
    ] = None,
    passes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"Batches of {SAMPLE} whose gradients decide what goes; 0 for the weights alone, "
            f"{PASSES} if left out.",
        ),
    ] = None,
    classes: subjects.Classes = None,
    channels: subjects.Channels = None,
    image_size: subjects.ImageSize = None,
    groups: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Per layer; {subjects.GROUPS} if left out, or none but whole channels for a file "
            "that other programs run.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layers to leave alone; more than once.")
    ] = None,
    round_to: Annotated[int, typer.Option(min=1, help="Keep widths to multiples of it.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the clustering.")] = 0,
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prune a trained network without training it.

    Filters are grouped by clustering. With --data, the gradients of the loss on training images
    decide which channels and inputs of groups go, batch norms are recalibrated, and the accuracy is
    measured; without, inputs of groups go by the weights alone. For a file that other programs run
    whole channels go, unless --groups is given.
    """
    with session(debug=debug, as_json=as_json, threads=threads) as own:
        subjects.check_dense(model, output)
        budget = _budget(keep_macs, keep_params, keep_latency)
        path = check_writable(output or _usual_file(model))
        whole = groups is None and not path.name.endswith(OWN)  # is fast wherever it will run
        given = groups or subjects.GROUPS
        config = PrepareConfig(groups=given, ignore=tuple(ignore or ()), round_to=round_to)
        source, asked = None, channels
        if data is None:
            refuse({"images": images, "passes": passes}, ["images", "passes"], "without --data")
        else:
            source = open_source(Recipe(model, data, image_size=image_size, validation=0.0))
            classes, channels = classes or source.classes, channels or source.channels
            image_size = source.image_size
        subject = subjects.open_model(
            model,
            classes=classes,
            channels=channels,
            image_size=image_size,
            pretrained=pretrained,
            weights=weights,
        )
        subject.check_channels(asked)
        if not (pretrained or weights or subject.architecture.runs_code):
            say("warning: the weights are random; --pretrained or --weights FILE brings others")
        example = subject.images(2)
        if source is not None:
            if source.channels != subject.architecture.channels:
                source = source.coloured()
            check(subject.dense, example, source.classes)
        prepared = prepare(subject.dense, example, config=config)
        if whole:
            say("pruning whole channels, which other programs run fast; groups, too, by --groups")
        else:
            cluster_groups(prepared, seed=seed)
        accuracies: dict[str, float] = {}
        if source is None:
            pruned = _by_weights(prepared, budget, whole)
        else:
            images, passes = images or IMAGES, PASSES if passes is None else passes
            some = source.numbers["train"][:images]
            accuracies["dense"] = _accuracy(subject.dense, source)
            pruned = _pruned(prepared, budget, source, in_batches(some, SAMPLE), passes, whole)
            accuracies["pruned"] = _accuracy(prepared, source)
            recalibrate(prepared, source.batches("train", in_batches(some, BATCH)))
            accuracies["recalibrated"] = _accuracy(prepared, source)
        say(str(pruned))
        compact = convert(prepared)
        write(compact, path, subject)
        found = report(compact)
        lines = [f"test accuracy, {name}: {share:.2%}" for name, share in accuracies.items()]
        text = "\n".join([str(found), *lines, written(path, found)])
        plain: dict[str, Any] = {"file": str(path), "pruned": to_json(pruned)}
        own.give(text, {**plain, "accuracy": accuracies, "report": found.to_dict()})


def _usual_file(model: str) -> Path:
    return Path(f"{model.replace('/', '-').replace(':', '-')}-pruned.safetensors")


def _budget(macs: float | None, params: float | None, latency: float | None) -> Budget:
    if sum(part is not None for part in (macs, params, latency)) != 1:
        raise BudgetError(
            "say how much may remain, by one of --keep-macs, --keep-params and --keep-latency"
        )
    return Budget(macs=macs, params=params, latency=latency)


def _by_weights(prepared: nn.Module, budget: Budget, whole: bool) -> PruneReport:
    """Prune by the weights alone, whole channels or inputs of groups."""
    if whole:
        return prune_channels(prepared, budget)
    return prune_to(prepared, budget, drop_filters=False)


def _pruned(
    prepared: nn.Module,
    budget: Budget,
    source: Source,
    batches: list[Tensor],
    passes: int,
    whole: bool,
) -> PruneReport:
    """By the gradients of some batches, without a step of any optimizer; or by the weights."""
    if not passes:
        return _by_weights(prepared, budget, whole)
    pruning = GradualPruning(
        prepared,
        budget,
        total_steps=passes,
        begin=0.2,
        end=1.0,
        prunings=math.ceil(passes / 2),
        groups=not whole,
    )
    turns = list(itertools.islice(itertools.cycle(batches), passes))
    prepared.train()
    for x, y in tqdm(source.batches("train", turns), "pruning", passes, disable=None, leave=False):
        prepared.zero_grad()
        classification_loss(prepared(x), y).backward()  # type: ignore[no-untyped-call]
        pruning.step()
    prepared.zero_grad()
    prepared.eval()
    assert pruning.report is not None  # the last pruning is due at the last step
    return pruning.report


def _accuracy(model: Any, source: Source) -> float:
    numbers = source.numbers["test"]
    return right_answers(model, source.batches("test", torch.split(numbers, 256))) / len(numbers)
