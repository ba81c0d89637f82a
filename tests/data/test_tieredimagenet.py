"""tieredImageNet in each common form, with 2 or 3 classes per split and a few images each."""

import io
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metacv.data import tieredimagenet
from metacv.data.bank import SPLITS, ImageBank
from metacv.data.sources import split_classes
from metacv.data.tieredimagenet import TieredImageNet
from metacv.errors import UserError

CLASSES = {"train": ["n03", "n01", "n02"], "val": ["n04", "n05"], "test": ["n06", "n07"]}
WORDS = {"train": ["wren, bird", "ant", "cat"], "val": ["dog", "elk"], "test": ["fox", "gnu"]}
ROWS = {"train": [0, 1, 2, 1, 1, 0], "val": [1, 0], "test": [0, 1, 1]}  # the class of each image


@pytest.fixture(autouse=True)
def _few_classes(monkeypatch):
    monkeypatch.setattr(tieredimagenet, "CLASSES", CLASSES)


def pixels(split: str, row: int, size: int = 84) -> np.ndarray:
    """Red is 10 times the split and the class, green is the number of the image, and blue grows from left to right."""
    image = np.zeros((size, size, 3), np.uint8)
    image[..., 0] = 50 * SPLITS.index(split) + 10 * ROWS[split][row]
    image[..., 1] = row
    image[..., 2] = np.arange(size)
    return image


def png(image: np.ndarray) -> np.ndarray:
    Image.fromarray(image).save(file := io.BytesIO(), "PNG")
    return np.frombuffer(file.getvalue(), np.uint8).copy()


def content_of(split: str) -> tuple[list[np.ndarray], dict]:
    """As in the authors' pickles."""
    labels = {"label_specific": np.array(ROWS[split], np.int32), "label_specific_str": [*WORDS[split]]}
    general = {"label_general": np.zeros(len(ROWS[split]), np.int32), "label_general_str": ["thing"]}
    return [png(pixels(split, row)) for row in range(len(ROWS[split]))], labels | general


def write(root: Path, split: str, images: object, labels: object, protocol: int = 4) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{split}_images_png.pkl").write_bytes(pickle.dumps(images, protocol))
    (root / f"{split}_labels.pkl").write_bytes(pickle.dumps(labels, protocol))


def write_pickles(root: Path, protocol: int = 4) -> None:
    for split in SPLITS:
        write(root, split, *content_of(split), protocol)


def write_columns(root: Path) -> None:
    """Arrays [N, 1], as older versions of OpenCV give them."""
    for split in SPLITS:
        images, labels = content_of(split)
        write(root, split, [image[:, None] for image in images], labels)


def write_objects(root: Path) -> None:
    for split in SPLITS:
        images, labels = content_of(split)
        array = np.empty(len(images), object)
        array[:] = images
        write(root, split, array, labels)


def of_python_2(value: object) -> bytes:
    """A pickle of protocol 2 as Python 2 writes it, whose strings are bytes, also those of arrays."""
    if isinstance(value, dict):
        items = b"".join(of_python_2(name) + of_python_2(item) for name, item in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(of_python_2, value)) + b"e"
    if isinstance(value, str):
        return b"U" + bytes([len(value)]) + value.encode()
    array = np.asarray(value)
    code = {"uint8": b"u1", "int32": b"i4"}[array.dtype.name]
    dtype = b"cnumpy\ndtype\n(S'" + code + b"'\nK\x00K\x01tR(K\x03S'" + (b"|" if code == b"u1" else b"<") + b"'\nNNNJ"
    dtype += b"\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = array.tobytes()
    state = b"(K\x01(J" + len(array).to_bytes(4, "little") + b"t" + dtype + b"\x89T" + len(raw).to_bytes(4, "little")
    return b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tS'b'\ntR" + state + raw + b"tb"


def write_python_2(root: Path) -> None:
    root.mkdir(parents=True)
    for split in SPLITS:
        for name, value in zip(("images_png", "labels"), content_of(split), strict=True):
            (root / f"{split}_{name}.pkl").write_bytes(b"\x80\x02" + of_python_2(value) + b".")


def write_tar(root: Path) -> None:
    write_pickles(root.parent / "loose" / "tiered-imagenet")
    with tarfile.open(root.parent / "tiered-imagenet.tar", "w") as archive:
        archive.add(root.parent / "loose", ".")
    shutil.rmtree(root.parent / "loose")


def write_folders(root: Path, size: int = 84) -> None:
    for split in SPLITS:
        for row, label in enumerate(ROWS[split]):
            path = root / split / CLASSES[split][label] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(split, row, size)).save(path)


FORMS = {
    "pickles of protocol 4": write_pickles,
    "pickles of protocol 5": lambda root: write_pickles(root, 5),
    "pickles of protocol 2": lambda root: write_pickles(root, 2),
    "pickles of Python 2": write_python_2,
    "columns": write_columns,
    "array of objects": write_objects,
    "tar of pickles": write_tar,
    "folders": write_folders,
}


def load(data_dir: Path, split: str = "train", resize: bool = False) -> ImageBank:
    return TieredImageNet(data_dir, resize).load(split)


def error_of(data_dir: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        load(data_dir, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_images_sorted_by_class(tmp_path, form):
    FORMS[form](tmp_path / "tiered-imagenet")
    for split in SPLITS:
        names = CLASSES[split] if form == "folders" else WORDS[split]
        order = sorted(range(len(names)), key=lambda c: names[c])
        bank = load(tmp_path, split)
        assert bank.name == f"tieredimagenet {split}"
        assert bank.class_names == tuple(sorted(names))
        assert bank.sizes.tolist() == [ROWS[split].count(c) for c in order]
        rows = [row for c in order for row, label in enumerate(ROWS[split]) if label == c]
        expected = np.stack([pixels(split, row) for row in rows])
        assert np.array_equal(bank.images.permute(0, 2, 3, 1).numpy(), expected)


def test_the_real_data_set_has_351_97_and_160_classes(monkeypatch):
    monkeypatch.undo()
    classes = split_classes("tieredimagenet")
    assert classes == tieredimagenet.CLASSES
    assert [len(classes[split]) for split in SPLITS] == [351, 97, 160]
    assert len({name for names in classes.values() for name in names}) == 608


def test_the_cache_suffices_without_the_files(tmp_path):
    write_pickles(tmp_path / "tieredimagenet")
    first = load(tmp_path)
    shutil.rmtree(tmp_path / "tieredimagenet")
    assert load(tmp_path).fingerprint == first.fingerprint


def test_each_file_is_removed_from_memory_when_it_is_decoded(tmp_path, monkeypatch):
    write(tmp_path, "train", [], content_of("train")[1])
    files, left = [*"abcdef"], []

    def decode(*_: object) -> torch.Tensor:
        left.append("".join(filter(None, files)))
        return torch.zeros(3, 84, 84)

    monkeypatch.setattr(tieredimagenet, "decode", decode)
    tieredimagenet.read_content(files, tmp_path / "train_images_png.pkl", "train")
    assert left == ["abcdef", "bcdef", "cdef", "def", "ef", "f"]


def test_missing_data_are_reported_with_what_to_put_where(tmp_path):
    message = error_of(tmp_path)
    assert f"Put into {tmp_path / 'tieredimagenet'} one of" in message
    assert "train_images_png.pkl" in message
    assert "get tiered-imagenet.tar" in message


def test_a_folder_with_images_of_another_size_needs_resize(tmp_path):
    write_folders(tmp_path / "tieredimagenet", size=100)
    assert "is 100x100, not 84x84; set dataset.resize=true" in error_of(tmp_path)
    assert load(tmp_path, resize=True).image_shape == (3, 84, 84)


def test_a_missing_class_folder_and_one_of_another_split_are_named(tmp_path):
    write_folders(root := tmp_path / "tieredimagenet")
    shutil.move(root / "val" / "n05", root / "train" / "n05")
    assert "lacks 1 of 2 classes: n05" in error_of(tmp_path, "val")
    assert "do not belong to it: n05" in error_of(tmp_path, "train")


def test_any_image_file_is_cropped_and_resized_to_84x84(tmp_path):
    Image.fromarray(pixels("val", 1, size=200)[:100]).save(tmp_path / "photo.bmp")
    image = TieredImageNet(tmp_path, resize=False).read(tmp_path / "photo.bmp")
    assert (image.shape, image.dtype) == ((3, 84, 84), torch.uint8)


class RunsCode:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda images, labels: images.pop(), "has 5 images, but "),
        (lambda images, labels: images.insert(0, RunsCode()), "which images do not need"),
        (lambda images, labels: images.__setitem__(2, images[2][:99]), "its image 2 is not a readable PNG file"),
        (lambda images, labels: images.__setitem__(3, "text"), "its image 3 is not a readable PNG file"),
        (lambda images, labels: images.__setitem__(1, png(pixels("train", 1, 83))), "its image 1 is 83x83, not 84x84"),
        (lambda images, labels: labels.pop("label_specific"), "train_labels.pkl is not a pickle of tieredImageNet"),
        (lambda images, labels: labels.update(label_specific=[0.5] * 6), "train_labels.pkl is not a pickle"),
        (lambda images, labels: labels.update(label_specific=[0, 1, 2, 3, 0, 0]), "must be from 0 to 2"),
        (lambda images, labels: labels.update(label_specific=[0, 1, 2, -1, 0, 0]), "must be from 0 to 2"),
        (lambda images, labels: labels.update(label_specific=[0, 1, 1, 1, 0, 0]), "train_labels.pkl: cat has no image"),
        (lambda images, labels: labels.update(label_specific_str=["ant", "ant", "cat"]), "list of different names"),
        (lambda images, labels: labels.update(label_specific_str=None), "train_labels.pkl is not a pickle"),
        (lambda images, labels: labels["label_specific_str"].append("bee"), "split has 4 classes, not 3"),
        (lambda images, labels: labels["label_specific_str"].__setitem__(1, "elk"), "share the class elk"),
    ],
)
def test_an_invalid_pickle_is_refused_in_one_line(tmp_path, capsys, change, words):
    write_pickles(tmp_path)
    change(*(content := content_of("train")))
    write(tmp_path, "train", *content)
    assert words in error_of(tmp_path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train_images_png.pkl", "train_labels.pkl"])
def test_a_truncated_pickle_is_named(tmp_path, name):
    write_pickles(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-50])
    assert error_of(tmp_path).startswith(f"{tmp_path / name} is not a pickle of tieredImageNet (")


def test_images_without_labels_are_reported(tmp_path):
    write_pickles(tmp_path)
    (tmp_path / "train_labels.pkl").unlink()
    assert error_of(tmp_path) == f"{tmp_path}/train_images_png.pkl: train_labels.pkl is missing in the same folder"


def test_other_content_than_a_list_of_images_is_refused(tmp_path):
    write(tmp_path, "train", {"images": []}, content_of("train")[1])
    assert "it contains dict, not a list of images" in error_of(tmp_path)


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "tiered-imagenet.tar").write_bytes(b"something else\n" * 100)
    assert error_of(tmp_path).startswith(f"{tmp_path / 'tiered-imagenet.tar'} cannot be unpacked (")
