"""Your own images: folders of classes, and splits that are made at random, saved, and read again."""

import json
import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metacv.data.bank import SPLITS
from metacv.data.glyphs import Glyphs
from metacv.data.image_folder import ImageFolder
from metacv.errors import UserError

ALL_FOR_TRAINING = {"fractions": {"train": 1, "val": 0, "test": 0}}


def noise(seed: int, size=(28, 28)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def fill(folder: Path, classes: int, images: int = 1) -> Path:
    """Write folders `class 0`, `class 1`, ... of images."""
    for c in range(classes):
        (folder / f"class {c}").mkdir(parents=True)
        for i in range(images):
            noise(100 * c + i).save(folder / f"class {c}" / f"{i}.png")
    return folder


def dataset(root: Path, data_dir: Path, **changes) -> ImageFolder:
    settings = {"size": 28, "color": True, "fit": "crop", "invert": False, "split_seed": 0, "split_file": None}
    settings |= {"fractions": {"train": 0.6, "val": 0.2, "test": 0.2}} | changes
    return ImageFolder(data_dir, str(root), **settings)


def test_split_folders_are_used_and_classes_may_differ_in_size(tmp_path):
    for split, sizes in (("train", [2, 5]), ("val", [3, 3]), ("test", [1, 4])):
        for c, size in enumerate(sizes):
            (tmp_path / "own" / split / f"{split}{c}").mkdir(parents=True)
            for i in range(size):
                noise(10 * c + i).save(tmp_path / "own" / split / f"{split}{c}" / f"{i}.png")
    images = dataset(tmp_path / "own", tmp_path)
    assert images.load("train").sizes.tolist() == [2, 5]
    bank = images.load("test")
    assert (bank.sizes.tolist(), bank.class_names, bank.name) == ([1, 4], ("test0", "test1"), "own test")
    assert torch.equal(bank.images[0], torch.from_numpy(np.array(noise(0))).permute(2, 0, 1))
    assert images.splits() == {split: [f"{split}0", f"{split}1"] for split in SPLITS}


def test_a_folder_of_classes_is_split_at_random_by_fractions_and_seed(tmp_path):
    root = fill(tmp_path / "own", 10)
    splits = dataset(root, tmp_path).splits()
    assert [len(splits[split]) for split in SPLITS] == [6, 2, 2]
    assert sorted(chain(*splits.values())) == [f"class {c}" for c in range(10)]
    assert dataset(root, tmp_path).splits() == splits
    assert any(dataset(root, tmp_path, split_seed=seed).splits() != splits for seed in range(1, 5))
    assert dataset(root, tmp_path).load("val").class_names == tuple(splits["val"])


def test_a_random_split_is_the_same_as_in_version_1(tmp_path):
    for c in range(10):
        (tmp_path / f"class {c}").mkdir()
    expected = {"train": [1, 3, 4, 5, 6, 8], "val": [0, 2], "test": [7, 9]}
    assert dataset(tmp_path, tmp_path).splits() == {s: [f"class {c}" for c in expected[s]] for s in SPLITS}


def test_a_class_that_is_added_moves_few_others(tmp_path):
    for c in range(40):
        (tmp_path / f"class {c}").mkdir()
    before = dataset(tmp_path, tmp_path).splits()
    (tmp_path / "new").mkdir()
    after = dataset(tmp_path, tmp_path).splits()
    moved = [name for split in before for name in before[split] if name not in after[split]]
    assert len(moved) <= 2


def test_images_are_cropped_or_stretched_converted_and_inverted_as_the_settings_say(tmp_path):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = (255, 0, 0)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    cropped = dataset(tmp_path, tmp_path).read(tmp_path / "wide.png")
    assert cropped.shape == (3, 28, 28)
    assert cropped[0, 14, 2:-2].min() > 240
    stretched = dataset(tmp_path, tmp_path, fit="stretch").read(tmp_path / "wide.png")
    assert [int(stretched[0, 14, x] > 128) for x in (2, 14, 25)] == [0, 1, 0]
    grey = dataset(tmp_path, tmp_path, color=False, invert=True).read(tmp_path / "wide.png")
    assert grey.shape == (1, 28, 28)
    assert abs(int(grey[0, 14, 14]) - (255 - 76)) <= 2


def test_unreadable_files_are_skipped_with_a_line_each_and_counted(tmp_path, capsys):
    root = fill(tmp_path / "own", 5, images=2)
    (root / "class 0/notes.txt").write_text("not an image")
    (root / "class 1/empty.jpg").touch()
    (root / "class 2/.hidden").write_text("not looked at")
    bank = dataset(root, tmp_path, **ALL_FOR_TRAINING).load("train")
    lines = capsys.readouterr().err.splitlines()
    for name, line in zip(("0/notes.txt", "1/empty.jpg"), lines[:2], strict=True):
        assert line.startswith(f"metacv: {root}/class {name} cannot be read")
    assert lines[2:] == ["metacv: own train: 2 of 12 files skipped: not readable as images"]
    assert bank.sizes.tolist() == [2] * 5
    again = dataset(root, tmp_path, **ALL_FOR_TRAINING).load("train")  # from the cache
    assert capsys.readouterr().err.splitlines() == lines[2:]
    assert again.fingerprint == bank.fingerprint


def test_a_changed_file_is_read_again(tmp_path):
    root = fill(tmp_path / "own", 2)
    noise(1).save(root / "class 0/0.bmp")
    size = (root / "class 0/0.bmp").stat().st_size
    before = dataset(root, tmp_path, **ALL_FOR_TRAINING).load("train")
    path = root / "class 0/0.bmp"
    noise(999).save(path)
    os.utime(path, (0, 0))
    assert path.stat().st_size == size
    assert dataset(root, tmp_path, **ALL_FOR_TRAINING).load("train").fingerprint != before.fingerprint


def test_folders_of_the_same_name_do_not_share_a_cache(tmp_path, monkeypatch):
    for i, place in enumerate((tmp_path / "a", tmp_path / "b")):
        for c in range(2):
            (place / f"own/{c}").mkdir(parents=True)
            Image.new("L", (28, 28), i).save(place / f"own/{c}/0.bmp")
            os.utime(place / f"own/{c}/0.bmp", (0, 0))
        monkeypatch.chdir(place)
        images = dataset(Path("own"), tmp_path, **ALL_FOR_TRAINING).load("train").images
        assert images.unique().tolist() == [i]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"dataset.root=.*nowhere: there is no such folder"):
        dataset(tmp_path / "nowhere", tmp_path).load("train")
    with pytest.raises(UserError, match=r"^dataset.root=~no such user/own: there is no such folder$"):
        dataset(Path("~no such user/own"), tmp_path).load("train")


def test_a_split_with_too_few_classes_is_named_with_the_setting_to_change(tmp_path):
    message = r"has 4 class folders, 1 of them in the split val: a task needs 2 classes; dataset.fractions sets"
    with pytest.raises(UserError, match=message):
        dataset(fill(tmp_path / "own", 4), tmp_path).load("val")


def test_missing_and_empty_split_folders_are_named(tmp_path):
    for name in ("train", "test"):
        (tmp_path / "own" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"own/train has 0 class folders: a task needs 2 classes$"):
        dataset(tmp_path / "own", tmp_path).load("train")
    with pytest.raises(UserError, match=r"own has no folder val"):
        dataset(tmp_path / "own", tmp_path).load("val")


def test_a_class_without_a_readable_image_is_named(tmp_path):
    fill(tmp_path / "own", 2)
    (tmp_path / "own/class 1/0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"own train: the class class 1 has no readable image"):
        dataset(tmp_path / "own", tmp_path, **ALL_FOR_TRAINING).load("train")


def test_a_class_in_two_split_folders_is_refused(tmp_path):
    for split in SPLITS:
        fill(tmp_path / "own" / split, 2)
    with pytest.raises(UserError, match=r"own: the class class 0 is in both train and val"):
        dataset(tmp_path / "own", tmp_path).load("train")


def test_a_misnamed_split_folder_is_reported_with_the_name_to_use(tmp_path):
    for split in ("train", "valid", "test"):
        fill(tmp_path / "own" / split, 2)
    with pytest.raises(UserError, match=r"dataset.root=.*own: rename its folder valid to val"):
        dataset(tmp_path / "own", tmp_path).load("train")


def test_nested_images_belong_to_their_class_folder_with_a_message(tmp_path, capsys):
    fill(tmp_path / "alphabets/Greek", 3)
    fill(tmp_path / "alphabets/Latin", 3, images=2)
    bank = dataset(tmp_path / "alphabets", tmp_path, **ALL_FOR_TRAINING).load("train")
    assert bank.sizes.tolist() == [3, 6]
    message = "2 of 2 classes have folders and no images (Greek, ...); all images below are one class"
    assert capsys.readouterr().err.startswith(f"metacv: alphabets train: {message}\n")


@pytest.fixture
def split_folders(tmp_path) -> Path:
    """Classes train0, train1, val0, ... in the folders of their splits."""
    for split in SPLITS:
        for c in range(2):
            (tmp_path / "own" / split / f"{split}{c}").mkdir(parents=True)
            noise(c).save(tmp_path / "own" / split / f"{split}{c}" / "0.png")
    return tmp_path / "own"


def with_split_file(root: Path, content: str) -> ImageFolder:
    path = root.parent / "split.json"
    path.write_text(content)
    return dataset(root, root.parent, split_file=str(path))


def test_a_split_file_overrides_the_split_folders(split_folders):
    splits = {"train": ["test0", "val0"], "val": ["train1", "train0"], "test": ["val1", "test1"]}
    images = with_split_file(split_folders, json.dumps(splits))
    assert images.splits() == splits
    assert images.load("train").class_names == ("test0", "val0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not a split file"),
        ('{"train": []}', "is not a split file"),
        ('{"train": ["train0"], "val": ["nothing"], "test": []}', "has no class nothing"),
        ('{"train": ["train0"], "val": ["train0"], "test": []}', "the class train0 is in train and in val"),
        ('{"train": ["train0", "train0"], "val": [], "test": []}', "the class train0 is in train and in train"),
        (
            '{"train": ["train0"], "val": ["val0"], "test": []}',
            "has 6 class folders, 1 of them in the split train: a task needs 2 classes$",
        ),
    ],
)
def test_a_split_file_that_does_not_fit_is_refused(split_folders, content, message):
    with pytest.raises(UserError, match=message):
        with_split_file(split_folders, content).load("train")


@pytest.mark.parametrize("place", ["gone.json", "~no such user/gone.json"])
def test_a_missing_split_file_is_named(split_folders, place):
    images = dataset(split_folders, split_folders.parent, split_file=place)
    with pytest.raises(UserError, match=f"dataset.split_file={place} is not a split file .*FileNotFoundError"):
        images.load("train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fractions": {"train": 1.0}}, "train, val and test"),
        ({"fractions": {"train": 0, "val": 0, "test": 0}}, "not all 0"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path, tmp_path, **changes)


def copies(tmp_path: Path, capsys, split: str = "train", **changes) -> str:
    """What loading a split says of copies, the second time too, from the cache."""
    said = []
    for _ in range(2):
        dataset(tmp_path / "own", tmp_path, **changes).load(split)
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    return said[0]


def test_images_without_copies_are_loaded_without_a_message(tmp_path, capsys):
    fill(tmp_path / "own", 4, images=3)
    assert copies(tmp_path, capsys, **ALL_FOR_TRAINING) == ""


def test_copies_of_an_image_in_a_class_and_in_other_classes_are_counted(tmp_path, capsys):
    fill(tmp_path / "own", 4, images=3)
    for name in ("a.png", "b.bmp"):
        noise(0).save(tmp_path / "own/class 0" / name)  # the pixels of class 0/0.png, in another format too
    noise(1).save(tmp_path / "own/class 3/copy.png")  # those of class 0/1.png
    message = copies(tmp_path, capsys, **ALL_FOR_TRAINING)
    counted = "2 of images in the same class, 1 of images in another class"
    assert message == f"metacv: warning: own train: 3 of 15 images are copies: {counted}; accuracies may be too high\n"


def test_copies_of_images_of_training_in_the_test_are_counted(tmp_path, capsys):
    for split in SPLITS:
        for c in range(2):
            (tmp_path / "own" / split / f"{split}{c}").mkdir(parents=True)
            for i in range(2):
                noise(100 * SPLITS.index(split) + 10 * c + i).save(
                    tmp_path / "own" / split / f"{split}{c}" / f"{i}.png"
                )
    first = Image.open(tmp_path / "own/train/train0/0.png")
    first.save(tmp_path / "own/test/test1/copy.png")
    assert copies(tmp_path, capsys, "train") == ""
    counted = "1 of images in train"
    message = copies(tmp_path, capsys, "test")
    assert message == f"metacv: warning: own test: 1 of 5 images are copies: {counted}; accuracies may be too high\n"


GIVEN = {"size": 20, "color": False, "fit": "stretch", "invert": True}


@pytest.mark.parametrize("name", GIVEN)
def test_with_one_preparation_setting_the_others_have_their_defaults(name, tmp_path):
    root, defaults = fill(tmp_path / "own", 2), {"size": 84, "color": True, "fit": "crop", "invert": False}
    noise(1, (90, 60)).save(tmp_path / "own" / "class 0" / "0.png")
    expected = dataset(root, tmp_path, **defaults | {name: GIVEN[name]}).read(root / "class 0" / "0.png")
    own = dataset(root, tmp_path, **dict.fromkeys(defaults) | {name: GIVEN[name]})
    own.prepare_like(dataset(root, tmp_path, **GIVEN))
    assert torch.equal(own.read(root / "class 0" / "0.png"), expected)


def test_without_preparation_settings_images_are_prepared_as_in_training(tmp_path):
    root = fill(tmp_path / "own", 10)
    own = dataset(root, tmp_path, **dict.fromkeys(GIVEN))
    assert own.load("train").image_shape == (3, 84, 84)
    trained = dataset(root, tmp_path, **GIVEN)
    own.prepare_like(trained)
    assert torch.equal(own.load("train").images, trained.load("train").images)
    glyphs = Glyphs(tmp_path, {"train": 2, "val": 2, "test": 2}, 1, 0)
    own.prepare_like(glyphs)
    assert torch.equal(own.load("train").images[0], glyphs.read(root / own.splits()["train"][0] / "0.png"))
