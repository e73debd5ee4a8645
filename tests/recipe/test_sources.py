"""What a recipe learns from: parts kept apart, batches that depend on their place alone."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.utils import save_image

import dspfx
from dspfx.recipe import Recipe, Schedule
from dspfx.recipe.images.seeds import generator_of, seed_of
from dspfx.recipe.images.sources import in_batches, open_source

DIGITS = Recipe(images=200, validation=0.25)


def folder_of_images(root: Path, parts: tuple[str, ...] = ("train", "val")) -> Path:
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        for name in ("cats", "dogs"):
            (root / part / name).mkdir(parents=True)
            for number in range(6):
                image = torch.rand(3, 20, 24, generator=generator)
                save_image(image, root / part / name / f"{number}.png")
    return root


def test_validation_images_are_training_images_that_are_left_out() -> None:
    source = open_source(DIGITS)
    train, validation = (set(source.numbers[p].tolist()) for p in ("train", "validation"))
    assert (len(train), len(validation), len(source.numbers["test"])) == (150, 50, 360)
    assert not train & validation
    assert max(train | validation) < len(source.dataset.train_y)
    again = open_source(DIGITS)
    assert all(torch.equal(numbers, again.numbers[p]) for p, numbers in source.numbers.items())
    other = open_source(dataclasses.replace(DIGITS, seed=1))
    assert set(other.numbers["validation"].tolist()) != validation
    none = open_source(dataclasses.replace(DIGITS, validation=0.0))
    assert len(none.numbers["validation"]) == 0


def test_batches_hold_what_was_chosen() -> None:
    source = open_source(DIGITS)
    chosen = in_batches(source.numbers["validation"], 20)
    found = list(source.batches("validation", chosen))
    assert [len(y) for _, y in found] == [20, 20, 10]
    data = source.dataset
    assert torch.equal(found[1][0], data.train_x[chosen[1]])
    assert torch.equal(found[1][1], data.train_y[chosen[1]])
    ((x, _),) = source.batches("test", [torch.tensor([3])])
    assert torch.equal(x, data.test_x[3:4])


def test_no_batch_of_a_single_image() -> None:
    assert [len(b) for b in in_batches(torch.arange(9), 4)] == [4, 4]
    assert [len(b) for b in in_batches(torch.arange(1), 4)] == [1]


def test_a_batch_is_augmented_by_its_own_seed() -> None:
    source = open_source(DIGITS)
    source.dataset = dataclasses.replace(source.dataset, shift=2, flip=True)
    chosen = in_batches(source.numbers["train"], 30)[:3]
    whole = [x for x, _ in source.batches("train", chosen, [1, 2, 3])]
    late = [x for x, _ in source.batches("train", chosen[2:], [3])]
    assert torch.equal(whole[2], late[0])
    assert not torch.equal(whole[2], next(source.batches("train", chosen[2:], [4]))[0])


def test_seeds_of_places() -> None:
    assert seed_of(0, "dense", 1) == seed_of(0, "dense", 1)
    assert len({seed_of(0, "dense", 1), seed_of(0, "dense", 2), seed_of(0, "learn", 1)}) == 3
    assert 0 <= seed_of(7) < 2**63
    draws = [torch.rand((), generator=generator_of(5, 6)) for _ in range(2)]
    assert draws[0] == draws[1]


def test_other_sizes_and_colours() -> None:
    source = open_source(dataclasses.replace(DIGITS, image_size=24)).coloured()
    assert (source.channels, source.image_size) == (3, 24)
    ((x, _),) = source.batches("test", [torch.arange(2)])
    assert x.shape == (2, 3, 24, 24)
    assert torch.equal(x[:, 0], x[:, 2])
    with pytest.raises(dspfx.RecipeError, match="images of 3 channels"):
        source.coloured()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_images(tmp_path: Path, workers: int) -> None:
    root = folder_of_images(tmp_path)
    source = open_source(Recipe(data=str(root), image_size=16, validation=0.25), workers=workers)
    assert [len(numbers) for numbers in source.numbers.values()] == [9, 3, 12]
    assert (source.classes, source.channels) == (2, 3)
    state = torch.get_rng_state()
    chosen = list(source.numbers["train"].split(4))
    whole = list(source.batches("train", chosen, [1, 2, 3]))
    assert [tuple(x.shape) for x, _ in whole] == [(4, 3, 16, 16), (4, 3, 16, 16), (1, 3, 16, 16)]
    late = list(source.batches("train", chosen[1:], [2, 3]))
    assert torch.equal(whole[1][0], late[0][0])
    assert torch.equal(whole[1][1], late[0][1])
    other = next(source.batches("train", chosen[1:], [7, 8]))
    assert not torch.equal(whole[1][0], other[0])
    assert [int(y) for _, labels in source.batches("test", [torch.arange(12)]) for y in labels] == (
        [0] * 6 + [1] * 6
    )
    assert torch.equal(torch.get_rng_state(), state)  # or runs would depend on who reads files


def test_images_are_normalised_for_the_network(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path)
    usual, symmetric = (
        next(open_source(Recipe(name, str(root), image_size=16)).batches("test", [torch.arange(4)]))
        for name in ("resnet18", "timm/tf_mobilenetv3_small_minimal_100")
    )
    mean, deviation = (
        torch.tensor(values)[:, None, None]
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    brightness = (usual[0] * deviation + mean).mean()
    assert torch.isclose((symmetric[0] * 0.5 + 0.5).mean(), brightness, atol=0.02)
    assert not torch.isclose(symmetric[0].mean(), usual[0].mean(), atol=0.02)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(dspfx.DataError, match="no data set and no folder"):
        open_source(Recipe(data=str(tmp_path / "missing")))
    with pytest.raises(dspfx.DataError, match="no folders train and val"):
        open_source(Recipe(data=str(tmp_path)))
    root = folder_of_images(tmp_path, ("train", "test"))
    (root / "test" / "birds").mkdir()
    with pytest.raises(dspfx.DataError, match="no images in folders"):
        open_source(Recipe(data=str(root)))
    save_image(torch.rand(3, 8, 8), root / "test" / "birds" / "1.png")
    with pytest.raises(dspfx.DataError, match=r"the classes in .* differ"):
        open_source(Recipe(data=str(root)))


def bomb(path: Path) -> None:
    """An image of more pixels than anybody has."""
    Image.new("1", (20_000, 20_000)).save(path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(b"no image"), "cannot identify"),
        (lambda path: path.write_bytes(path.read_bytes()[:-600]), "truncated|Truncated"),
        (lambda path: Image.new("I;16", (8, 8)).save(path), "more than 8 bits"),
        (bomb, "decompression bomb"),
    ],
)
def test_a_damaged_image_is_named(
    workers: int, damage: Callable[[Path], Any], words: str, tmp_path: Path
) -> None:
    root = folder_of_images(tmp_path)
    damage(root / "train" / "cats" / "3.png")
    source = open_source(Recipe(data=str(root), image_size=16), workers=workers)
    with pytest.raises(dspfx.DataError, match=rf"read: /.*cats/3.png: .*({words})") as caught:
        list(source.batches("train", [torch.arange(12)]))
    assert "\n" not in str(caught.value)


def test_a_test_folder_without_labels_is_passed_over(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path)
    (root / "test").mkdir()
    save_image(torch.rand(3, 8, 8), root / "test" / "1.png")
    assert len(open_source(Recipe(data=str(root))).numbers["test"]) == 12


def test_one_class_is_too_few(tmp_path: Path) -> None:
    root = folder_of_images(tmp_path)
    for part in ("train", "val"):
        shutil.rmtree(root / part / "dogs")
    with pytest.raises(dspfx.DataError, match="nothing to tell apart"):
        open_source(Recipe(data=str(root)))


def test_too_few_images() -> None:
    with pytest.raises(dspfx.DataError, match="too few"):
        open_source(Recipe(images=1))


def test_rates_of_a_schedule() -> None:
    schedule = Schedule(2, 0.1, warm_up=0.25)
    rates = [schedule.rate(step, 8) for step in range(8)]
    assert rates[:3] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert Schedule(1, 0.1).rate(0, 10) == 0.1
