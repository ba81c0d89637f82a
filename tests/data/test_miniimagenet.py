"""miniImageNet in each common form, with 2 classes per split and 3 images each."""

import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metacv.data import miniimagenet
from metacv.data.bank import SPLITS, ImageBank
from metacv.data.miniimagenet import MiniImageNet
from metacv.errors import UserError

IMAGES = 3
CLASSES = {"train": ["n02", "n01"], "val": ["n03", "n04"], "test": ["n06", "n05"]}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(miniimagenet, "CLASSES", CLASSES)
    monkeypatch.setattr(miniimagenet, "IMAGES", IMAGES)


def pixels(name: str, image: int, size: int = 84) -> np.ndarray:
    """A colour gradient for each class, with a block that moves from image to image."""
    seed = int(name[1:])
    y, x = np.mgrid[:size, :size] / size
    values = np.stack([(seed * 37 + 90 * y) % 256, (seed * 71 + 60 * x) % 256, (seed * 13 + 40 * x * y) % 256], -1)
    values[10 * image : 10 * image + 20, 5:30] = 255 - 20 * seed
    return values.astype(np.uint8)


def file_name(name: str, image: int) -> str:
    return f"{name}{image:08d}.jpg"


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """train/, val/ and test/ with a folder for each class, not to be changed."""
    root = tmp_path_factory.mktemp("small_miniimagenet")
    for split, names in CLASSES.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            for image in range(IMAGES):
                Image.fromarray(pixels(name, image)).save(root / split / name / file_name(name, image), quality=90)
    return root


def decoded(folders: Path, split: str) -> np.ndarray:
    """The images of a split, in the order of CLASSES, uint8 [M, 84, 84, 3]."""
    paths = [folders / split / name / file_name(name, i) for name in CLASSES[split] for i in range(IMAGES)]
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def write_folders(folders: Path, root: Path) -> None:
    shutil.copytree(folders, root)


def write_lists(folders: Path, root: Path) -> None:
    (root / "images").mkdir(parents=True)
    for split, names in CLASSES.items():
        lines = [f"{file_name(name, image)},{name}" for image in reversed(range(IMAGES)) for name in names]
        (root / f"{split}.csv").write_text("\n".join(["filename,label", *lines]))
    for path in folders.rglob("*.jpg"):
        shutil.copy(path, root / "images" / path.name)


def content_of(folders: Path, split: str) -> dict:
    """As in the published pickles: images sorted by class, and the rows of each class."""
    rows = {name: list(range(IMAGES * c, IMAGES * (c + 1))) for c, name in enumerate(CLASSES[split])}
    return {"image_data": decoded(folders, split), "class_dict": rows}


def write_pickles(folders: Path, root: Path, protocol: int = 4) -> None:
    root.mkdir(parents=True)
    for split in SPLITS:
        content = pickle.dumps(content_of(folders, split), protocol=protocol)
        (root / f"mini-imagenet-cache-{split}.pkl").write_bytes(content)


def write_zip(folders: Path, root: Path) -> None:
    write_pickles(folders, root.parent / "loose" / "miniImagenet")
    with zipfile.ZipFile(root.parent / "mini-imagenet.zip", "w") as archive:
        for path in (root.parent / "loose").rglob("*"):
            archive.write(path, path.relative_to(root.parent / "loose"))
    shutil.rmtree(root.parent / "loose")


def write_tar(folders: Path, root: Path) -> None:
    write_lists(folders, root.parent / "loose")
    root.mkdir()
    with tarfile.open(root / "all.tar.gz", "w:gz") as archive:
        archive.add(root.parent / "loose", ".")
    shutil.rmtree(root.parent / "loose")


FORMS = {
    "folders": write_folders,
    "lists": write_lists,
    "pickles of Python 3": write_pickles,
    "pickles of Python 2": lambda folders, root: write_pickles(folders, root, protocol=2),
    "zip of pickles": write_zip,
    "tar of lists": write_tar,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_images_of_the_files_sorted_by_class(tmp_path, folders, form):
    FORMS[form](folders, tmp_path / "miniimagenet")
    for split in SPLITS:
        bank = MiniImageNet(tmp_path, resize=False).load(split)
        order = np.argsort(CLASSES[split])
        expected = decoded(folders, split).reshape(2, IMAGES, 84, 84, 3)[order]
        assert np.array_equal(bank.images.permute(0, 2, 3, 1).numpy(), expected.reshape(-1, 84, 84, 3))
        assert bank.class_names == tuple(sorted(CLASSES[split]))
        assert bank.sizes.tolist() == [IMAGES] * 2
        assert bank.name == f"miniimagenet {split}"


def load(data_dir: Path, split: str = "train", resize: bool = False) -> ImageBank:
    return MiniImageNet(data_dir, resize).load(split)


def error_of(data_dir: Path, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        load(data_dir, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_real_data_set_has_64_16_and_20_classes_of_600_images(monkeypatch):
    monkeypatch.undo()
    classes = miniimagenet.CLASSES
    assert [len(classes[split]) for split in SPLITS] == [64, 16, 20]
    assert len({name for names in classes.values() for name in names}) == 100
    assert miniimagenet.IMAGES == 600


def test_the_cache_suffices_without_the_files_and_has_the_name_of_version_1(tmp_path, folders):
    write_folders(folders, tmp_path / "miniimagenet")
    first = load(tmp_path)
    shutil.rmtree(tmp_path / "miniimagenet")
    assert load(tmp_path).fingerprint == first.fingerprint
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["miniimagenet-train-5efa8af6279dfd63.pt"]


def test_missing_data_are_reported_with_what_to_put_where(tmp_path):
    message = error_of(tmp_path)
    assert f"Put into {tmp_path / 'miniimagenet'} one of" in message
    assert "no official download" in message
    assert "mini-imagenet-cache-train.pkl" in message


def test_a_file_of_another_size_is_refused_unless_resize_is_true(tmp_path, folders):
    write_folders(folders, root := tmp_path / "miniimagenet")
    large = root / "val" / "n04" / file_name("n04", 1)
    Image.fromarray(pixels("n04", 1, size=100)[:90]).save(large, quality=90)
    assert f"{large} is 100x90, not 84x84; set dataset.resize=true" in error_of(tmp_path, "val")
    with Image.open(large) as image:
        expected = np.asarray(image.resize((84, 84), Image.Resampling.LANCZOS))
    bank = load(tmp_path, "val", resize=True)
    assert np.array_equal(bank.images[IMAGES + 1].permute(1, 2, 0).numpy(), expected)


def test_a_damaged_file_is_named(tmp_path, folders):
    write_folders(folders, root := tmp_path / "miniimagenet")
    damaged = root / "train" / "n02" / file_name("n02", 1)
    damaged.write_bytes(damaged.read_bytes()[:200])
    assert f"{damaged} is not a readable image" in error_of(tmp_path)


def test_greyscale_and_palette_images_become_rgb(tmp_path, folders):
    write_folders(folders, root := tmp_path / "miniimagenet")
    Image.fromarray(pixels("n01", 0)).convert("L").save(root / "train" / "n01" / file_name("n01", 0))
    palette = Image.fromarray(pixels("n01", 1)).quantize(8)
    (root / "train" / "n01" / file_name("n01", 1)).unlink()
    palette.save(root / "train" / "n01" / f"{file_name('n01', 1)[:-4]}.png")
    images = load(tmp_path).images
    assert torch.equal(images[0, 0], images[0, 1])
    assert np.array_equal(images[1].permute(1, 2, 0).numpy(), np.asarray(palette.convert("RGB")))


def test_code_in_a_pickle_instead_of_an_image_is_not_run(tmp_path, folders):
    write_folders(folders, root := tmp_path / "miniimagenet")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 84 84\n%%EndComments\nshowpage\n"
    (root / "train" / "n01" / file_name("n01", 0)).write_bytes(postscript)
    assert "is not a readable image (cannot identify" in error_of(tmp_path)


def test_any_image_file_is_cropped_and_resized_like_the_data_sets_own(tmp_path):
    Image.fromarray(pixels("n04", 1, size=200)[:100]).save(tmp_path / "photo.bmp")
    image = MiniImageNet(tmp_path, resize=False).read(tmp_path / "photo.bmp")
    assert (image.shape, image.dtype) == ((3, 84, 84), torch.uint8)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("class_dict"), "class_dict"),
        (lambda c: c.update(image_data=c["image_data"][:, :50]), "not u1 (images, 84, 84, 3)"),
        (lambda c: c["class_dict"].pop("n02"), "lacks 1 of 2 classes: n02"),
        (lambda c: c["class_dict"].update(n01=[0, 1, 1]), "has 2 images, not 3"),
        (lambda c: c["class_dict"].update(n02=[0, 1, 999]), "999"),
        (lambda c: c.update(image_data=c["image_data"].tolist()), "not a pickle of miniImageNet"),
        (lambda c: c["class_dict"].update(n01=[4, 5, -1]), "negative row"),
        (lambda c: c["class_dict"].update(n01=c["class_dict"]["n02"]), "in two classes"),
        (lambda c: c["class_dict"].update(n01=[0.5, 1, 2]), "not a pickle of miniImageNet"),
        (lambda c: c["class_dict"].update(n01=None), "not a pickle of miniImageNet"),
    ],
)
def test_an_invalid_pickle_is_refused_in_one_line(tmp_path, folders, change, words):
    change(content := content_of(folders, "train"))
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(content))
    assert words in error_of(tmp_path)


# Each of two processes goes on only when both have unpacked the archive, and only when both have decoded the images.
PROGRAM = """
import multiprocessing, os, sys
from pathlib import Path
from metacv.data import bank, miniimagenet, sources
miniimagenet.IMAGES, miniimagenet.CLASSES = {images}, {classes}
barrier = multiprocessing.get_context("fork").Barrier(2)
extract, write = sources.extract, bank.write_atomically
sources.extract = lambda *arguments: (extract(*arguments), barrier.wait(60))
bank.write_atomically = lambda *arguments: (barrier.wait(60), write(*arguments))
child = os.fork()
print(miniimagenet.MiniImageNet(Path(sys.argv[1]), False).load("train").fingerprint, flush=True)
if child:
    sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_at_once_unpack_and_decode_the_same(tmp_path, folders):
    write_zip(folders, tmp_path / "miniimagenet")
    program = PROGRAM.format(images=IMAGES, classes=CLASSES)
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Both write to one pipe, so their lines may mix, but not the hashes: each is one write.
    assert "".join(done.stdout.split()) == load(tmp_path).fingerprint * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cache", "mini-imagenet.zip", "mini-imagenet.zip.unpacked",
    ]  # fmt: skip
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("size", [42, 28])
def test_a_smaller_size_takes_means_of_pixels_from_the_same_cache(tmp_path, folders, size):
    write_folders(folders, tmp_path / "miniimagenet")
    whole = load(tmp_path).images.permute(0, 2, 3, 1).double().numpy()
    small = MiniImageNet(tmp_path, resize=False, size=size)
    k = 84 // size
    means = np.round(whole.reshape(-1, size, k, size, k, 3).mean((2, 4))).astype(np.uint8)
    assert np.array_equal(small.load("train").images.permute(0, 2, 3, 1).numpy(), means)
    assert len([*(tmp_path / "cache").iterdir()]) == 1
    Image.fromarray(pixels("n04", 1)).save(tmp_path / "photo.png")
    expected = np.round(pixels("n04", 1).reshape(size, k, size, k, 3).mean((1, 3)))
    assert np.array_equal(small.read(tmp_path / "photo.png").permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("size", [5, 83])
def test_a_size_that_does_not_divide_84_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=f"size={size}: must be 84, or 84 divided by a whole number"):
        MiniImageNet(tmp_path, resize=False, size=size)
