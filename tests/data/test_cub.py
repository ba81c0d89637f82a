"""CUB-200-2011 from a small official folder, from its archive and from class folders."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metacv.data import cub
from metacv.data.bank import SPLITS, ImageBank
from metacv.data.cub import CUB
from metacv.data.sources import split_classes
from metacv.errors import UserError

CLASSES = {"train": ["003.Wren", "001.Auk"], "val": ["002.Bee_Eater"], "test": ["004.Owl"]}
NAMES = sorted(name for names in CLASSES.values() for name in names)
BOX = (10, 4, 12, 8)  # left, top, width and height of the bird in each image


@pytest.fixture(autouse=True)
def _few_classes(monkeypatch):
    monkeypatch.setattr(cub, "CLASSES", CLASSES)
    monkeypatch.setattr(cub, "IMAGES", 2 * len(NAMES))


def pixels(name: str, image: int) -> np.ndarray:
    """24 high, 40 wide: red is the class, green the image, and the bird is white in blue."""
    values = np.zeros((24, 40, 3), np.uint8)
    values[..., 0], values[..., 1] = 10 * int(name[:3]), image
    left, top, width, height = BOX
    values[top : top + height, left : left + width, 2] = 255
    return values


def write_image(path: Path, name: str, image: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(name, image)).save(path)


def write_official(root: Path) -> Path:
    places = [(name, f"{name}/{name[4:]}_{image}.png") for name in NAMES for image in range(2)]
    for row, (name, place) in enumerate(places):
        write_image(root / "images" / place, name, row % 2)
    tables = {
        "images.txt": [place for _, place in places],
        "image_class_labels.txt": [int(name[:3]) for name, _ in places],
        "bounding_boxes.txt": [" ".join(f"{value:.1f}" for value in BOX)] * len(places),
    }
    for name, values in tables.items():
        (root / name).write_text("".join(f"{i} {value}\n" for i, value in enumerate(values, 1)))
    return root


def write_tar(root: Path) -> None:
    write_official(root.parent / "loose" / "CUB_200_2011")
    (root.parent / "loose" / "attributes.txt").write_text("1 bill\n")
    with tarfile.open(root.parent / "CUB_200_2011.tgz", "w:gz") as archive:
        archive.add(root.parent / "loose", ".")
    shutil.rmtree(root.parent / "loose")


def write_folders(root: Path) -> None:
    for split, names in CLASSES.items():
        for name in names:
            for image in range(2):
                write_image(root / split / name / f"{image}.png", name, image)


FORMS = {
    "official": write_official,
    "official below": lambda root: write_official(root / "CUB_200_2011"),
    "archive": write_tar,
    "folders": write_folders,
}


def load(data_dir: Path, split: str = "train", size: int = 24, crop: bool = False) -> ImageBank:
    return CUB(data_dir, size, crop).load(split)


def error_of(data_dir: Path, split: str = "train", **settings) -> str:
    with pytest.raises(UserError) as caught:
        load(data_dir, split, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_middle_squares_sorted_by_class(tmp_path, form):
    FORMS[form](tmp_path / "cub")
    for split in SPLITS:
        bank = load(tmp_path, split)
        assert bank.name == f"cub {split}"
        assert bank.class_names == tuple(sorted(CLASSES[split]))
        assert bank.sizes.unique().tolist() == [2]
        expected = np.stack([pixels(name, image)[:, 8:32] for name in sorted(CLASSES[split]) for image in range(2)])
        assert np.array_equal(bank.images.permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize("form", ["official", "archive"])
def test_crop_takes_the_bounding_box_first(tmp_path, form):
    FORMS[form](tmp_path / "cub")
    images = load(tmp_path, size=8, crop=True).images
    assert (images[:, 2] == 255).all()
    assert images[:, 0, 0, 0].tolist() == [10, 10, 30, 30]
    assert not (load(tmp_path, size=8).images[:, 2] == 255).all()


def test_the_real_data_set_has_100_50_and_50_classes(monkeypatch):
    monkeypatch.undo()
    classes = split_classes("cub")
    assert classes == cub.CLASSES
    assert [len(classes[split]) for split in SPLITS] == [100, 50, 50]
    assert sorted(name[:3] for names in classes.values() for name in names) == [f"{c:03}" for c in range(1, 201)]


def test_any_image_file_is_prepared_like_the_data_sets_own(tmp_path):
    root = write_official(tmp_path / "cub")
    dataset = CUB(tmp_path, 10, False)
    bank = dataset.load("train")
    assert torch.equal(dataset.read(root / "images" / "001.Auk" / "Auk_1.png"), bank.images[1])
    assert torch.equal(CUB(tmp_path, 10, True).read(root / "images" / "001.Auk" / "Auk_1.png"), bank.images[1])


def test_the_cache_is_one_for_each_setting_and_suffices_without_the_files(tmp_path):
    root = write_official(tmp_path / "cub")
    settings = [{"size": 24}, {"size": 8}, {"size": 8, "crop": True}]
    first = [load(tmp_path, **each).fingerprint for each in settings]
    shutil.rmtree(root)
    assert [load(tmp_path, **each).fingerprint for each in settings] == first
    assert len({*first}) == 3


def test_missing_data_are_reported_with_what_to_put_where(tmp_path):
    message = error_of(tmp_path)
    assert f"data_dir={tmp_path}: the train split of CUB-200-2011 is missing (put CUB_200_2011.tgz of" in message
    assert f"Put into {tmp_path / 'cub'} one of" in message


def test_an_official_folder_without_its_list_is_reported(tmp_path):
    (write_official(tmp_path / "cub") / "images.txt").unlink()
    assert f"Found: {tmp_path / 'cub'} without images.txt" in error_of(tmp_path, crop=True)


def test_crop_needs_the_official_folder(tmp_path):
    write_folders(tmp_path / "cub")
    message = error_of(tmp_path, crop=True)
    assert message.startswith(f"dataset.crop=true: {tmp_path / 'cub'} has no images.txt and no bounding_boxes.txt;")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: (root / "bounding_boxes.txt").unlink(), "bounding_boxes.txt cannot be read (["),
        (lambda root: (root / "image_class_labels.txt").unlink(), "image_class_labels.txt cannot be read (["),
        (lambda root: (root / "images.txt").write_bytes(b"\xff\xfe"), "images.txt cannot be read ('utf-8'"),
        (lambda root: edit(root / "images.txt", "8 004.Owl/Owl_1.png\n", ""), "have a line NUMBER CLASS/FILE"),
        (lambda root: edit(root / "image_class_labels.txt", "2 1\n", "2\n"), "have a line NUMBER CLASS for"),
        (lambda root: edit(root / "bounding_boxes.txt", "1 10.0", "9 10.0"), "HEIGHT for each of the images 1 to 8"),
        (lambda root: edit(root / "image_class_labels.txt", "2 1\n", "2 2\n"), "Auk_1.png, but has the class 2"),
        (lambda root: edit(root / "bounding_boxes.txt", "1 10.0", "1 70.0"), "box 70.0 4.0 12.0 8.0 of "),
        (lambda root: edit(root / "bounding_boxes.txt", "1 10.0", "1 nan"), "box nan 4.0 12.0 8.0 of "),
        (lambda root: edit(root / "bounding_boxes.txt", "1 10.0", "1 x"), "Auk_0.png is not in the image"),
        (lambda root: (root / "images/001.Auk/Auk_0.png").unlink(), "001.Auk/Auk_0.png is not a readable image ("),
        (lambda root: (root / "images/001.Auk/Auk_0.png").write_bytes(b"\x89PNG"), "Auk_0.png is not a readable image"),
        (lambda root: edit(root / "images.txt", "003.Wren", "003.Robin"), "003.Wren of the train split has 0"),
    ],
)  # fmt: skip
def test_a_damaged_official_folder_is_reported_in_one_line(tmp_path, damage, words):
    damage(root := write_official(tmp_path / "CUB_200_2011"))
    message = error_of(tmp_path, crop=True)
    assert words in message
    assert str(root) in message


def test_a_missing_class_folder_is_named(tmp_path):
    write_folders(tmp_path / "cub")
    shutil.rmtree(tmp_path / "cub" / "train" / "003.Wren")
    assert "the train split lacks 1 of 2 classes: 003.Wren" in error_of(tmp_path)


def test_a_wrong_archive_is_named(tmp_path):
    (tmp_path / "CUB_200_2011.tgz").write_bytes(b"<html>not found</html>")
    assert error_of(tmp_path).startswith(f"{tmp_path / 'CUB_200_2011.tgz'} cannot be unpacked (")
