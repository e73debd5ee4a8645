"""Data sets: the embedded one, IDX files good and bad, and what Debian installs."""

import gzip
import hashlib
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

import dspfx
from dspfx.recipe.images.datasets import DEBIAN_FASHION_MNIST, augment, batches, load, read_idx


def test_digits() -> None:
    data = load("digits")
    assert data.train_x.shape == (1437, 1, 16, 16)
    assert data.test_x.shape == (360, 1, 16, 16)
    assert data.classes == 10
    assert set(data.train_y.tolist()) == set(range(10))
    assert abs(float(data.train_x.mean())) < 1e-5
    assert torch.equal(load("digits").train_x, data.train_x)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(dspfx.DataError, match=r"pip install dspfx\[demo\]"):
        load("digits")


def test_fashion_mnist() -> None:
    if not DEBIAN_FASHION_MNIST.is_dir():
        assert os.environ.get("DSPFX_TEST_DATA") != "required", "dataset-fashion-mnist is missing"
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    data = load("fashion-mnist")
    assert data.train_x.shape == (60_000, 1, 28, 28)
    assert data.test_x.shape == (10_000, 1, 28, 28)
    assert data.test_y.bincount().tolist() == [1000] * 10
    assert (data.shift, data.flip) == (2, True)


def write_idx(path: Path, array: torch.Tensor, keep: int | None = None) -> None:
    header = b"\0\0\x08" + bytes([array.dim()]) + struct.pack(f">{array.dim()}I", *array.shape)
    raw = (header + bytes(array.flatten().tolist()))[:keep]
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_folder_of_idx_files(tmp_path: Path, suffix: str) -> None:
    for part, count in (("train", 6), ("t10k", 4)):
        images = torch.randint(256, (count, 5, 5), dtype=torch.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", torch.arange(count).byte())
    data = load("fashion-mnist", tmp_path)
    assert data.train_x.shape == (6, 1, 5, 5)
    assert data.test_y.tolist() == [0, 1, 2, 3]
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", torch.arange(3).byte())
    with pytest.raises(dspfx.DataError, match="do not belong together"):
        load("fashion-mnist", tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 4, 10, 30])
def test_truncated_files(tmp_path: Path, keep: int) -> None:
    write_idx(tmp_path / "a", torch.zeros(4, 5, dtype=torch.uint8), keep)
    with pytest.raises(dspfx.DataError, match="fetch it again"):
        read_idx(tmp_path / "a")
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"x" * 99)[:keep])
    with pytest.raises(dspfx.DataError, match="fetch it again"):
        read_idx(tmp_path / "b.gz")


def test_a_folder_of_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()

    def write(name: str, content: object) -> tuple[str, str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    def images(count: int) -> dict[str, object]:
        pixels = np.arange(count * 3072).reshape(count, 3072) % 251
        return {"data": pixels.astype(np.uint8), "labels": list(range(count))}

    parts = [write(f"data_batch_{i}", images(4)) for i in (1, 2)]
    names, digest = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", parts)
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", images(3))])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "filename": names, "md5": digest})
    data = load("cifar10", tmp_path)
    assert data.train_x.shape == (8, 3, 32, 32)
    assert data.train_y.tolist() == [0, 1, 2, 3] * 2
    assert data.test_x.shape == (3, 3, 32, 32)
    assert (data.shift, data.flip) == (4, True)
    (folder / "test_batch").write_bytes(b"damaged")
    with pytest.raises(dspfx.DataError, match="cannot be had"):
        load("cifar10", tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(dspfx.DataError, match="choose from digits, fashion-mnist, cifar10"):
        load("imagenet")
    for name in ("fashion-mnist", "cifar10"):
        with pytest.raises(dspfx.DataError):
            load(name, tmp_path)
    with pytest.raises(dspfx.DataError, match="leave the folder out"):
        load("digits", tmp_path)


def test_batches_and_augmentation() -> None:
    x, y = torch.arange(10.0).reshape(10, 1, 1, 1).expand(10, 2, 6, 6), torch.arange(10)
    generator = torch.Generator().manual_seed(0)
    drawn = list(batches(x, y, 4, generator))
    assert [len(b) for _, b in drawn] == [4, 4, 2]
    assert sorted(torch.cat([b for _, b in drawn]).tolist()) == list(range(10))
    assert all(torch.equal(a[:, 0, 0, 0].long(), b) for a, b in drawn)
    image = torch.randn(50, 3, 6, 6)
    assert augment(image, generator) is image
    moved = augment(image, generator, shift=2, flip=True)
    assert moved.shape == image.shape
    assert not torch.equal(moved, image)
    mirrored = augment(image, generator, flip=True)
    for before, after in zip(image, mirrored, strict=True):
        assert torch.equal(after, before) or torch.equal(after, before.flip(2))
