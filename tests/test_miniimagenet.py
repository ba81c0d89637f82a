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

from metacv import MetacvError, checkpoint
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


def test_without_the_data_it_names_what_is_almost_there(tmp_path):
    as_lists(tmp_path / "miniimagenet")
    for name in ("train.csv", "val.csv"):
        (tmp_path / "miniimagenet" / name).unlink()
    (tmp_path / "miniimagenet/val/birds").mkdir(parents=True)
    (tmp_path / "miniimagenet/lists").mkdir()
    (tmp_path / "miniimagenet/test.csv").rename(tmp_path / "miniimagenet/lists/test.csv")
    folder = tmp_path / "miniimagenet"
    for split, found in {
        "train": f"{folder / 'images'} without train.csv beside it",
        "val": f"{folder / 'val'} without a folder named n06, n04, ...",
        "test": f"{folder / 'lists/test.csv'} without images/ beside it",
    }.items():
        with pytest.raises(MetacvError, match="no official download") as error:
            MiniImageNet(tmp_path, resize=False).load(split)
        assert f"What is there: {folder / 'images'}" in str(error.value)
        assert found in str(error.value)


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


def test_a_list_may_begin_with_a_mark_and_may_not_name_an_image_twice(tmp_path, expected):
    as_lists(root := tmp_path / "miniimagenet")
    table = root / "train.csv"
    table.write_text(table.read_text(), encoding="utf-8-sig")
    assert banks(tmp_path)["train"].fingerprint == expected["train"]
    shutil.rmtree(tmp_path / "cache")
    twice = table.read_text().replace(file_name("n01", 0), file_name("n01", 1))
    table.write_text(twice)
    assert f"lists {file_name('n01', 1)} more than once" in fails(tmp_path)


@pytest.mark.parametrize(
    "content", ["a,b\n1,2\n", "", "filename,label\nn0100000000.jpg,\n", "filename,label\nn01.jpg\n", "\x00\xff"]
)
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
    assert f"{large} is 100x100, not 84x84" in fails(tmp_path, "val")
    assert MiniImageNet(tmp_path, resize=True).load("val").image_shape == (3, 84, 84)


def test_grey_images_and_those_with_a_palette_become_colour(tmp_path):
    as_folders(root := tmp_path / "miniimagenet")
    grey = Image.fromarray(pixels("n01", 0)).convert("L")
    grey.save(root / "train" / "n01" / file_name("n01", 0))
    palette = Image.fromarray(pixels("n01", 1)).quantize(8)
    (root / "train" / "n01" / file_name("n01", 1)).unlink()
    palette.save(root / "train" / "n01" / f"{file_name('n01', 1)[:-4]}.png")
    found = banks(tmp_path)["train"].images
    assert torch.equal(found[0, 0], found[0, 1])
    assert np.array_equal(found[1].permute(1, 2, 0).numpy(), np.asarray(palette.convert("RGB")))


def test_a_program_in_the_place_of_an_image_is_not_run(tmp_path):
    as_folders(root := tmp_path / "miniimagenet")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 84 84\n%%EndComments\nshowpage\n"
    (root / "train" / "n01" / file_name("n01", 0)).write_bytes(postscript)
    assert "is not a readable image (cannot identify" in fails(tmp_path)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class EvilNumpy:
    def __reduce__(self):
        return (np.save, ("saved", np.zeros(1)))


# An array of numpy's own that says of eight bytes that they are the address of an object: dtype's state is (3, "|",
# None, ("a",), {"a": (dtype("O"), 0)}, 8, 1, 0).
FORGED = (
    b"(dVclass_dict\n(dVn01\ncnumpy.core.numeric\n_frombuffer\n(C\x08AAAAAAAAcnumpy\ndtype\n(VV8\nI00\nI01\ntR"
    b"(I3\nV|\nN(Va\nt(dVa\n(cnumpy\ndtype\n(VO\nI00\nI01\ntRI0\ntsI8\nI1\nI0\ntb(I1\ntVC\ntRss."
)


def test_a_forged_array_is_refused_and_nothing_reads_through_it(tmp_path):
    (root := tmp_path / "miniimagenet").mkdir()
    (root / "mini-imagenet-cache-train.pkl").write_bytes(FORGED)
    program = (
        "import sys; from pathlib import Path; from metacv.data.miniimagenet import MiniImageNet as m; "
        "m(Path(sys.argv[1]), False).load('train')"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is not a pickle of miniImageNet" in done.stderr.splitlines()[-1]


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
        (lambda c: c.update(image_data=c["image_data"][:, :50]), "not u1 (images, 84, 84, 3)"),
        (lambda c: c.update(image_data=c["image_data"].astype(float)), "not u1 (images, 84, 84, 3)"),
        (lambda c: c["class_dict"].pop("n02"), "lacks 1 of 3 classes: n02"),
        (lambda c: c["class_dict"].update(n01=[0, 1, 2, 2]), "has 3 images, not 4"),
        (lambda c: c["class_dict"].update(n02=[0, 1, 2, 999]), "999"),
        (lambda c: c.update(image_data=c["image_data"].astype(">i4")), "byte order >"),
        (lambda c: c.update(image_data=np.asfortranarray(c["image_data"])), "not u1"),
        (lambda c: c.update(image_data=c["image_data"].tolist()), "not a pickle of miniImageNet"),
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
    for name in ("../outside.txt", str(tmp_path / "outside.txt")):
        with tarfile.open(data_dir / "miniimagenet.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo(name))
        assert "would lie outside its folder" in fails(data_dir)
    with tarfile.open(data_dir / "miniimagenet.tar", "w") as tar:
        link = tarfile.TarInfo("train")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        tar.addfile(link)
    assert "train is neither a file nor a folder" in fails(data_dir)
    assert not (tmp_path / "outside.txt").exists()
    assert sorted(path.name for path in data_dir.iterdir()) == ["miniimagenet.tar"]


def packed(path: Path) -> None:
    """A zip or tar of all folders."""
    as_folders(path.parent / "loose")
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped_:
            for file in (path.parent / "loose").rglob("*.jpg"):
                zipped_.write(file, file.relative_to(path.parent / "loose"))
    else:
        with tarfile.open(path, f"w:{path.suffix[1:]}") as tar:
            tar.add(path.parent / "loose", ".")
    shutil.rmtree(path.parent / "loose")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
@pytest.mark.parametrize(
    "name", ["miniimagenet.zip", "miniimagenet.tar.gz", "miniimagenet.tar.bz2", "miniimagenet.tar.xz"]
)
def test_a_damaged_archive_is_named_and_leaves_nothing_behind(tmp_path, name, damage):
    packed(archive := tmp_path / name)
    content = bytearray(archive.read_bytes())
    middle = len(content) // 2
    if damage == "cut":
        del content[middle:]
    elif damage == "flipped":
        content[middle : middle + 500] = bytes(255 - byte for byte in content[middle : middle + 500])
    else:
        content = bytearray(b"" if damage == "empty" else b"something else\n" * 100)
    archive.write_bytes(content)
    assert f"{archive} cannot be unpacked" in fails(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_else_lies_around_does_not_hide_the_data(tmp_path, expected):
    """Another data set's folders, a Mac's file beside the archive, and an archive that is damaged."""
    packed(tmp_path / "miniimagenet.zip")
    (tmp_path / "train" / "n99").mkdir(parents=True)
    (tmp_path / "._miniimagenet.zip").write_bytes(b"Mac")
    (tmp_path / "a-miniimagenet.tar").write_bytes(b"damaged")
    assert banks(tmp_path)["train"].fingerprint == expected["train"]


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
    assert [run.returncode for run in both] == [0, 0]


def test_training_and_evaluating_in_colour(metacv, tmp_path, monkeypatch):
    as_folders(tmp_path / "miniimagenet")
    monkeypatch.setenv("METACV_DATA_DIR", str(tmp_path))
    settings = ["algo=protonet", "dataset=miniimagenet", "way=3", "query=2", "augment.flip=true", "augment.jitter=0.3"]
    settings += [word for word in TRAIN if not word.startswith(("dataset.", "query="))] + [
        "normalize.std=[0.2,0.3,0.4]"
    ]
    code, out, err = metacv("train", *settings, "hydra.run.dir=whole")
    assert (code, err) == (0, "")
    metacv("train", *settings, "steps=2", "hydra.run.dir=parts")
    code, out, err = metacv("train", "resume=parts", "steps=4")
    assert (code, err) == (0, "")
    one, other = (checkpoint.load(Path(run) / "best.pt")["algorithm"] for run in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    code, out, err = metacv("evaluate", "checkpoint=whole", "episodes=5")
    assert code == 0
    assert "MiniImageNet test" in out
    saved = checkpoint.load(Path("whole/best.pt"))
    assert saved["config"]["normalize"] == {"mean": [0.0], "std": [0.2, 0.3, 0.4]}
    code, out, err = metacv("train", "-m", *settings, "steps=1", "seed=0,1", "hydra.sweep.dir=sweep")
    assert code == 0
    assert len(list(Path("sweep").glob("*/best.pt"))) == 2

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events := EventAccumulator("whole", {"images": 0})).Reload()
    with Image.open(io.BytesIO(events.Images("val/episode")[0].encoded_image_string)) as picture:
        red, green, blue = picture.convert("RGB").split()
    assert red.tobytes() != green.tobytes() != blue.tobytes()
