"""`dspfx prune`: a smaller network without training."""

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dspfx.commands import prune_options as options
from dspfx.commands import targets as subjects
from dspfx.commands.files import OWN, check_writable, write, written
from dspfx.commands.session import AsJson, Debug, Session, Threads, say, session
from dspfx.commands.unused_options import refuse
from dspfx.convert import convert
from dspfx.errors import BudgetError
from dspfx.model.config import PrepareConfig
from dspfx.prepare import prepare
from dspfx.pruning.budget import Budget, PruneReport
from dspfx.pruning.gradual import GradualPruning
from dspfx.pruning.prune import prune as prune_to
from dspfx.pruning.prune_channels import prune_channels
from dspfx.quantization.quantize import quantize as to_int8
from dspfx.recipe.images.calibration import calibration
from dspfx.recipe.images.sources import Source, in_batches, open_source
from dspfx.recipe.networks.outputs import check, classification_loss, right_answers
from dspfx.recipe.settings import Recipe
from dspfx.reporting.report import report
from dspfx.training.groups.cluster import cluster_groups
from dspfx.training.recalibrate import recalibrate
from dspfx.training.repair.compensate import compensate
from dspfx.utils.typed_json import to_json

BATCH = 64  # images to repair with at a time


def prune(
    model: options.Model,
    keep_macs: options.KeepMacs = None,
    keep_params: options.KeepParams = None,
    keep_latency: options.KeepLatency = None,
    engine: options.Engine = None,
    precision: options.Precision = None,
    output: options.Output = None,
    pretrained: subjects.Pretrained = False,
    weights: subjects.Weights = None,
    data: options.Data = None,
    images: options.Images = None,
    passes: options.Passes = None,
    classes: subjects.Classes = None,
    channels: subjects.Channels = None,
    image_size: subjects.ImageSize = None,
    groups: options.Groups = None,
    ignore: options.Ignore = None,
    round_to: options.RoundTo = 1,
    quantize: options.Quantize = False,
    seed: options.Seed = 0,
    threads: Threads = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prune a trained network without training it.

    Filters are grouped by clustering. With --data, the gradients of the loss on training images
    decide which channels and inputs of groups go, layers are fitted to what they gave before, and
    the accuracy is measured; without, inputs of groups go by the weights alone. For a file that
    other programs run, and with --quantize, whole channels go, unless --groups is given.
    """
    with session(debug=debug, as_json=as_json, threads=threads) as own:
        subjects.check_dense(model, output)
        if keep_latency is None:
            refuse(locals(), ("engine", "precision"), "without --keep-latency")
        precision = precision or ("int8" if quantize and keep_latency is not None else None)
        budget = _budget(keep_macs, keep_params, keep_latency, engine, precision)
        path = check_writable(output or _usual_file(model))
        # what is fast wherever it will run
        whole = groups is None and (quantize or not path.name.endswith(OWN))
        given = groups or subjects.GROUPS
        config = PrepareConfig(groups=given, ignore=tuple(ignore or ()), round_to=round_to)
        if data is None:
            asked = {"images": images, "passes": passes, "quantize": quantize or None}
            refuse(asked, list(asked), "without --data")
            source = None
        else:
            source = open_source(Recipe(model, data, image_size=image_size, validation=0.0))
        subject, source = _opened(
            model,
            source,
            classes=classes,
            channels=channels,
            image_size=image_size,
            pretrained=pretrained,
            weights=weights,
        )
        prepared = prepare(subject.dense, subject.images(2), config=config)
        if whole:
            say("pruning whole channels, which other programs run fast; groups, too, by --groups")
        else:
            cluster_groups(prepared, seed=seed)
        accuracies: dict[str, float] = {}
        if source is None:
            pruned = _by_weights(prepared, budget, whole)
        else:
            some = source.numbers["train"][: images or options.IMAGES]
            count = options.PASSES if passes is None else passes
            accuracies["dense"] = _accuracy(subject.dense, source)
            pruned = _by_gradients(prepared, budget, source, some, count, whole)
            accuracies["pruned"] = _accuracy(prepared, source)
            accuracies |= _repaired(prepared, source, some)
        say(str(pruned))
        compact = convert(prepared)
        if quantize and source is not None:
            compact = to_int8(compact, calibration(source))
            accuracies["quantised"] = _accuracy(compact, source)
        _give(own, path, subject, compact, pruned, accuracies)


def _opened(
    model: str,
    source: Source | None,
    *,
    classes: int | None,
    channels: int | None,
    image_size: int | None,
    pretrained: bool,
    weights: Path | None,
) -> tuple[subjects.Subject, Source | None]:
    """The dense network, and the images of `source` as it reads them.

    Raises:
        RecipeError: there is no such network, or it does not fit the images.
    """
    asked = channels
    if source is not None:
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
    if source is not None:
        if source.channels != subject.architecture.channels:
            source = source.coloured()
        check(subject.dense, subject.images(2), source.classes)
    return subject, source


def _give(
    own: Session,
    path: Path,
    subject: subjects.Subject,
    compact: nn.Module,
    pruned: PruneReport,
    accuracies: dict[str, float],
) -> None:
    """Write the file at `path`, and give the report."""
    write(compact, path, subject)
    found = report(compact)
    lines = [f"test accuracy, {name}: {share:.2%}" for name, share in accuracies.items()]
    text = "\n".join([str(found), *lines, written(path, found)])
    plain: dict[str, Any] = {"file": str(path), "pruned": to_json(pruned)}
    own.give(text, {**plain, "accuracy": accuracies, "report": found.to_dict()})


def _usual_file(model: str) -> Path:
    return Path(f"{model.replace('/', '-').replace(':', '-')}-pruned.safetensors")


def _budget(
    macs: float | None,
    params: float | None,
    latency: float | None,
    engine: str | None,
    precision: str | None,
) -> Budget:
    if sum(part is not None for part in (macs, params, latency)) != 1:
        raise BudgetError(
            "say how much may remain, by one of --keep-macs, --keep-params and --keep-latency"
        )
    given: dict[str, Any] = {"engine": engine, "precision": precision}
    where = {name: value for name, value in given.items() if value is not None}
    return Budget(macs=macs, params=params, latency=latency, **where)


def _by_weights(prepared: nn.Module, budget: Budget, whole: bool) -> PruneReport:
    """Prune by the weights alone, whole channels or inputs of groups."""
    if whole:
        return prune_channels(prepared, budget)
    return prune_to(prepared, budget, drop_filters=False)


def _by_gradients(
    prepared: nn.Module,
    budget: Budget,
    source: Source,
    numbers: Tensor,
    passes: int,
    whole: bool,
) -> PruneReport:
    """By the gradients of the images `numbers`, without a step of any optimizer.

    Without any `passes`, by the weights.
    """
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
    turns = list(itertools.islice(itertools.cycle(in_batches(numbers, options.SAMPLE)), passes))
    prepared.train()
    for x, y in tqdm(source.batches("train", turns), "pruning", passes, disable=None, leave=False):
        prepared.zero_grad()
        classification_loss(prepared(x), y).backward()  # type: ignore[no-untyped-call]
        pruning.step()
    prepared.zero_grad()
    prepared.eval()
    assert pruning.report is not None  # the last pruning is due at the last step
    return pruning.report


def _repaired(prepared: nn.Module, source: Source, numbers: Tensor) -> dict[str, float]:
    """Fit layers to what they gave before, on the images `numbers`; the accuracies afterwards.

    Batch norms are recalibrated only where there are layers that cannot be fitted.
    """
    some = in_batches(numbers[: options.IMAGES], BATCH)  # they stay in memory
    say("fitting layers to what they gave before")
    done = compensate(prepared, source.batches("train", some))
    accuracies = {"compensated": _accuracy(prepared, source)}
    if done.left_alone:
        say("\n".join(f"{name} stays: {why}" for name, why in done.left_alone.items()))
        recalibrate(prepared, source.batches("train", in_batches(numbers, BATCH)))
        accuracies["recalibrated"] = _accuracy(prepared, source)
    return accuracies


def _accuracy(model: Any, source: Source) -> float:
    numbers = source.numbers["test"]
    return right_answers(model, source.batches("test", torch.split(numbers, 256))) / len(numbers)
