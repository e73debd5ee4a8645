"""The demo's image classification data, as tensors in memory.

Nothing is downloaded for `digits`. The others are read from a folder, and fetched by torchvision
only where no folder was named and none is installed.
"""

import gzip
import importlib
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dspfx.errors import DataError

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DIGITS_TEST_IMAGES = 360


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels, split into training and test.

    Attributes:
        name: what `load` was asked for.
        classes: labels are 0 ... classes - 1.
        train_x, test_x: float32 `[N, C, H, W]`, zero mean and unit variance over the training
            images, channel by channel.
        train_y, test_y: int64 `[N]`.
        shift: training images may be moved by up to so many pixels.
        flip: training images may be mirrored left to right.
    """

    name: str
    classes: int
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    shift: int = 0
    flip: bool = False

    def first(self, images: int | None) -> "Dataset":
        """The data set with the first `images` of the training images only, or with all of them."""
        return replace(self, train_x=self.train_x[:images], train_y=self.train_y[:images])


def load(name: str, folder: Path | None = None) -> Dataset:
    """Load a data set by name.

    Args:
        name: `digits` (scikit-learn's, 8x8 images doubled to 16x16), `fashion-mnist` (IDX files,
            plain or .gz) or `cifar10` (torchvision's layout).
        folder: where the files are. By default Debian's package dataset-fashion-mnist where it
            is installed, else the user's cache, into which torchvision downloads what is missing.

    Raises:
        DataError: an unknown name, missing or damaged files, a failed download.
    """
    if name not in LOADERS:
        raise DataError(f"there is no data set '{name}'; choose from {', '.join(LOADERS)}")
    return LOADERS[name](folder)


def batches(
    x: Tensor, y: Tensor, size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of at most `size` samples, in order or, given a `generator`, shuffled by it."""
    order = (
        torch.arange(len(x)) if generator is None else torch.randperm(len(x), generator=generator)
    )
    for chosen in torch.split(order, size):
        yield x[chosen], y[chosen]


def augment(x: Tensor, generator: torch.Generator, *, shift: int = 0, flip: bool = False) -> Tensor:
    """Move every image of `[N, C, H, W]` by up to `shift` pixels and mirror about half, at random.

    What moves in from outside is zero, the mean of normalised images. Returns a new tensor of the
    same shape, or `x` itself where there is nothing to do.
    """
    if flip:
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    if shift:
        count, _, height, width = x.shape
        top, left = torch.randint(2 * shift + 1, (2, count, 1), generator=generator)
        rows = (top + torch.arange(height))[:, :, None]  # [N, H, 1]
        columns = (left + torch.arange(width))[:, None, :]  # [N, 1, W]
        image = torch.arange(count)[:, None, None]
        padded = F.pad(x, [shift] * 4).permute(0, 2, 3, 1)  # [N, H + 2 shift, W + 2 shift, C]
        x = padded[image, rows, columns].permute(0, 3, 1, 2).contiguous()
    return x


def read_idx(path: Path) -> Tensor:
    """The uint8 array in an IDX file (http://yann.lecun.com/exdb/mnist), plain or gzipped.

    Raises:
        DataError: the file cannot be read, is not IDX, or has another length than its header says.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read, fetch it again: {error}") from error
    # two zeros, 8 for unsigned bytes, the number of dimensions; then the dimensions, big-endian
    start = 4 + 4 * raw[3] if len(raw) > 3 else 4
    if raw[:3] != b"\0\0\x08" or len(raw) <= start:
        raise DataError(f"{path} is not an IDX file of bytes, fetch it again")
    shape = struct.unpack(f">{raw[3]}I", raw[4:start])
    if math.prod(shape) != len(raw) - start:
        raise DataError(
            f"{path} is damaged, fetch it again: its header says {math.prod(shape)} bytes, "
            f"{len(raw) - start} are there"
        )
    return torch.frombuffer(bytearray(raw[start:]), dtype=torch.uint8).reshape(shape)


def _digits(folder: Path | None) -> Dataset:
    if folder is not None:
        raise DataError("digits come with scikit-learn, not from a folder; leave the folder out")
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ModuleNotFoundError as error:
        raise DataError("the digits need scikit-learn: pip install dspfx[demo]") from error
    bunch = datasets.load_digits()
    x = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None]
    # 8x8 pixels would be 2x2 in the last stage of a ResNet
    x = F.interpolate(x, scale_factor=2, mode="nearest")
    y = torch.as_tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[DIGITS_TEST_IMAGES:], order[:DIGITS_TEST_IMAGES]
    return _normalised("digits", (x[train], y[train]), (x[test], y[test]))


def _fashion_mnist(folder: Path | None) -> Dataset:
    if folder is None:
        folder = (
            DEBIAN_FASHION_MNIST if DEBIAN_FASHION_MNIST.is_dir() else _downloaded_fashion_mnist()
        )
    train = _labelled_idx(folder, "train")
    test = _labelled_idx(folder, "t10k")
    return replace(_normalised("fashion-mnist", train, test), shift=2, flip=True)


def _downloaded_fashion_mnist() -> Path:
    from torchvision.datasets import FashionMNIST  # noqa: PLC0415 (slow to import)

    with _torchvision_errors("fashion-mnist", _cache()):
        return Path(FashionMNIST(_cache(), download=True).raw_folder)


def _labelled_idx(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images `[N, 1, H, W]` and labels `[N]` of one part, `train` or `t10k`."""
    images = read_idx(_idx_file(folder, f"{part}-images-idx3-ubyte"))
    labels = read_idx(_idx_file(folder, f"{part}-labels-idx1-ubyte"))
    if images.dim() != 3 or labels.shape != images.shape[:1] or int(labels.max()) > 9:
        raise DataError(
            f"the {part} files in {folder} do not belong together: images {tuple(images.shape)}, "
            f"labels {tuple(labels.shape)} up to {int(labels.max())}; fetch them again"
        )
    return images[:, None].float(), labels.long()


def _idx_file(folder: Path, name: str) -> Path:
    """The file in `folder`, or where torchvision puts it, as it is or gzipped."""
    candidates = [
        place / f"{name}{suffix}"
        for place in (folder, folder / "FashionMNIST" / "raw")
        for suffix in ("", ".gz")
    ]
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(f"{name} is missing in {folder}, with or without .gz")


def _cifar10(folder: Path | None) -> Dataset:
    from torchvision.datasets import CIFAR10  # noqa: PLC0415 (slow to import)

    root = _cache() if folder is None else folder
    with _torchvision_errors("cifar10", root):
        parts = [CIFAR10(root, train=train, download=folder is None) for train in (True, False)]
    train, test = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).float(), torch.tensor(part.targets))
        for part in parts
    )
    return replace(_normalised("cifar10", train, test), shift=4, flip=True)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspfx"


@contextmanager
def _torchvision_errors(name: str, folder: Path) -> Iterator[None]:
    """Raise `DataError` where torchvision cannot find, verify or download a data set."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{name} cannot be had in {folder}: {reason}") from error


def _normalised(name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Dataset:
    """A data set of ten classes whose images are brought to zero mean and unit variance."""
    (train_x, train_y), (test_x, test_y) = train, test
    deviation, mean = torch.std_mean(train_x, (0, 2, 3), keepdim=True)
    return Dataset(
        name, 10, (train_x - mean) / deviation, train_y, (test_x - mean) / deviation, test_y
    )


LOADERS: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": _digits,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
}
