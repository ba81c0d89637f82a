"""miniImageNet in every form that people have it in, from a small made-up set: 3 classes a split, 4 images each."""

import io
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
from conftest import TRAIN
from PIL import Image

from metacv import MetacvError
from metacv.data import miniimagenet
from metacv.data.bank import SPLITS
from metacv.data.miniimagenet import MiniImageNet

IMAGES = 4
CLASSES = {"train": ["n02", "n01", "n03"], "val": ["n06", "n04", "n05"], "test": ["n07", "n09", "n08"]}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(miniimagenet, "CLASSES", CLASSES)
    monkeypatch.setattr(miniimagenet, "IMAGES", IMAGES)


def pixels(name: str, image: int, size: int = 84) -> np.ndarray:
    """Smooth colours of the class, with a block that moves from image to image."""
    seed = int(name[1:])
    y, x = np.mgrid[:size, :size] / size
    picture = np.stack([(seed * 37 + 90 * y) % 256, (seed * 71 + 60 * x) % 256, (seed * 13 + 40 * x * y) % 256], -1)
    picture[10 * image : 10 * image + 20, 5:30] = 255 - 20 * seed
    return picture.astype(np.uint8)


def jpeg(name: str, image: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(name, image)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def file_name(name: str, image: int) -> str:
    return f"{name}{image:08d}.jpg"


def as_folders(root: Path) -> None:
    for split, names in CLASSES.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            for image in range(IMAGES):
                (root / split / name / file_name(name, image)).write_bytes(jpeg(name, image))


def as_lists(root: Path) -> None:
    (root / "images").mkdir(parents=True)
    for split, names in CLASSES.items():
        lines = [f"{file_name(name, image)},{name}" for image in reversed(range(IMAGES)) for name in names]
        (root / f"{split}.csv").write_text("\n".join(["filename,label", *lines]))
        for name in names:
            for image in range(IMAGES):
                (root / "images" / file_name(name, image)).write_bytes(jpeg(name, image))


def arrays(split: str) -> dict:
    """As in the pickles that go around: images one class after another, and where each class is."""
    decoded = [np.asarray(Image.open(io.BytesIO(jpeg(n, i)))) for n in CLASSES[split] for i in range(IMAGES)]
    rows = {n: list(range(IMAGES * c, IMAGES * (c + 1))) for c, n in enumerate(CLASSES[split])}
    return {"image_data": np.stack(decoded), "class_dict": rows}


def as_pickles(root: Path, protocol: int = 4) -> None:
    root.mkdir(parents=True)
    for split in SPLITS:
        content = pickle.dumps(arrays(split), protocol=protocol)
        (root / f"mini-imagenet-cache-{split}.pkl").write_bytes(content)


def zipped(root: Path, form=as_folders) -> None:
    form(root.parent / "loose" / "miniImagenet")
    with zipfile.ZipFile(root.parent / "mini-imagenet.zip", "w") as archive:
        for path in (root.parent / "loose").rglob("*"):
            archive.write(path, path.relative_to(root.parent / "loose"))
    shutil.rmtree(root.parent / "loose")


def tarred(root: Path, form=as_lists) -> None:
    form(root.parent / "loose")
    root.mkdir()
    with tarfile.open(root / "all.tar.gz", "w:gz") as archive:
        archive.add(root.parent / "loose", ".")
    shutil.rmtree(root.parent / "loose")


def a_tar_for_each_split(root: Path) -> None:
    as_folders(root.parent / "loose")
    root.mkdir()
    for split in SPLITS:
        with tarfile.open(root / f"{split}.tar.xz", "w:xz") as archive:
            archive.add(root.parent / "loose" / split, split)
    shutil.rmtree(root.parent / "loose")


FORMS = {
    "folders": as_folders,
    "lists": as_lists,
    "pickles": as_pickles,
    "python 2 pickles": lambda root: as_pickles(root, protocol=2),
    "newest pickles": lambda root: as_pickles(root, protocol=5),
    "zip of folders": zipped,
    "zip of pickles": lambda root: zipped(root, as_pickles),
    "tar of lists": tarred,
    "a tar for each split": a_tar_for_each_split,
}


def banks(data_dir: Path, **settings) -> dict:
    dataset = MiniImageNet(data_dir, **({"resize": False} | settings))
    return {split: dataset.load(split) for split in SPLITS}


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("expected")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniimagenet, "CLASSES", CLASSES)
        patch.setattr(miniimagenet, "IMAGES", IMAGES)
        as_folders(folder / "miniimagenet")
        return {split: bank.fingerprint for split, bank in banks(folder).items()}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_bank(tmp_path, form, expected):
    FORMS[form](tmp_path / "miniimagenet")
    found = banks(tmp_path)
    assert {split: bank.fingerprint for split, bank in found.items()} == expected
    for split, bank in found.items():
        assert bank.class_names == tuple(sorted(CLASSES[split]))
        assert bank.images.shape == (3 * IMAGES, 3, 84, 84)
        assert bank.sizes.tolist() == [IMAGES] * 3
        assert bank.name == f"miniimagenet {split}"


@pytest.mark.parametrize("folder", ["mini-imagenet", "MiniImageNet", "miniimagenet/mini_imagenet", "."])
def test_the_folder_is_found_under_the_names_that_people_give_it(tmp_path, folder, expected):
    as_folders(tmp_path / folder)
    assert banks(tmp_path)["val"].fingerprint == expected["val"]


def test_images_are_those_of_the_files(tmp_path):
    as_folders(tmp_path / "miniimagenet")
    bank = banks(tmp_path)["train"]
    for c, name in enumerate(["n01", "n02", "n03"]):
        for i in range(IMAGES):
            with Image.open(io.BytesIO(jpeg(name, i))) as image:
                assert np.array_equal(bank.images[c * IMAGES + i].permute(1, 2, 0).numpy(), np.asarray(image))


def test_the_cache_is_enough_without_the_files(tmp_path, expected):
    as_folders(tmp_path / "miniimagenet")
    banks(tmp_path)
    shutil.rmtree(tmp_path / "miniimagenet")
    assert {split: bank.fingerprint for split, bank in banks(tmp_path).items()} == expected


def test_the_cached_bank_stays_in_its_file(tmp_path):
    """So that two runs share its memory."""
    as_folders(tmp_path / "miniimagenet")
    banks(tmp_path)
    images = banks(tmp_path)["train"].images
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("what is mapped is only told on Linux")
    address = images.data_ptr()
    (line,) = [
        line for line in maps.read_text().splitlines()
        if int(line.split("-")[0], 16) <= address < int(line.split(" ")[0].split("-")[1], 16)
    ]  # fmt: skip
    assert "miniimagenet-train" in line


def fails(data_dir: Path, split: str = "train", **settings) -> str:
    with pytest.raises(MetacvError) as caught:
        MiniImageNet(data_dir, **({"resize": False} | settings)).load(split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_the_data_it_says_what_to_put_where(tmp_path):
    message = fails(tmp_path)
    for words in (
        str(tmp_path / "miniimagenet"),
        "train/, val/ and test/",
        "train.csv",
        "cache-train.pkl",
        "zip or tar",
    ):
        assert words in message


def test_missing_and_other_classes_and_images_are_named(tmp_path):
    as_folders(root := tmp_path / "miniimagenet")
    (root / "val" / "n04").rename(root / "train" / "n04")
    assert "the val split lacks 1 of 3 classes: n04" in fails(tmp_path, "val")
    assert "not among its classes: n04" in fails(tmp_path, "train")
    (root / "test" / "n08" / file_name("n08", 0)).unlink()
    assert "n08 of the test split has 3 images, not 4" in fails(tmp_path, "test")


def test_a_listed_image_that_is_not_there_is_named(tmp_path):
    as_lists(root := tmp_path / "miniimagenet")
    (root / "images" / file_name("n01", 2)).unlink()
    assert file_name("n01", 2) in fails(tmp_path)


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "", "filename,label\nn01.jpg\n", "\x00\xff"])
def test_a_list_that_is_none_is_refused(tmp_path, content):
    as_lists(root := tmp_path / "miniimagenet")
    (root / "train.csv").write_bytes(content.encode("latin1"))
    assert str(root) in fails(tmp_path)


def test_a_corrupt_image_and_one_of_another_size_are_named(tmp_path):
    as_folders(root := tmp_path / "miniimagenet")
    corrupt = root / "train" / "n02" / file_name("n02", 1)
    corrupt.write_bytes(corrupt.read_bytes()[:200])
    assert f"{corrupt} is not a readable image" in fails(tmp_path)
    large = root / "val" / "n04" / file_name("n04", 1)
    Image.fromarray(pixels("n04", 1, size=100)).save(large)
    assert f"{large} is not a readable image (100x100 instead of 84x84" in fails(tmp_path, "val")
    assert MiniImageNet(tmp_path, resize=True).load("val").image_shape == (3, 84, 84)


def test_grey_images_and_those_with_a_palette_become_colour(tmp_path):
    as_folders(root := tmp_path / "miniimagenet")
    Image.fromarray(pixels("n01", 0)).convert("L").save(root / "train" / "n01" / file_name("n01", 0))
    found = banks(tmp_path)["train"].images[0]
    assert torch.equal(found[0], found[1])


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class EvilNumpy:
    def __reduce__(self):
        return (np.save, ("saved", np.zeros(1)))


def test_a_pickle_can_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (root := tmp_path / "miniimagenet").mkdir()
    for evil in (Evil(tmp_path / "ran"), EvilNumpy()):
        content = arrays("train") | {"class_dict": evil}
        (root / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(content))
        assert "which images do not need" in fails(tmp_path)
        assert not list(tmp_path.rglob("ran"))
        assert not list(tmp_path.rglob("saved*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("class_dict"), "class_dict"),
        (lambda c: c.update(image_data=c["image_data"][:, :50]), "not uint8 (84, 84, 3)"),
        (lambda c: c.update(image_data=c["image_data"].astype(float)), "not uint8 (84, 84, 3)"),
        (lambda c: c["class_dict"].pop("n02"), "lacks 1 of 3 classes: n02"),
        (lambda c: c["class_dict"].update(n01=[0, 1, 2, 2]), "has 3 images, not 4"),
        (lambda c: c["class_dict"].update(n02=[0, 1, 2, 999]), "999"),
        (lambda c: c["class_dict"].update(n01=[4, 5, 6, -1]), "before the first"),
        (lambda c: c["class_dict"].update(n01=c["class_dict"]["n02"]), "in two classes"),
        (lambda c: c["class_dict"].update(n01=[0.5, 1, 2, 3]), "not a pickle of miniImageNet"),
        (lambda c: c["class_dict"].update(n01=None), "not a pickle of miniImageNet"),
    ],
)
def test_a_bad_pickle_is_refused_in_one_line(tmp_path, change, words):
    (root := tmp_path / "miniimagenet").mkdir()
    change(content := arrays("train"))
    (root / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(content))
    assert words in fails(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps(None)])
def test_what_is_no_pickle_is_refused_in_one_line(tmp_path, content):
    (root := tmp_path / "miniimagenet").mkdir()
    (root / "mini-imagenet-cache-train.pkl").write_bytes(content)
    assert "not a pickle of miniImageNet" in fails(tmp_path)


def test_an_archive_cannot_write_outside_its_folder(tmp_path):
    (data_dir := tmp_path / "data").mkdir()
    for name in ("../outside.txt", str(tmp_path / "outside.txt")):
        with zipfile.ZipFile(data_dir / "miniimagenet.zip", "w") as archive:
            archive.writestr(name, "x")
        assert "would lie outside its folder" in fails(data_dir)
    (data_dir / "miniimagenet.zip").unlink()
    with tarfile.open(data_dir / "miniimagenet.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("../outside.txt"))
    assert "outside" in fails(data_dir)
    with tarfile.open(data_dir / "miniimagenet.tar", "w") as tar:
        link = tarfile.TarInfo("train")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
    assert "cannot be unpacked" in fails(data_dir)
    assert not (tmp_path / "outside.txt").exists()
    assert sorted(path.name for path in data_dir.iterdir()) == ["miniimagenet.tar"]


def test_a_damaged_archive_leaves_nothing_behind(tmp_path):
    tarred(tmp_path / "miniimagenet")
    archive = tmp_path / "miniimagenet" / "all.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-2000])
    assert f"{archive} cannot be unpacked" in fails(tmp_path)
    assert [path.name for path in archive.parent.iterdir()] == ["all.tar.gz"]


def test_two_runs_at_once_unpack_and_decode_the_same(tmp_path, expected):
    zipped(tmp_path / "miniimagenet")
    program = (
        "import sys; from pathlib import Path; from metacv.data import miniimagenet as m; "
        f"m.IMAGES, m.CLASSES = {IMAGES}, {CLASSES}; "
        "print(m.MiniImageNet(Path(sys.argv[1]), False).load('train').fingerprint)"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [run.communicate()[0].strip() for run in both] == [expected["train"]] * 2


def test_training_and_evaluating_in_colour(metacv, tmp_path, monkeypatch):
    as_folders(tmp_path / "miniimagenet")
    monkeypatch.setenv("METACV_DATA_DIR", str(tmp_path))
    settings = [word for word in TRAIN if not word.startswith("dataset.")]
    code, out, err = metacv(
        "train", "algo=protonet", "dataset=miniimagenet", *settings, "way=3", "query=2", "hydra.run.dir=run"
    )
    assert (code, err) == (0, "")
    code, out, err = metacv("evaluate", "checkpoint=run", "episodes=5")
    assert code == 0
    assert "MiniImageNet test" in out
