"""The data sets: Omniglot's folders, splits and cache on a small copy, and the glyphs."""

import functools
import hashlib
import shutil
import threading
import time
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import quick
from omegaconf import OmegaConf
from PIL import Image

from metacv import MetacvError
from metacv.config_dir import config_dir
from metacv.data import omniglot
from metacv.data.bank import ImageBank
from metacv.data.glyphs import draw_glyphs
from metacv.model import build_dataset

DATASETS = sorted(path.stem for path in (config_dir() / "dataset").glob("*.yaml"))
CONTENT = {"images_background": {"Latin": 3, "Greek": 2, "Korean": 2}, "images_evaluation": {"Tengwar": 3}}


def config(name: str, **changes):
    content = OmegaConf.to_container(OmegaConf.load(config_dir() / "dataset" / f"{name}.yaml"))
    return {"dataset": content | changes}


def ink(alphabet: str, character: int, drawer: int) -> np.ndarray:
    """A one-bit 105x105 drawing, black on white, that no other shares."""
    seed = int(hashlib.sha256(f"{alphabet}{character}{drawer}".encode()).hexdigest()[:8], 16)
    image = np.full((105, 105), 255, dtype=np.uint8)
    top, left = np.random.default_rng(seed).integers(5, 60, 2)
    image[top : top + 30, left : left + 12] = 0
    return image


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """data_dir with a small Omniglot: 10 characters x 3 drawers."""
    monkeypatch.setattr(omniglot, "CHARACTERS", {"images_background": 7, "images_evaluation": 3})
    monkeypatch.setattr(omniglot, "DRAWERS", 3)
    for part, alphabets in CONTENT.items():
        for alphabet, characters in alphabets.items():
            for c in range(1, characters + 1):
                place = tmp_path / "omniglot" / part / alphabet / f"character{c:02d}"
                place.mkdir(parents=True)
                for drawer in range(1, 4):
                    Image.fromarray(ink(alphabet, c, drawer)).convert("1").save(place / f"{c:04d}_{drawer:02d}.png")
    return tmp_path


def small(folder: Path, **changes):
    defaults = {"val_alphabets": ["Greek"], "counts": {"train": 5, "val": 2, "test": 3}}
    return build_dataset(config("omniglot", **(defaults | changes)), str(folder))


def names(bank: ImageBank) -> list[str]:
    return ["/".join(name.split("/")[1:]) for name in bank.class_names]


def test_lake_trains_on_background_holds_val_alphabets_out_and_tests_on_evaluation(folder):
    dataset = small(folder)
    assert names(dataset.load("train")) == [
        "Korean/character01", "Korean/character02", "Latin/character01", "Latin/character02", "Latin/character03",
    ]  # fmt: skip
    assert names(dataset.load("val")) == ["Greek/character01", "Greek/character02"]
    assert names(dataset.load("test")) == [f"Tengwar/character0{c}" for c in (1, 2, 3)]


def test_random_splits_are_disjoint_seeded_and_share_their_test_characters(folder):
    dataset = small(folder, split="random")
    parts = [set(names(dataset.load(split))) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [5, 2, 3]
    assert len(set.union(*parts)) == 10
    fewer = small(folder, split="random", counts={"train": 1, "val": 1, "test": 3})
    assert set(names(fewer.load("test"))) == parts[2]
    assert set(names(small(folder, split="random", split_seed=1).load("test"))) != parts[2]


def test_split_lists_are_read_with_and_without_rotations(folder):
    lists = folder / "omniglot" / "splits-vinyals"
    lists.mkdir()
    (lists / "train.txt").write_text("".join(f"Latin/character01/rot{r:03d}\n" for r in (0, 90, 180, 270)))
    (lists / "val.txt").write_text("Tengwar/character02\nGreek/character01\n")
    (lists / "test.txt").write_text("Korean/character02\n")
    dataset = small(folder, split="file")
    assert names(dataset.load("train")) == ["Latin/character01"]
    assert names(dataset.load("val")) == ["Tengwar/character02", "Greek/character01"]
    assert names(dataset.load("test")) == ["Korean/character02"]
    (lists / "train.txt").write_text("Latin/character09\n")
    with pytest.raises(MetacvError, match=r"train.txt: there is no character Latin/character09 in Omniglot"):
        dataset.load("train")
    (lists / "train.txt").write_text("Korean/character02\n")
    with pytest.raises(MetacvError, match="1 test characters are also listed for train or val"):
        dataset.load("train")
    (lists / "train.txt").unlink()
    with pytest.raises(MetacvError, match=r"train.txt cannot be read"):
        dataset.load("train")


@pytest.mark.parametrize("resample", ["lanczos", "nearest"])
@pytest.mark.parametrize("invert", [True, False])
def test_images_are_those_of_the_files(folder, resample, invert):
    bank = small(folder, resample=resample, invert=invert).load("test")
    assert bank.images.shape == (9, 1, 28, 28)
    assert bank.offsets.tolist() == [0, 3, 6, 9]
    how = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}[resample]
    expected = np.asarray(Image.fromarray(ink("Tengwar", 2, 1)).resize((28, 28), how))
    assert np.array_equal(bank.images[3, 0].numpy(), 255 - expected if invert else expected)
    assert (bank.images.float().mean() < 127) == invert


def test_the_cache_is_enough_without_the_files_and_each_setting_has_its_own(folder):
    first = small(folder).load("test")
    nearest = small(folder, resample="nearest").load("test")
    shutil.rmtree(folder / "omniglot")
    assert small(folder).load("test").fingerprint == first.fingerprint
    assert small(folder, resample="nearest").load("test").fingerprint == nearest.fingerprint != first.fingerprint
    assert len(list((folder / "cache").iterdir())) == 2


def test_a_damaged_cache_is_made_again(folder, capsys):
    first = small(folder).load("test").fingerprint
    (cache,) = (folder / "cache").iterdir()
    whole = cache.read_bytes()
    content = torch.load(cache, weights_only=True)
    for damage in (
        lambda: cache.write_bytes(whole[:1000]),
        lambda: cache.write_bytes(whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :]),
        lambda: torch.save(None, cache),
        lambda: torch.save(content | {"images": content["images"].float()}, cache),
        lambda: torch.save(content | {"images": content["images"][1:]}, cache),
    ):
        damage()
        assert small(folder).load("test").fingerprint == first
        error = capsys.readouterr().err
        assert "cannot be read" in error
        assert error.count("\n") == 1
        assert small(folder).load("test").fingerprint == first
        assert capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written_is_done_without(folder, capsys):
    (folder / "cache").write_text("a file where the folder should be")
    assert len(small(folder).load("test").images) == 9
    assert "going on without a cache" in capsys.readouterr().err


def test_what_is_missing_or_damaged_is_named(folder):
    place = folder / "omniglot" / "images_background" / "Greek" / "character02"
    image = place / "0002_01.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MetacvError, match=r"Greek/character02/0002_01.png is not a readable image"):
        small(folder).load("train")
    Image.new("1", (300, 20)).save(image)
    with pytest.raises(MetacvError, match=r"0002_01.png is not a readable image \(300x20 instead of 105x105\)"):
        small(folder).load("train")
    image.unlink()
    with pytest.raises(MetacvError, match="Greek/character02 holds 2 instead of 3 images"):
        small(folder).load("train")
    shutil.rmtree(place)
    with pytest.raises(MetacvError, match="images_background holds 6 instead of 7 characters"):
        small(folder).load("train")
    assert not (folder / "cache").exists()


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/server on the loopback: (folder, address)."""
    place = tmp_path / "server"
    place.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(place))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield place, f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_the_official_zips_are_downloaded_checked_and_unpacked(folder, server, monkeypatch):
    zips, address = server
    for part in CONTENT:
        with zipfile.ZipFile(zips / f"{part}.zip", "w") as archive:
            for path in sorted((folder / "omniglot" / part).rglob("*.png")):
                archive.write(path, path.relative_to(folder / "omniglot"))
    expected = small(folder).load("train").fingerprint
    shutil.rmtree(folder / "omniglot")
    shutil.rmtree(folder / "cache")
    from torchvision.datasets import Omniglot

    monkeypatch.setattr(Omniglot, "download_url_prefix", address)
    with pytest.raises(MetacvError, match="could not be downloaded"):  # not the official MD5
        small(folder).load("train")
    assert not (folder / "omniglot" / "images_background").exists()
    sums = {part: hashlib.md5((zips / f"{part}.zip").read_bytes()).hexdigest() for part in CONTENT}
    monkeypatch.setattr(Omniglot, "zips_md5", sums)
    assert small(folder).load("train").fingerprint == expected
    assert sorted(path.name for path in (folder / "omniglot").iterdir()) == ["images_background", "images_evaluation"]


def test_a_network_trained_on_glyphs_is_evaluated_on_omniglot(metacv, folder):
    assert metacv("train", *quick("protonet"), "hydra.run.dir=run")[0] == 0
    small_omniglot = ("dataset.val_alphabets=[Greek]", "dataset.counts={train:5,val:2,test:3}", f"data_dir={folder}")
    evaluate = ("evaluate", "checkpoint=run", "dataset=omniglot", *small_omniglot, "way=3", "query=2", "episodes=5")
    code, out, err = metacv(*evaluate)
    assert (code, err) == (0, "")
    assert "5 episodes of Omniglot test" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": "cubic"}, "dataset.resample=cubic: not one of lanczos, nearest"),
        ({"size": 1000}, "size=1000"),
        ({"split": "lakes"}, "dataset.split=lakes: not one of lake, random, file"),
        ({"counts": {"train": 9, "val": 9, "test": 9}}, "together at most 10"),
        ({"counts": {"train": 1, "val": 1}}, "counts must name train, val and test"),
        ({"train_rotation": "some"}, "dataset.train_rotation=some: not one of none, per_class"),
        ({"val_alphabets": ["Klingon"]}, "Klingon is not among the background alphabets"),
        ({"val_alphabets": []}, "name some of the background alphabets"),
    ],
)
def test_impossible_settings_are_refused(folder, changes, message):
    with pytest.raises(MetacvError, match=message):
        small(folder, **changes).load("train")


def test_an_unknown_split_is_refused(folder):
    with pytest.raises(MetacvError, match="split=all: one of train, val, test"):
        small(folder).load("all")


def test_glyphs_depend_on_their_seed_alone_and_not_on_how_many_follow():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    many, few = draw_glyphs(70, 3, seed=5), draw_glyphs(55, 3, seed=5)
    assert torch.equal(many[:55], few)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(draw_glyphs(55, 3, seed=6), few)


def test_glyphs_are_ink_on_paper():
    images = draw_glyphs(60, 5)
    assert images.shape == (60, 5, 1, 28, 28)
    assert images.dtype == torch.uint8
    share = (images > 127).float().mean((2, 3, 4))
    assert share.min() > 0.01
    assert 0.05 < share.mean() < 0.25
    grey = ((images > 40) & (images < 215)).float().mean()  # antialiased: edges are neither black nor white
    assert grey > 0.02


def test_performances_of_a_glyph_differ_but_less_than_glyphs_do():
    images = draw_glyphs(60, 6).float().flatten(2)  # [60, 6, 784]
    assert len(torch.unique(images.flatten(0, 1), dim=0)) == 360
    blurred = torch.nn.functional.avg_pool2d(images.view(60, 6, 28, 28), 4).flatten(2)
    nearest = torch.cdist(blurred[:, 1], blurred[:, 0]).argmin(dim=1)
    assert (nearest == torch.arange(60)).float().mean() > 0.2  # chance is 1/60


def test_glyph_splits_are_disjoint_and_of_the_sizes_asked_for(data_dir):
    dataset = build_dataset(config("glyphs", classes={"train": 30, "val": 8, "test": 8}), str(data_dir))
    banks = [dataset.load(split) for split in ("train", "val", "test")]
    assert [len(bank.sizes) for bank in banks] == [30, 8, 8]
    assert len({name for bank in banks for name in bank.class_names}) == 46
    assert all(bank.sizes.eq(20).all() for bank in banks)


def test_the_default_glyphs_are_drawn_in_time(tmp_path):
    start = time.perf_counter()
    bank = build_dataset(config("glyphs"), str(tmp_path)).load("train")
    assert time.perf_counter() - start < 10
    assert len(bank.sizes) >= 1000
    assert min(seconds(lambda: build_dataset(config("glyphs"), str(tmp_path)).load("test")) for _ in range(3)) < 1


def seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
