"""Forms of published data sets: class folders, CSV lists, pickles and archives of a toy data set of 4x4 pixels."""

import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metacv.data import sources
from metacv.data.bank import SPLITS, ImageBank
from metacv.data.image_files import as_tensor, open_exactly
from metacv.data.sources import PickledArray, Source, SplitSpec, extract, integers, read_pickle, unpack
from metacv.errors import UserError

CLASSES = {"train": ["bee", "ant", "cat"], "val": ["elk", "dog"], "test": ["fox", "gnu"]}


def pixels(name: str, image: int) -> np.ndarray:
    return np.full((4, 4, 3), 20 * (ord(name[0]) - ord("a")) + image, np.uint8)


def write_image(path: Path, name: str, image: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(name, image)).save(path)


def write_folders(root: Path) -> None:
    for split, names in CLASSES.items():
        for name in names:
            for image in range(2):
                write_image(root / split / name / f"{image}.png", name, image)


def write_lists(root: Path) -> None:
    for split, names in CLASSES.items():
        (root / "images").mkdir(parents=True, exist_ok=True)
        lines = [f"{name}{image}.png,{name}" for image in (1, 0) for name in names]
        (root / f"{split}.csv").write_text("\n".join(["filename,label", *lines]))
        for name in names:
            for image in range(2):
                write_image(root / "images" / f"{name}{image}.png", name, image)


def read(path: Path) -> torch.Tensor:
    return as_tensor(open_exactly(path, ("PNG",), "RGB"))


def read_content(content, path: Path, split: str) -> ImageBank:
    images = content["data"].tensor(4, 4, 3).permute(0, 3, 1, 2)
    labels = integers(content["labels"])
    return ImageBank("toy", images, torch.tensor([0, len(labels)]), ("all",))


def source(images: int | None = 2, classes=CLASSES) -> Source:
    return Source(
        "Toy", "toyset100", "download it from https://toy.example", SplitSpec(classes, images), read, (3, 4, 4),
        "toy_{}.pickle", read_content,
    )  # fmt: skip


def error_of(data_dir: Path, split: str = "train", **changes) -> str:
    with pytest.raises(UserError) as caught:
        source(**changes).load(data_dir, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("write", [write_folders, write_lists])
def test_class_folders_and_lists_give_images_sorted_by_class_and_file(tmp_path, write):
    write(tmp_path / "toyset100")
    bank = source().load(tmp_path, "train")
    assert bank.class_names == ("ant", "bee", "cat")
    assert bank.offsets.tolist() == [0, 2, 4, 6]
    expected = np.stack([pixels(name, image) for name in ("ant", "bee", "cat") for image in range(2)])
    assert np.array_equal(bank.images.permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize("folder", ["toy-set100", "ToySet_100", "toyset100/data/toy_set_100", "."])
def test_the_folder_is_found_under_several_names(tmp_path, folder):
    write_folders(tmp_path / folder)
    assert len(source().load(tmp_path, "val").images) == 4


def test_folders_of_another_data_set_are_not_taken(tmp_path):
    (tmp_path / "train" / "zebra").mkdir(parents=True)
    write_folders(tmp_path / "toyset100")
    assert len(source().load(tmp_path, "train").images) == 6


def test_without_a_number_of_images_classes_may_differ_in_size(tmp_path):
    write_folders(tmp_path)
    write_image(tmp_path / "val/dog/2.png", "dog", 2)
    assert source(images=None).load(tmp_path, "val").sizes.tolist() == [3, 2]
    shutil.rmtree(tmp_path / "val/elk")
    (tmp_path / "val/elk").mkdir()
    assert "elk of the val split has 0 images, not at least 1" in error_of(tmp_path, "val", images=None)


def test_missing_data_are_reported_with_all_forms(tmp_path):
    message = error_of(tmp_path)
    for words in (
        f"data_dir={tmp_path}: the train split of Toy is missing (download it from https://toy.example)",
        f"Put into {tmp_path / 'toyset100'} one of",
        "toy_train.pickle, toy_val.pickle, toy_test.pickle",
        "train/, val/ and test/ with a folder of images for each class",
        "images/ with train.csv, val.csv and test.csv",
        "zip or tar archive",
    ):
        assert words in message
    assert "Found" not in message


def test_incomplete_forms_are_reported(tmp_path):
    root = tmp_path / "toyset100"
    write_lists(root)
    (root / "train.csv").unlink()
    (root / "val.csv").unlink()
    (root / "val/birds").mkdir(parents=True)
    (root / "lists").mkdir()
    (root / "test.csv").rename(root / "lists/test.csv")
    assert f"Found: {root}/images without train.csv beside it" in error_of(tmp_path, "train")
    assert f"Found: {root}/val without a folder named elk, dog, ...; {root}/images" in error_of(tmp_path, "val")
    assert f"{root}/lists/test.csv without images/ beside it" in error_of(tmp_path, "test")


def test_missing_classes_and_classes_of_another_split_are_named(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "val/dog").rename(tmp_path / "train/dog")
    assert "the val split lacks 1 of 2 classes: dog" in error_of(tmp_path, "val")
    assert "the train split has classes that do not belong to it: dog" in error_of(tmp_path, "train")


def test_a_class_with_too_few_images_is_named(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "test/fox/0.png").unlink()
    assert "fox of the test split has 1 images, not 2" in error_of(tmp_path, "test")


def test_a_listed_image_that_is_missing_is_named(tmp_path):
    write_lists(tmp_path)
    (tmp_path / "images/ant1.png").unlink()
    assert f"{tmp_path}/images/ant1.png is not a readable image" in error_of(tmp_path)


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path):
    write_lists(tmp_path)
    table = tmp_path / "train.csv"
    table.write_text(table.read_text(), encoding="utf-8-sig")
    assert len(source().load(tmp_path, "train").images) == 6


def test_a_list_with_an_image_twice_is_refused(tmp_path):
    write_lists(tmp_path)
    table = tmp_path / "train.csv"
    table.write_text(table.read_text().replace("ant0", "ant1"))
    assert "lists ant1.png more than once" in error_of(tmp_path)


def test_a_list_cannot_name_files_outside_of_its_folder(tmp_path):
    write_lists(tmp_path / "toyset100")
    write_image(tmp_path / "ant0.png", "ant", 9)
    table = tmp_path / "toyset100/train.csv"
    table.write_text(table.read_text().replace("ant0", "../../ant0"))
    assert int(source().load(tmp_path, "train").images[0, 0, 0, 0]) == 0


@pytest.mark.parametrize(
    "content", ["a,b\n1,2\n", "", "filename,label\nant0.png,\n", "filename,label\nant.png\n", "\x00\xff"]
)
def test_a_file_that_is_no_list_is_refused(tmp_path, content):
    write_lists(tmp_path)
    (tmp_path / "train.csv").write_bytes(content.encode("latin1"))
    assert str(tmp_path) in error_of(tmp_path)


# Archives


def zip_of(folder: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path in folder.rglob("*"):
            zipped.write(path, path.relative_to(folder))


def tar_of(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, f"w:{archive.suffix[1:]}".replace(":tar", ":")) as tar:
        tar.add(folder, ".")


@pytest.fixture(scope="session")
def archives(tmp_path_factory) -> dict[str, Path]:
    """Archives of the toy data set by suffix. A file of noise makes them long enough to damage the middle."""
    folder = tmp_path_factory.mktemp("toy_archives")
    write_folders(folder / "content")
    (folder / "content/noise").write_bytes(np.random.default_rng(0).bytes(20_000))
    paths = {suffix: folder / f"toyset100.{suffix}" for suffix in ("zip", "tar", "tar.gz", "tar.bz2", "tar.xz")}
    for suffix, path in paths.items():
        (zip_of if suffix == "zip" else tar_of)(folder / "content", path)
    return paths


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("place", [".", "toyset100"])
def test_archives_are_unpacked_beside_themselves(tmp_path, archives, suffix, place):
    (tmp_path / place).mkdir(exist_ok=True)
    shutil.copy(archives[suffix], tmp_path / place / f"ToySet-100.{suffix}")
    assert len(source().load(tmp_path, "train").images) == 6
    names = {path.name for path in (tmp_path / place).iterdir()}
    assert names == {f"ToySet-100.{suffix}", f"ToySet-100.{suffix}.unpacked"}


def test_an_archive_is_unpacked_once(tmp_path, archives, capsys):
    shutil.copy(archives["zip"], tmp_path / "toyset100.zip")
    folder = unpack(tmp_path / "toyset100.zip")
    assert capsys.readouterr().err == f"metacv: unpacking {tmp_path}/toyset100.zip into {folder}\n"
    (folder / "mark").touch()
    assert unpack(tmp_path / "toyset100.zip") == folder
    assert (folder / "mark").exists()
    assert capsys.readouterr().err == ""


def test_an_archive_that_another_program_unpacks_meanwhile_is_complete(tmp_path, archives, monkeypatch):
    shutil.copy(archives["zip"], archive := tmp_path / "toyset100.zip")

    def extract_second(archive: Path, folder: Path) -> None:
        extract(archive, folder)
        (target := tmp_path / "toyset100.zip.unpacked").mkdir()  # by the other program, which is done first
        extract(archive, target)
        (target / "mark").touch()

    monkeypatch.setattr(sources, "extract", extract_second)
    assert (unpack(archive) / "mark").exists()
    assert len(list(tmp_path.iterdir())) == 2  # nothing temporary


def test_a_killed_program_leaves_no_incomplete_folder(tmp_path, archives, monkeypatch):
    shutil.copy(archives["zip"], archive := tmp_path / "toyset100.zip")

    def interrupted(archive: Path, folder: Path) -> None:
        extract(archive, folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sources, "extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unpack(archive)
    assert list(tmp_path.iterdir()) == [archive]
    assert len(source().load(tmp_path, "train").images) == 6


def test_an_archive_for_each_split_is_found(tmp_path):
    write_folders(tmp_path / "content")
    (tmp_path / "toyset100").mkdir()
    for split in SPLITS:
        with tarfile.open(tmp_path / "toyset100" / f"{split}.tar.xz", "w:xz") as tar:
            tar.add(tmp_path / "content" / split, split)
    shutil.rmtree(tmp_path / "content")
    assert [len(source().load(tmp_path, split).images) for split in SPLITS] == [6, 4, 4]


def test_an_intact_archive_is_used_beside_a_damaged_one(tmp_path, archives):
    shutil.copy(archives["zip"], tmp_path / "toyset100.zip")
    (tmp_path / "._toyset100.zip").write_bytes(b"of macOS")
    (tmp_path / "a-toyset100.tar").write_bytes(b"damaged")
    assert len(source().load(tmp_path, "train").images) == 6


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "other"])
@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_damaged_archive_is_named_and_leaves_nothing_behind(tmp_path, archives, suffix, damage):
    content = bytearray(archives[suffix].read_bytes())
    middle = len(content) // 2
    if damage == "cut":
        del content[middle:]
    elif damage == "changed":
        content[middle : middle + 500] = bytes(255 - byte for byte in content[middle : middle + 500])
    else:
        content = bytearray(b"" if damage == "empty" else b"something else\n" * 100)
    archive = tmp_path / f"toyset100.{suffix}"
    archive.write_bytes(content)
    assert error_of(tmp_path).startswith(f"{archive} cannot be unpacked (")
    assert list(tmp_path.iterdir()) == [archive]


def test_a_tar_archive_with_a_damaged_header_is_refused(tmp_path, archives):
    content = bytearray(archives["tar"].read_bytes())
    with tarfile.open(archives["tar"]) as tar:
        header = tar.getmembers()[5].offset
    content[header] ^= 1
    (tmp_path / "toyset100.tar").write_bytes(content)
    assert "damaged" in error_of(tmp_path)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_an_archive_cannot_write_outside_of_its_folder(tmp_path, suffix, absolute):
    name = str(tmp_path / "outside.txt") if absolute else "../outside.txt"
    archive = tmp_path / f"a.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            zipped.writestr(name, "x")
    else:
        with tarfile.open(archive, "w") as tar:
            tar.addfile(tarfile.TarInfo(name))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="would be written outside of the folder"):
        extract(archive, tmp_path / "folder")
    with pytest.raises(UserError, match="would be written outside of the folder"):
        unpack(archive)
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive.name, "folder"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_an_archive_with_links_or_devices_is_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "toyset100.tar", "w") as tar:
        link = tarfile.TarInfo("train")
        link.type, link.linkname = kind, str(tmp_path)
        tar.addfile(link)
    assert "train is neither a file nor a folder" in error_of(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["toyset100.tar"]


# Pickles


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_and_arrays_are_read_from_pickles_of_every_protocol(tmp_path, protocol):
    array = np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)
    content = {"data": array, "labels": np.array([3, -1]), "names": ["a", b"\xff", None, 1.5], "one": np.int64(7)}
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = read_pickle(tmp_path / "a.pickle")
    assert np.array_equal(loaded["data"].tensor(4, 4, 3).numpy(), array)
    assert integers(loaded["labels"]) == [3, -1]
    assert (loaded["names"], loaded["one"]) == (["a", b"\xff", None, 1.5], 7)


def test_a_pickle_is_read_by_the_function_of_its_data_set(tmp_path):
    content = {"data": np.zeros((2, 4, 4, 3), np.uint8), "labels": [0, 1]}
    (tmp_path / "toy_train.pickle").write_bytes(pickle.dumps(content))
    assert source().load(tmp_path, "train").images.shape == (2, 3, 4, 4)


class RunsCode:
    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_pickle_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (RunsCode(Path.touch, tmp_path / "ran"), RunsCode(np.save, "saved", np.zeros(1))):
        (tmp_path / "toy_train.pickle").write_bytes(pickle.dumps({"data": call}))
        assert "which images do not need" in error_of(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["toy_train.pickle"]


# A pickle that makes numpy build an array of objects whose addresses are the bytes A...A. The state of the dtype is
# (3, "|", None, ("a",), {"a": (dtype("O"), 0)}, 8, 1, 0).
FORGED = (
    b"(dVdata\ncnumpy.core.numeric\n_frombuffer\n(C\x08AAAAAAAAcnumpy\ndtype\n(VV8\nI00\nI01\ntR"
    b"(I3\nV|\nN(Va\nt(dVa\n(cnumpy\ndtype\n(VO\nI00\nI01\ntRI0\ntsI8\nI1\nI0\ntb(I1\ntVC\ntRs."
)


def test_a_forged_array_is_read_as_plain_bytes(tmp_path):
    """numpy would take the bytes for addresses, and crash."""
    (tmp_path / "toy_train.pickle").write_bytes(FORGED)
    array = read_pickle(tmp_path / "toy_train.pickle")["data"]
    assert isinstance(array, PickledArray)
    assert array.raw == b"AAAAAAAA"
    assert "is not a pickle of Toy" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (np.zeros((2, 4, 5, 3), np.uint8), r"an array is u1 (2, 4, 5, 3), not u1 (images, 4, 4, 3)"),
        (np.zeros((2, 4, 4, 3)), "an array is f8 (2, 4, 4, 3), not u1 (images, 4, 4, 3)"),
        (np.zeros((2, 4, 4, 3), ">i4"), "byte order >"),
        (np.asfortranarray(np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3)), "not u1"),
        ([[0]], "is not a pickle of Toy"),
    ],
)
def test_an_array_of_another_type_or_shape_is_refused(tmp_path, data, reason):
    (tmp_path / "toy_train.pickle").write_bytes(pickle.dumps({"data": data, "labels": [0, 1]}))
    assert reason in error_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps(None)])
def test_a_file_that_is_no_pickle_of_the_data_set_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "toy_train.pickle").write_bytes(content)
    assert "is not a pickle of Toy" in error_of(tmp_path)


@pytest.mark.parametrize("values", [[0.5, 1], None, PickledArray(None, (1,), b"\0")])
def test_only_integers_are_taken_for_rows(values):
    with pytest.raises((TypeError, KeyError)):
        integers(values)
