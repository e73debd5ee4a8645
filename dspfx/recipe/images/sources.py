"""Where a run's images come from: tensors in memory, or a folder of image files.

Validation images are taken from the training images, at random by the run's seed; the test images
are what the data set calls so, and choose nothing.
"""

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dspfx.errors import DataError, RecipeError
from dspfx.recipe.images.datasets import LOADERS, Dataset, augment, load
from dspfx.recipe.images.seeds import generator_of, seed_of
from dspfx.recipe.networks.libraries import Preprocessing, preprocessing_of
from dspfx.recipe.settings import Recipe

Split = Literal["train", "validation", "test"]
Batch = tuple[Tensor, Tensor]

TEST_FOLDERS = ("test", "val", "validation", "valid")
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # modes of images that 8 bits do not hold


class Source(ABC):
    """Images and labels in three splits.

    Attributes:
        classes: labels are 0 ... classes - 1.
        channels: of the images.
        image_size: their height and width, where they are square.
        numbers: of every split the numbers of its images, int64.
    """

    classes: int
    channels: int
    image_size: int
    numbers: dict[Split, Tensor]

    @abstractmethod
    def batches(
        self, split: Split, chosen: Sequence[Tensor], seeds: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """The images with the numbers `chosen`, batch by batch, float32 `[N, C, H, W]`.

        They are augmented, each batch by its own seed, where there are `seeds`.

        Raises:
            DataError: a file cannot be read.
        """

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of the images' names and labels, to find out whether they have changed."""

    @abstractmethod
    def describe(self) -> str:
        """What and how many, in a line."""

    def coloured(self) -> "Source":
        """The same images for a network that reads three channels, grey ones three times.

        Raises:
            RecipeError: they are not grey.
        """
        raise RecipeError(f"the model does not read images of {self.channels} channels")

    def _counts(self, available: int) -> str:
        """How many images each split has, and how many of those `available` train nothing."""
        train, validation, test = (len(numbers) for numbers in self.numbers.values())
        unused = available - train - validation
        more = f"; {unused:,} more training images are not used, see --images" if unused else ""
        return (
            f"{train:,} training, {validation:,} validation and {test:,} test images of "
            f"{self.channels}x{self.image_size}x{self.image_size}, {self.classes} classes{more}"
        )


def open_source(recipe: Recipe, *, workers: int = 0) -> Source:
    """The images that `recipe` names.

    Raises:
        DataError: they are missing, damaged, or too few.
    """
    folder = None if recipe.folder is None else Path(recipe.folder)
    if recipe.data in LOADERS:
        return InMemory(load(recipe.data, folder), recipe)
    if folder is not None:
        raise DataError(f"{recipe.data} is a folder of its own: leave out --folder")
    if not Path(recipe.data).is_dir():
        raise DataError(
            f"there is no data set and no folder '{recipe.data}'; choose from "
            f"{', '.join(LOADERS)}, or name a folder with the folders train and val in it"
        )
    return ImageFiles(Path(recipe.data), recipe, workers)


def in_batches(numbers: Tensor, size: int) -> list[Tensor]:
    """`numbers` in batches; without a last one of a single image, of which there is no variance."""
    batches = list(torch.split(numbers, size))
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches


class InMemory(Source):
    """A data set of `datasets`."""

    def __init__(self, dataset: Dataset, recipe: Recipe) -> None:
        self.dataset, self.recipe = dataset, recipe
        self.classes = dataset.classes
        _, self.channels, height, _ = dataset.train_x.shape
        self.resized = recipe.image_size is not None and recipe.image_size != height
        self.image_size = recipe.image_size or height
        self.numbers = _splits(len(dataset.train_y), len(dataset.test_y), recipe)

    def batches(
        self, split: Split, chosen: Sequence[Tensor], seeds: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """See `Source.batches`."""
        data = self.dataset
        x, y = (data.test_x, data.test_y) if split == "test" else (data.train_x, data.train_y)
        for count, numbers in enumerate(chosen):
            images = x[numbers]
            if seeds is not None:
                generator = torch.Generator().manual_seed(seeds[count])
                images = augment(images, generator, shift=data.shift, flip=data.flip)
            if self.resized:
                size = (self.image_size, self.image_size)
                images = F.interpolate(images, size, mode="bilinear", antialias=True)
            yield images, y[numbers]

    def coloured(self) -> "InMemory":
        """See `Source.coloured`."""
        if self.channels != 1:
            super().coloured()
        train_x, test_x = (
            x.expand(-1, 3, -1, -1) for x in (self.dataset.train_x, self.dataset.test_x)
        )
        return InMemory(replace(self.dataset, train_x=train_x, test_x=test_x), self.recipe)

    @property
    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return _digest([self.dataset.train_y.tolist(), self.dataset.test_y.tolist()])

    def describe(self) -> str:
        """See `Source.describe`."""
        return f"{self.dataset.name}: {self._counts(len(self.dataset.train_y))}"


class ImageFiles(Source):
    """A folder with `train` and `val` (or `test`), in which there is a folder for every class.

    Training images are cut out at random (`RandomResizedCrop`) and mirrored at random; size,
    interpolation and normalisation are those that the network is made for, see `Preprocessing`.
    """

    def __init__(self, root: Path, recipe: Recipe, workers: int) -> None:
        self.root, self.workers = root, workers
        usual = preprocessing_of(recipe.model)
        self.preprocessing = usual.at(recipe.image_size or usual.size)
        self.channels, self.image_size = 3, self.preprocessing.size
        found = [name for name in TEST_FOLDERS if (root / name).is_dir()]
        labelled = [name for name in found if any(p.is_dir() for p in (root / name).iterdir())]
        test = next(iter([*labelled, *found]), None)
        if not (root / "train").is_dir() or test is None:
            raise DataError(
                f"{root} has no folders train and val, in which there is one for every class"
            )
        self.files = {"train": _files(root / "train"), "test": _files(root / test)}
        self.classes = len(self.files["train"].classes)
        if self.files["test"].classes != self.files["train"].classes:
            raise DataError(f"the classes in {root / 'train'} and {root / test} differ")
        if self.classes < 2:
            raise DataError(f"there is one class in {root / 'train'}, and nothing to tell apart")
        train_files, test_files = (len(self.files[name].samples) for name in ("train", "test"))
        self.numbers = _splits(train_files, test_files, recipe)

    def batches(
        self, split: Split, chosen: Sequence[Tensor], seeds: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """See `Source.batches`."""
        files = self.files["test" if split == "test" else "train"].samples
        images = _Images(files, _transform(self.preprocessing, seeds is not None))
        wanted = [
            [(number, None if seeds is None else seed_of(seeds[count], number)) for number in batch]
            for count, batch in enumerate(numbers.tolist() for numbers in chosen)
        ]
        loader: Any = torch.utils.data.DataLoader(
            images,
            batch_sampler=wanted,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # or it would draw from the global one
        )
        try:
            yield from ((x, y) for x, y in loader)
        except OSError as error:
            (*_, what) = str(error).strip().splitlines()  # of a worker: after its traceback
            raise DataError(
                f"an image cannot be read: {what.removeprefix('OSError: ')}; repair or remove it"
            ) from error

    @property
    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        files = [sample for part in self.files.values() for sample in part.samples]
        return _digest([(str(Path(path).relative_to(self.root)), label) for path, label in files])

    def describe(self) -> str:
        """See `Source.describe`."""
        return f"{self.root}: {self._counts(len(self.files['train'].samples))}"


@dataclass(frozen=True)
class _Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Image files, read where they are asked for by their number and a seed."""

    files: list[tuple[str, int]]
    transform: Callable[[Any], Tensor]

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Tensor, int]:
        number, seed = key
        path, label = self.files[number]
        image = _read(path)
        if seed is None:
            return self.transform(image), label
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU alone
            return self.transform(image), label


def _read(path: str) -> Any:
    """The image at `path`, of 8 bits in three colours; an `OSError` names it."""
    from PIL import Image  # noqa: PLC0415 (torchvision's, slow to import)

    try:
        with Image.open(path) as image:
            if image.mode in DEEP:
                raise OSError("it has more than 8 bits a pixel, which is not supported")
            return image.convert("RGB")
    except Exception as error:  # what a damaged file leads to is not always an OSError
        raise OSError(f"{path}: {' '.join(str(error).split())}") from error


def _torchvision(module: str) -> Any:
    """Imported where it is needed: it takes longer than all else together."""
    return importlib.import_module(f"torchvision.{module}")


def _transform(by: Preprocessing, augmented: bool) -> Callable[[Any], Tensor]:
    transforms = _torchvision("transforms.v2")
    how = {"interpolation": transforms.InterpolationMode(by.interpolation), "antialias": True}
    shape = (
        [transforms.RandomResizedCrop(by.size, **how), transforms.RandomHorizontalFlip()]
        if augmented
        else [transforms.Resize(by.resized, **how), transforms.CenterCrop(by.size)]
    )
    composed: Callable[[Any], Tensor] = transforms.Compose(
        [
            *shape,
            transforms.ToImage(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(by.mean, by.deviation),
            transforms.ToPureTensor(),
        ]
    )
    return composed


def _files(folder: Path) -> Any:
    try:
        return _torchvision("datasets").ImageFolder(str(folder))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{folder} holds no images in folders, one a class: {error}") from error


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _splits(train: int, test: int, recipe: Recipe) -> dict[Split, Tensor]:
    """The numbers of the images in each split; validation images are training images left out."""
    order = torch.randperm(train, generator=generator_of(recipe.seed, "split"))[: recipe.images]
    held = round(len(order) * recipe.validation)
    if recipe.validation:
        held = max(held, 1)
    if held >= len(order) or not test:
        raise DataError(f"{len(order)} training and {test} test images are too few")
    return {"train": order[held:], "validation": order[:held], "test": torch.arange(test)}
