"""CIFAR-FS and FC100 from small files of the official form, from their archive and from class folders."""

import pickle
import re
import shutil
import tarfile
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from metacv.data import cifar100
from metacv.data.cifar100 import CIFARFS, FC100
from metacv.data.sources import split_classes
from metacv.errors import UserError

NAMES = sorted(name for own in split_classes("cifar_fs").values() for name in own)


@pytest.fixture(autouse=True)
def _three_images_a_class(monkeypatch):
    monkeypatch.setattr(cifar100, "IMAGES", 3)


def official(labels: list[int], text: bool = True) -> dict:
    """Image i of class c: red is c, green is the number of the row, blue is 7, everywhere."""
    data = numpy.zeros((len(labels), 3, 1024), dtype=numpy.uint8)
    data[:, 0], data[:, 1], data[:, 2] = numpy.array(labels)[:, None], numpy.arange(len(labels))[:, None] % 256, 7
    content = {"fine_labels": labels, "data": data.reshape(-1, 3072), "batch_label": "some"}
    return content if text else {name.encode(): value for name, value in content.items()}


def write_official(folder: Path, text: bool = True) -> Path:
    folder.mkdir(parents=True)
    for name, each in (("train", 2), ("test", 1)):
        labels = [c for c in range(100) for _ in range(each)]
        (folder / name).write_bytes(pickle.dumps(official(labels[::-1], text), protocol=2))
    return folder


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("dataset", [CIFARFS, FC100])
def test_all_images_of_a_class_are_gathered_from_both_official_files(tmp_path, dataset, text):
    write_official(tmp_path / "cifar-100-python", text)
    seen: list[str] = []
    for split, names in split_classes(dataset.lists).items():
        bank = dataset(tmp_path).load(split)
        assert bank.class_names == tuple(sorted(names))
        assert bank.sizes.unique().tolist() == [3]
        assert bank.image_shape == (3, 32, 32)
        for c, name in enumerate(bank.class_names):
            own = bank.images[3 * c : 3 * c + 3]
            assert (own[:, 0] == NAMES.index(name)).all()
            assert (own[:, 2] == 7).all()
        seen += names
    assert sorted(seen) == NAMES


def test_splits_have_the_published_numbers_of_classes_and_share_none():
    for name, numbers in {"cifar_fs": (64, 16, 20), "fc100": (60, 20, 20), "miniimagenet": (64, 16, 20)}.items():
        splits = split_classes(name)
        assert tuple(map(len, splits.values())) == numbers
        assert len({*splits["train"], *splits["val"], *splits["test"]}) == 100


def test_the_archive_is_unpacked_and_class_folders_are_read(tmp_path):
    whole = CIFARFS(write_official(tmp_path / "whole/cifar-100-python").parent).load("test")
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed/cifar-100-python.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "whole/cifar-100-python", "cifar-100-python")
    assert torch.equal(CIFARFS(tmp_path / "packed").load("test").images, whole.images)
    for c, name in enumerate(whole.class_names):
        folder = tmp_path / "folders/cifar100/test" / name
        folder.mkdir(parents=True)
        for i in range(3):
            image = whole.images[3 * c + i].permute(1, 2, 0).numpy()
            Image.fromarray(image).save(folder / f"{i}.png")
    assert torch.equal(CIFARFS(tmp_path / "folders").load("test").images, whole.images)


def test_any_image_file_is_prepared_like_the_data_sets_own(tmp_path):
    Image.new("L", (64, 48), 9).save(tmp_path / "grey.png")
    image = CIFARFS(tmp_path).read(tmp_path / "grey.png")
    assert (image.shape, image.unique().tolist()) == ((3, 32, 32), [9])


class Opened:
    def __reduce__(self):
        return open, ("written by a pickle", "w")


def damaged(folder: Path, how: str) -> None:
    train = folder / "train"
    content = official([c for c in range(100) for _ in range(2)])
    if how == "truncated":
        train.write_bytes(train.read_bytes()[:5000])
    elif how == "code":
        train.write_bytes(pickle.dumps(content | {"data": Opened()}))
    elif how == "few labels":
        train.write_bytes(pickle.dumps(content | {"fine_labels": content["fine_labels"][1:]}))
    elif how == "label 100":
        train.write_bytes(pickle.dumps(content | {"fine_labels": [100, *content["fine_labels"][1:]]}))
    elif how == "floats":
        train.write_bytes(pickle.dumps(content | {"data": content["data"].astype("f4")}))
    elif how == "a list":
        train.write_bytes(pickle.dumps([content]))
    elif how == "another class":
        train.write_bytes(pickle.dumps(content | {"fine_labels": [1, *content["fine_labels"][1:]]}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"train is not a pickle of CIFAR-FS \(.*\)"),
        ("code", r"train is not a pickle of CIFAR-FS \(it names .*open, which images do not need\)"),
        ("few labels", r"train is not a pickle of CIFAR-FS \(it has 200 images and 199 labels\)"),
        ("label 100", r"train is not a pickle of CIFAR-FS \(it has labels from 0 to 100, not from 0 to 99\)"),
        ("floats", r"train is not a pickle of CIFAR-FS \(an array is f4 .*\)"),
        ("a list", r"train is not a pickle of CIFAR-FS \(.*\)"),
        ("another class", r"cifar-100-python: apple of the train split has 2 images, not 3"),
    ],
)
def test_a_damaged_official_file_has_one_clear_line(tmp_path, monkeypatch, how, message):
    monkeypatch.chdir(tmp_path)
    folder = write_official(tmp_path / "cifar-100-python")
    damaged(folder, how)
    with pytest.raises(UserError, match=message) as error:
        CIFARFS(tmp_path).load("train")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "written by a pickle").exists()


def test_a_failed_download_is_reported_with_where_to_put_the_files(tmp_path, monkeypatch):
    def refused(url, target, md5):
        raise OSError("no network")

    monkeypatch.setattr(cifar100, "download", refused)
    with pytest.raises(UserError) as error:
        CIFARFS(tmp_path).load("train")
    text = str(error.value)
    assert re.search(r"the train split of CIFAR-FS is missing \(cifar-100-python\.tar\.gz from https://", text)
    assert text.endswith("cifar-100-python.tar.gz cannot be downloaded (no network)")


def test_a_download_is_unpacked_and_read(tmp_path, monkeypatch):
    write_official(tmp_path / "elsewhere/cifar-100-python")

    def copied(url, target, md5):
        assert (url.rpartition("/")[2], len(md5)) == ("cifar-100-python.tar.gz", 32)
        shutil.make_archive(str(target).removesuffix(".tar.gz"), "gztar", tmp_path / "elsewhere")

    monkeypatch.setattr(cifar100, "download", copied)
    (tmp_path / "data").mkdir()
    assert len(CIFARFS(tmp_path / "data").load("val").images) == 16 * 3
