"""Data sets of torchvision: real dataset classes on small folders, and replacements for others."""

import json
import shutil
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from metacv.data.bank import SPLITS, ImageBank
from metacv.data.image_folder import ImageFolder
from metacv.data.sources import random_split
from metacv.data.torchvision_datasets import NAMES, Torchvision
from metacv.errors import UserError

FRACTIONS = {"train": 0.64, "val": 0.16, "test": 0.2}
CLASSES = 15
PARTS = ("train", "val", "test")


def image_of(label: int, part: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    """Red is 10 times the class, green the official split, and blue 7, everywhere."""
    return Image.new("RGB", size, (10 * label, part, 7))


class Fake:
    """Replacement for Flowers102: one image of each class in each split."""

    downloads: ClassVar[list[str]] = []
    image, label = staticmethod(image_of), staticmethod(int)

    def __init__(self, root, split: str = "train", download: bool = False):
        self.part, folder = PARTS.index(split), Path(root) / "fake"
        if download:
            self.downloads.append(split)
            print("downloading")
            folder.mkdir(exist_ok=True)
            (folder / split).touch()
        if not (folder / split).exists():
            raise RuntimeError("Dataset not found.\nYou can use download=True to download it")

    def __len__(self) -> int:
        return CLASSES

    def __getitem__(self, i: int) -> tuple:
        return self.image(CLASSES - 1 - i, self.part), self.label(CLASSES - 1 - i)


@pytest.fixture
def fake(monkeypatch) -> type[Fake]:
    own = type("Own", (Fake,), {"downloads": []})
    monkeypatch.setattr(torchvision.datasets, "Flowers102", own)
    return own


def dataset(data_dir: Path, name: str = "Flowers102", size: int = 8, fractions=FRACTIONS, seed: int = 0) -> Torchvision:
    return Torchvision(data_dir, name, size, fractions, seed)


def load_all(data_dir: Path, *args, **settings) -> dict[str, ImageBank]:
    return {split: dataset(data_dir, *args, **settings).load(split) for split in SPLITS}


def error_of(data_dir: Path, *args, **settings) -> str:
    with pytest.raises(UserError) as caught:
        load_all(data_dir, *args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_official_splits_are_gathered_by_class(tmp_path, fake):
    seen: list[str] = []
    for split, bank in load_all(tmp_path).items():
        assert bank.name == f"Flowers102 {split}"
        assert bank.image_shape == (3, 8, 8)
        assert bank.sizes.unique().tolist() == [3]
        expected = [(10 * int(name), part, 7) for name in bank.class_names for part in range(3)]
        assert [tuple(image[:, 4, 4].tolist()) for image in bank.images] == expected
        seen += bank.class_names
    assert sorted(seen) == [f"{c:03}" for c in range(CLASSES)]


def test_files_are_downloaded_once_and_the_cache_suffices_without_them(tmp_path, fake, capsys):
    first = [bank.fingerprint for bank in load_all(tmp_path).values()]
    assert fake.downloads == [*PARTS]
    assert capsys.readouterr().out == ""  # stdout is for results
    load_all(tmp_path, size=4)
    assert fake.downloads == [*PARTS]
    shutil.rmtree(tmp_path / "torchvision")
    assert [bank.fingerprint for bank in load_all(tmp_path).values()] == first
    assert fake.downloads == [*PARTS]


def test_fractions_and_seed_split_the_classes(tmp_path, fake):
    def split(**settings) -> list[tuple[str, ...]]:
        return [bank.class_names for bank in load_all(tmp_path, **settings).values()]

    assert [*map(len, split())] == [10, 2, 3]
    assert [*map(len, split(fractions={"train": 1, "val": 1, "test": 1}))] == [5, 5, 5]
    assert split() == split()
    assert split() != split(seed=1)


def test_class_names_are_those_of_the_data_set(tmp_path, fake):
    fake.classes = [f"flower {c}" for c in range(CLASSES)]
    bank = dataset(tmp_path).load("val")
    assert bank.class_names == tuple(f"flower {int(image[0, 0, 0]) // 10}" for image in bank.images[::3])


def test_images_of_any_mode_and_numbers_of_numpy_are_taken(tmp_path, fake):
    fake.image = staticmethod(lambda label, part: image_of(label, part).convert("L"))
    fake.label = staticmethod(np.uint8)
    images = dataset(tmp_path).load("train").images
    assert torch.equal(images[:, 0], images[:, 2])


def test_any_image_file_is_prepared_like_the_data_sets_own(tmp_path, fake):
    noise = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    fake.image = staticmethod(lambda label, part: Image.fromarray(noise))
    assert torch.equal(dataset(tmp_path).read(tmp_path / "photo.png"), dataset(tmp_path).load("test").images[0])


def write(root: Path, places: dict[str, int]) -> None:
    for place, label in places.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        image_of(label, 0).save(root / place)


def write_eurosat(root: Path) -> None:
    write(root / "eurosat/2750", {f"class{c:02}/{i}.png": c for c in range(CLASSES) for i in range(3)})


def write_country(root: Path) -> None:
    parts = ("train", "valid", "test")
    write(root / "country211", {f"{part}/class{c:02}/0.png": c for c in range(CLASSES) for part in parts})


def write_dtd(root: Path) -> None:
    write(root / "dtd/dtd/images", {f"class{c:02}/{part}.png": c for c in range(CLASSES) for part in PARTS})
    (root / "dtd/dtd/labels").mkdir()
    for part in PARTS:
        lines = [f"class{c:02}/{part}.png\n" for c in range(CLASSES)]
        (root / "dtd/dtd/labels" / f"{part}1.txt").write_text("".join(lines))


def write_food(root: Path) -> None:
    write(root / "food-101/images", {f"class{c:02}/{i}.jpg": c for c in range(CLASSES) for i in range(3)})
    (root / "food-101/meta").mkdir()
    for part, images in (("train", [0, 2]), ("test", [1])):
        content = {f"class{c:02}": [f"class{c:02}/{i}" for i in images] for c in range(CLASSES)}
        (root / "food-101/meta" / f"{part}.json").write_text(json.dumps(content))


def write_aircraft(root: Path) -> None:
    root = root / "fgvc-aircraft-2013b" / "data"
    write(root / "images", {f"{c:02}{i}.jpg": c for c in range(CLASSES) for i in range(3)})
    (root / "variants.txt").write_text("".join(f"class{c:02}\n" for c in range(CLASSES)))
    for part, images in (("trainval", [0, 2]), ("test", [1])):
        lines = [f"{c:02}{i} class{c:02}\n" for c in range(CLASSES) for i in images]
        (root / f"images_variant_{part}.txt").write_text("".join(lines))


def write_pets(root: Path) -> None:
    root = root / "oxford-iiit-pet"
    write(root / "images", {f"class{c:02}_{i}.jpg": c for c in range(CLASSES) for i in range(3)})
    (root / "annotations").mkdir()
    for part, images in (("trainval", [0, 2]), ("test", [1])):
        lines = [f"class{c:02}_{i} {c + 1} 1 1\n" for c in range(CLASSES) for i in images]
        (root / "annotations" / f"{part}.txt").write_text("".join(lines))


OWN = {
    "EuroSAT": write_eurosat,
    "Country211": write_country,
    "DTD": write_dtd,
    "Food101": write_food,
    "FGVCAircraft": write_aircraft,
    "OxfordIIITPet": write_pets,
}


@pytest.mark.parametrize("name", OWN)
def test_torchvision_reads_files_that_are_there_without_a_download(tmp_path, monkeypatch, name):
    monkeypatch.setattr(urllib.request, "urlopen", None)
    OWN[name](tmp_path / "torchvision")
    reds: Counter[int] = Counter()
    for split, bank in load_all(tmp_path, name).items():
        assert bank.name == f"{name} {split}"
        for c, class_name in enumerate(bank.class_names):
            label = int(class_name.lower().removeprefix("class"))
            own = bank.images[3 * c : 3 * c + 3, 0].float()
            assert abs(own - 10 * label).max() < 5  # JPEG is not exact
            reds[label] += len(own)
    assert reds == dict.fromkeys(range(CLASSES), 3)


def test_every_data_set_has_the_arguments_that_are_given_to_it():
    for name, splits in NAMES.items():
        parameters = getattr(torchvision.datasets, name).__init__.__annotations__
        kinds = {"train" if isinstance(value, bool) else "split" for value in splits}
        assert kinds <= parameters.keys(), name
        assert kinds or not {"train", "split"} & parameters.keys(), name
        assert "download" in parameters, name


# Errors


def test_without_a_network_one_line_says_where_the_files_belong(tmp_path, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise OSError("tests have no network")

    monkeypatch.setattr(urllib.request, "urlopen", refused)
    root = tmp_path / "torchvision"
    message = error_of(tmp_path, "EuroSAT")
    assert message.startswith(f"data_dir={tmp_path}: EuroSAT is not in {root} and cannot be downloaded (")
    assert "tests have no network" in message
    assert "put its files there" in message


def test_a_data_set_that_is_no_longer_available_is_reported(tmp_path):
    assert "StanfordCars dataset cannot be downloaded anymore" in error_of(tmp_path, "StanfordCars")


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("unknown host\nor so"), ModuleNotFoundError("gdown"), EOFError()]
)
def test_any_error_of_a_download_is_one_line(tmp_path, monkeypatch, error):
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets, "Caltech101", fails)
    assert "Caltech101 is not in" in error_of(tmp_path, "Caltech101")


def test_a_data_dir_that_is_a_file_is_reported(tmp_path, fake):
    (tmp_path / "data").write_text("")
    assert error_of(tmp_path / "data").startswith(f"data_dir={tmp_path}/data: Flowers102 is not in")


@pytest.mark.parametrize("name", ["Flower102", "", "CocoDetection", "VisionDataset", "utils", "flowers102"])
def test_unknown_data_sets_are_refused_with_the_allowed_names(tmp_path, name):
    message = error_of(tmp_path, name)
    assert message.startswith(f"dataset.name={name}: must be a data set of torchvision with one class for each image: ")
    assert all(known in message for known in NAMES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": staticmethod(lambda c: {"boxes": []})}, "its items are Image and dict, not an image and the number"),
        ({"label": staticmethod(float)}, "its items are Image and float"),
        ({"image": staticmethod(lambda *_: torch.zeros(3, 4, 4))}, "its items are Tensor and int"),
        ({"__getitem__": lambda self, i: (0, 1, 2)}, "image 0 of Flowers102 cannot be read (too many values"),
        ({"image": staticmethod(lambda *_: Image.open("/none.jpg"))}, "No such file or directory: '/none.jpg'"),
        ({"__len__": lambda self: 0}, "it has no images"),
    ],
)
def test_items_other_than_an_image_and_its_class_are_refused(tmp_path, fake, changes, words):
    for name, value in changes.items():
        setattr(fake, name, value)
    message = error_of(tmp_path)
    assert words in message
    assert "dataset.name=Flowers102" in message or str(tmp_path) in message


def test_a_split_of_less_than_two_classes_is_refused(tmp_path, fake):
    message = error_of(tmp_path, fractions={"train": 1, "val": 0.05, "test": 0.5})
    assert message.startswith("dataset.name=Flowers102 has 15 classes, 0 of them in the split val: a task needs 2")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fractions": {"train": 1.0}}, "train, val and test"),
        ({"fractions": {"train": 0, "val": 0, "test": 0}}, "not all 0"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        dataset(tmp_path, **settings)


def test_the_random_split_is_the_same_as_for_image_folder(tmp_path):
    names = [f"class {c}" for c in range(20)]
    for name in names:
        (tmp_path / name).mkdir()
    own = ImageFolder(tmp_path, str(tmp_path), 8, True, "crop", False, FRACTIONS, 3, None)
    assert own.splits() == random_split(names, FRACTIONS, 3)


def test_a_run_keeps_the_classes_of_each_split_so_that_another_split_of_them_is_refused(tmp_path, fake):
    splits = dataset(tmp_path).splits()
    assert {split: list(bank.class_names) for split, bank in load_all(tmp_path).items()} == splits
    assert not {*splits["train"], *splits["val"]} & {*splits["test"]}
    assert dataset(tmp_path, seed=1).splits() != splits
