"""Omniglot's folders, splits and download, on a small copy: 10 characters by 3 drawers."""

import functools
import hashlib
import shutil
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from metacv import CONFIG_DIR
from metacv.data import omniglot
from metacv.data.bank import SPLITS, ImageBank
from metacv.data.omniglot import Omniglot
from metacv.errors import UserError
from metacv.model import build_dataset

CONTENT = {"images_background": {"Latin": 3, "Greek": 2, "Korean": 2}, "images_evaluation": {"Tengwar": 3}}


def ink(alphabet: str, character: int, drawer: int) -> np.ndarray:
    """A different drawing for each drawer, uint8 [105, 105], black on white."""
    seed = int(hashlib.sha256(f"{alphabet}{character}{drawer}".encode()).hexdigest()[:8], 16)
    image = np.full((105, 105), 255, dtype=np.uint8)
    top, left = np.random.default_rng(seed).integers(5, 60, 2)
    image[top : top + 30, left : left + 12] = 0
    return image


@pytest.fixture(scope="session")
def omniglot_files(tmp_path_factory) -> Path:
    """A data_dir with a small Omniglot, not to be changed."""
    data_dir = tmp_path_factory.mktemp("small_omniglot")
    for part, alphabets in CONTENT.items():
        for alphabet, characters in alphabets.items():
            for c in range(1, characters + 1):
                place = data_dir / "omniglot" / part / alphabet / f"character{c:02d}"
                place.mkdir(parents=True)
                for drawer in range(1, 4):
                    Image.fromarray(ink(alphabet, c, drawer)).convert("1").save(place / f"{c:04d}_{drawer:02d}.png")
    return data_dir


@pytest.fixture
def small(tmp_path, omniglot_files, monkeypatch) -> Path:
    monkeypatch.setattr(omniglot, "CHARACTERS", {"images_background": 7, "images_evaluation": 3})
    monkeypatch.setattr(omniglot, "DRAWERS", 3)
    shutil.copytree(omniglot_files, tmp_path / "data")
    return tmp_path / "data"


def build(data_dir: Path, **changes) -> Omniglot:
    """The data set that the YAML describes, with splits that fit the small copy."""
    settings = {"val_alphabets": ["Greek"], "counts": {"train": 5, "val": 2, "test": 3}} | changes
    node = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "dataset/omniglot.yaml"))
    return build_dataset(node | settings, str(data_dir))


def names(bank: ImageBank) -> list[str]:
    return ["/".join(name.split("/")[1:]) for name in bank.class_names]


def test_split_lake_trains_on_background_and_tests_on_evaluation_alphabets(small):
    dataset = build(small)
    assert names(dataset.load("train")) == [
        "Korean/character01", "Korean/character02", "Latin/character01", "Latin/character02", "Latin/character03",
    ]  # fmt: skip
    assert names(dataset.load("val")) == ["Greek/character01", "Greek/character02"]
    assert names(dataset.load("test")) == [f"Tengwar/character0{c}" for c in (1, 2, 3)]


def test_random_splits_are_disjoint_and_seeded(small):
    dataset = build(small, split="random")
    parts = [set(names(dataset.load(split))) for split in SPLITS]
    assert [len(part) for part in parts] == [5, 2, 3]
    assert len(set.union(*parts)) == 10
    assert set(names(build(small, split="random", split_seed=1).load("test"))) != parts[2]


def test_random_splits_of_one_seed_share_their_test_characters(small):
    test = names(build(small, split="random").load("test"))
    fewer = build(small, split="random", counts={"train": 1, "val": 1, "test": 3})
    assert names(fewer.load("test")) == test


@pytest.fixture
def lists(small) -> Path:
    folder = small / "omniglot" / "splits-vinyals"
    folder.mkdir()
    (folder / "train.txt").write_text("".join(f"Latin/character01/rot{r:03d}\n" for r in (0, 90, 180, 270)))
    (folder / "val.txt").write_text("Tengwar/character02\nGreek/character01\n")
    (folder / "test.txt").write_text("Korean/character02\n")
    return folder


def test_split_lists_are_read_with_and_without_rotations(small, lists):
    dataset = build(small, split="file")
    assert names(dataset.load("train")) == ["Latin/character01"]
    assert names(dataset.load("val")) == ["Tengwar/character02", "Greek/character01"]
    assert names(dataset.load("test")) == ["Korean/character02"]


def test_a_relative_folder_of_lists_lies_beside_the_images_only(small, lists, monkeypatch):
    monkeypatch.chdir(small / "omniglot")
    lists.rename(small / "omniglot" / "mine")
    assert names(build(small, split="file", split_dir="mine").load("test")) == ["Korean/character02"]
    (small / "omniglot" / "mine").rename(small / "mine")
    monkeypatch.chdir(small)
    with pytest.raises(UserError, match=r"omniglot/mine/train.txt cannot be read"):
        build(small, split="file", split_dir="mine").load("test")
    with pytest.raises(UserError, match=r"dataset.split=file: .*~no such user/mine/train.txt cannot be read"):
        build(small, split="file", split_dir="~no such user/mine").load("test")
    absolute = build(small, split="file", split_dir=str(small / "mine"))
    assert names(absolute.load("test")) == ["Korean/character02"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Latin/character09\n", r"train.txt: there is no character Latin/character09 in Omniglot"),
        ("Korean/character02\n", "1 test characters are also listed for train or val"),
        ("", r"train.txt lists no characters"),
        (None, r"dataset.split=file: .*train.txt cannot be read"),
    ],
)
def test_a_split_list_that_does_not_fit_is_refused(small, lists, content, message):
    (lists / "train.txt").unlink() if content is None else (lists / "train.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        build(small, split="file").load("train")


@pytest.mark.parametrize(("resample", "invert"), [("lanczos", True), ("nearest", False)])
def test_images_are_the_resized_files(small, resample, invert):
    bank = build(small, resample=resample, invert=invert).load("test")
    assert bank.images.shape == (9, 1, 28, 28)
    assert bank.offsets.tolist() == [0, 3, 6, 9]
    how = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}[resample]
    expected = np.asarray(Image.fromarray(ink("Tengwar", 2, 1)).resize((28, 28), how))
    assert np.array_equal(bank.images[3, 0].numpy(), 255 - expected if invert else expected)


def test_any_image_file_is_prepared_like_the_data_sets_own(small, tmp_path):
    dataset = build(small)
    Image.fromarray(ink("Tengwar", 2, 1)).convert("RGB").save(tmp_path / "photo.bmp")
    assert dataset.read(tmp_path / "photo.bmp").tolist() == dataset.load("test").images[3].tolist()


def test_the_cache_suffices_without_the_files_and_settings_do_not_share_it(small):
    first = build(small).load("test")
    nearest = build(small, resample="nearest").load("test")
    shutil.rmtree(small / "omniglot")
    assert build(small).load("test").fingerprint == first.fingerprint
    assert build(small, resample="nearest").load("test").fingerprint == nearest.fingerprint != first.fingerprint
    assert len(list((small / "cache").iterdir())) == 2


def test_missing_or_damaged_files_are_named(small):
    place = small / "omniglot" / "images_background" / "Greek" / "character02"
    image = place / "0002_01.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"Greek/character02/0002_01.png is not a readable image"):
        build(small).load("train")
    Image.new("1", (300, 20)).save(image)
    with pytest.raises(UserError, match=r"0002_01.png is 300x20 instead of 105x105"):
        build(small).load("train")
    image.unlink()
    with pytest.raises(UserError, match="Greek/character02 has 2 instead of 3 images"):
        build(small).load("train")
    shutil.rmtree(place)
    with pytest.raises(UserError, match="images_background has 6 instead of 7 characters"):
        build(small).load("train")
    assert not (small / "cache").exists()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path/server in place of the official download: the folder."""
    from torchvision.datasets import Omniglot as Official

    (folder := tmp_path / "server").mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(Official, "download_url_prefix", f"http://127.0.0.1:{http.server_port}")
        yield folder
        http.shutdown()


def test_the_official_archives_are_downloaded_checked_and_unpacked(small, server, monkeypatch):
    from torchvision.datasets import Omniglot as Official

    for part in CONTENT:
        with zipfile.ZipFile(server / f"{part}.zip", "w") as archive:
            for path in sorted((small / "omniglot" / part).rglob("*.png")):
                archive.write(path, path.relative_to(small / "omniglot"))
    expected = build(small).load("train").fingerprint
    shutil.rmtree(small / "omniglot")
    shutil.rmtree(small / "cache")
    with pytest.raises(UserError, match="cannot be downloaded"):  # not the official MD5
        build(small).load("train")
    assert not (small / "omniglot" / "images_background").exists()
    sums = {part: hashlib.md5((server / f"{part}.zip").read_bytes()).hexdigest() for part in CONTENT}
    monkeypatch.setattr(Official, "zips_md5", sums)
    assert build(small).load("train").fingerprint == expected
    assert sorted(path.name for path in (small / "omniglot").iterdir()) == sorted(CONTENT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": "cubic"}, "dataset.resample=cubic: must be one of lanczos, nearest"),
        ({"size": 1000}, "size=1000"),
        ({"split": "lakes"}, "dataset.split=lakes: must be one of lake, random, file"),
        ({"counts": {"train": 9, "val": 9, "test": 9}}, "the sum must be at most 10"),
        ({"counts": {"train": 1, "val": 1}}, "counts must have train, val and test"),
        ({"train_rotation": "some"}, "dataset.train_rotation=some: must be one of none, per_class"),
        ({"val_alphabets": ["Klingon"]}, "Klingon is not one of the background alphabets, Greek, Korean, Latin"),
        ({"val_alphabets": []}, "must have some of the background alphabets"),
        ({"val_alphabets": ["Greek", "Korean", "Latin"]}, "must have some of the background alphabets"),
    ],
)
def test_invalid_settings_are_refused_with_the_allowed_values(small, changes, message):
    with pytest.raises(UserError, match=message):
        build(small, **changes).load("train")
