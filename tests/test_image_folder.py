"""People's own images: any format, size and mode; splits that are made, kept and guarded."""

import json
import os
import re
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN
from PIL import Image

from metacv import MetacvError, checkpoint
from metacv.data.image_files import open_picture
from metacv.data.image_folder import ImageFolder

ANYWHERE = ("dataset=image_folder", "dataset.size=28", "dataset.color=false")
QUICK = ("algo=protonet", *ANYWHERE, *TRAIN[1:], "way=3", "query=2")


def picture(seed: int, size=(28, 28)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def fill(folder: Path, classes: int, images: int = 5) -> Path:
    for c in range(classes):
        (folder / f"class {c}").mkdir(parents=True)
        for i in range(images):
            picture(100 * c + i).save(folder / f"class {c}" / f"{i}.png")
    return folder


def dataset(root: Path, data_dir: Path, **changes) -> ImageFolder:
    settings = {"size": 28, "color": True, "fit": "crop", "invert": False, "split_seed": 0, "split_file": None}
    settings |= {"fractions": {"train": 0.6, "val": 0.2, "test": 0.2}} | changes
    return ImageFolder(data_dir, str(root), **settings)


def test_split_folders_are_taken_as_they_are_with_classes_of_different_sizes(tmp_path):
    for split, sizes in (("train", [2, 5]), ("val", [3, 3]), ("test", [1, 4])):
        for c, size in enumerate(sizes):
            (tmp_path / "own" / split / f"{split}{c}").mkdir(parents=True)
            for i in range(size):
                picture(10 * c + i).save(tmp_path / "own" / split / f"{split}{c}" / f"{i}.png")
    images = dataset(tmp_path / "own", tmp_path)
    assert images.load("train").sizes.tolist() == [2, 5]
    bank = images.load("test")
    assert (bank.sizes.tolist(), bank.class_names, bank.name) == ([1, 4], ("test0", "test1"), "own test")
    assert torch.equal(bank.images[0], torch.from_numpy(np.array(picture(0))).permute(2, 0, 1))
    assert images.splits() == {s: [f"{s}0", f"{s}1"] for s in ("train", "val", "test")}


def test_a_plain_folder_is_dealt_out_by_fractions_and_seed(tmp_path):
    root = fill(tmp_path / "own", 10, images=1)
    made = dataset(root, tmp_path).splits()
    assert [len(made[split]) for split in ("train", "val", "test")] == [6, 2, 2]
    assert sorted(chain(*made.values())) == [f"class {c}" for c in range(10)]
    assert dataset(root, tmp_path).splits() == made
    assert any(dataset(root, tmp_path, split_seed=seed).splits() != made for seed in range(1, 5))
    assert dataset(root, tmp_path).load("val").class_names == tuple(made["val"])


def test_a_class_that_is_added_moves_few_others(tmp_path):
    root = fill(tmp_path / "own", 40, images=1)
    before = dataset(root, tmp_path).splits()
    (root / "new").mkdir()
    after = dataset(root, tmp_path).splits()
    moved = [name for split in before for name in before[split] if name not in after[split]]
    assert len(moved) <= 2


def test_pictures_of_every_mode_are_upright_and_of_8_bits(tmp_path):
    def opened(image: Image.Image, name: str, **options) -> np.ndarray:
        image.save(tmp_path / name, **options)
        return np.array(open_picture(tmp_path / name))

    colours = picture(1, (6, 4))
    plain, grey = np.array(colours), np.array(colours.convert("L"))
    assert np.array_equal(opened(colours, "a.png"), plain)
    assert np.array_equal(opened(colours, "a.bmp"), plain)
    assert np.array_equal(opened(colours, "a.webp", lossless=True), plain)
    assert np.array_equal(opened(colours.convert("L"), "g.png"), grey)
    assert set(opened(colours.convert("1"), "1.png").flat) == {0, 255}
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(opened(deep, "16.png"), grey)
    fractions = (grey / 255).astype(np.float32)
    assert np.array_equal(opened(Image.fromarray(fractions), "f.tiff"), grey)
    fractions[0, 0], fractions[0, 1] = 1.02, np.nan
    assert np.array_equal(opened(Image.fromarray(fractions), "f.tiff")[1:], grey[1:])
    assert opened(Image.fromarray(fractions), "f.tiff")[0, :2].tolist() == [255, 0]
    assert opened(Image.fromarray(np.array([[510, 255, 0]], np.int32)), "i.tiff").tolist() == [[255, 128, 0]]
    assert opened(Image.fromarray(np.array([[255, 7, 0]], np.int32)), "i.tiff").tolist() == [[255, 7, 0]]
    see_through = colours.copy()
    see_through.putalpha(Image.fromarray(np.where(np.arange(24).reshape(4, 6) < 12, 255, 0).astype(np.uint8)))
    assert np.array_equal(opened(see_through, "rgba.png"), np.where(np.arange(24).reshape(4, 6, 1) < 12, plain, 255))
    assert opened(colours.convert("CMYK"), "c.jpg", quality=95).shape == (4, 6, 3)
    assert opened(colours.quantize(4), "p.gif").shape == (4, 6, 3)
    turned = Image.Exif()
    turned[0x0112] = 6  # "turn right to see it upright"
    assert np.array_equal(opened(colours, "turned.png", exif=turned), np.rot90(plain, -1))


def test_damaged_exif_leaves_a_picture_as_it_is(tmp_path):
    colours = picture(1, (6, 4))
    colours.save(tmp_path / "a.png", exif=b"Exif\0\0no tags at all")
    assert np.array_equal(np.array(open_picture(tmp_path / "a.png")), np.array(colours))


def test_a_large_photograph_keeps_its_middle_or_is_stretched(tmp_path):
    wide = np.zeros((400, 1200, 3), np.uint8)
    wide[:, 400:800] = (255, 0, 0)
    wide[:, 800:] = (0, 0, 255)
    Image.fromarray(wide).save(tmp_path / "wide.jpg", quality=95)
    cropped = dataset(tmp_path, tmp_path).read(tmp_path / "wide.jpg").float()
    assert cropped.shape == (3, 28, 28)
    assert (cropped[0, :, 2:-2] > 240).all()
    assert (cropped[2, :, 2:-2] < 15).all()
    stretched = dataset(tmp_path, tmp_path, fit="stretch").read(tmp_path / "wide.jpg").float()
    assert [int(stretched[0, 14, x] > 128) for x in (2, 14, 25)] == [0, 1, 0]
    assert stretched[2, 14, 25] > 240
    grey = dataset(tmp_path, tmp_path, color=False, invert=True).read(tmp_path / "wide.jpg")
    assert grey.shape == (1, 28, 28)
    assert abs(int(grey[0, 14, 14]) - (255 - 76)) <= 2


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_large_photograph_that_is_read_smaller_is_upright_too(tmp_path, kind):
    wide = np.zeros((400, 1200, 3), np.uint8)
    wide[:, :600], wide[:, 600:] = (255, 0, 0), (0, 0, 255)
    turned = Image.Exif()
    turned[0x0112] = 6  # its left is the top
    Image.fromarray(wide).save(tmp_path / f"a.{kind}", exif=turned)
    image = dataset(tmp_path, tmp_path, fit="stretch").read(tmp_path / f"a.{kind}")
    red, _, blue = image.float()
    assert min(red[:13].min(), blue[15:].min()) > 240
    assert max(red[15:].max(), blue[:13].max()) < 15


def test_each_unreadable_file_has_a_line_and_all_are_counted(tmp_path, capsys):
    root = fill(tmp_path / "own", 5)
    (root / "class 0/notes.txt").write_text("not an image")
    (root / "class 1/cut.png").write_bytes((root / "class 1/0.png").read_bytes()[:60])
    (root / "class 1/empty.jpg").touch()
    (root / "class 2/.hidden").write_text("not looked at")
    (root / "class 3/phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (root / "class 2/script.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    everything = {"fractions": {"train": 1, "val": 0, "test": 0}}
    bank = dataset(root, tmp_path, **everything).load("train")
    lines = capsys.readouterr().err.splitlines()
    for name in ("0/notes.txt", "1/cut.png", "1/empty.jpg", "2/script.jpg", "3/phone.HEIC"):
        assert sum(line.startswith(f"metacv: {root}/class {name} cannot be read") for line in lines) == 1
    assert any("phone.HEIC cannot be read (Pillow does not read HEIC: convert it to JPEG or PNG)" in s for s in lines)
    assert lines[-1] == "metacv: own train: 5 of 30 files left out, as no readable images"
    assert len(lines) == 6
    assert bank.sizes.tolist() == [5] * 5
    again = dataset(root, tmp_path, **everything).load("train")
    assert capsys.readouterr().err.splitlines() == lines[-1:]
    assert again.fingerprint == bank.fingerprint


def test_a_changed_file_is_read_again(tmp_path):
    root = fill(tmp_path / "own", 2, images=1)
    everything = {"fractions": {"train": 1, "val": 0, "test": 0}}
    before = dataset(root, tmp_path, **everything).load("train")
    picture(999, (30, 28)).save(root / "class 0/0.png")
    assert dataset(root, tmp_path, **everything).load("train").fingerprint != before.fingerprint


def test_what_is_too_little_is_named(tmp_path):
    with pytest.raises(MetacvError, match=r"dataset.root=.*nowhere: there is no such folder"):
        dataset(tmp_path / "nowhere", tmp_path).load("train")
    root = fill(tmp_path / "own", 4)
    few = "holds 4 folders of images, of which 1 are for val: a task needs 2 classes; dataset.fractions says how many"
    with pytest.raises(MetacvError, match=few):
        dataset(root, tmp_path).load("val")
    (root / "train").mkdir()
    (root / "test").mkdir()
    with pytest.raises(MetacvError, match=r"own/train holds 0 folders of images: a task needs 2 classes"):
        dataset(root, tmp_path).load("train")
    with pytest.raises(MetacvError, match=r"own has no folder val"):
        dataset(root, tmp_path).load("val")
    for c in range(2):
        (root / "train" / f"c{c}").mkdir()
    with pytest.raises(MetacvError, match=r"own train: the class c0 has no readable image"):
        dataset(root, tmp_path).load("train")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 2}, "size=2: 4 to 4096"),
        ({"fractions": {"train": 1.0}}, "train, val and test"),
        ({"fractions": {"train": 1.0, "val": -1, "test": 1}}, "none below 0"),
        ({"fractions": {"train": 0, "val": 0, "test": 0}}, "not all 0"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        dataset(tmp_path, tmp_path, **changes)


def test_a_class_in_two_split_folders_is_refused(tmp_path):
    for split in ("train", "val", "test"):
        fill(tmp_path / "own" / split, 2, images=1)
    with pytest.raises(MetacvError, match=r"own: the class class 0 is in both train and val"):
        dataset(tmp_path / "own", tmp_path).load("train")


def test_a_run_keeps_its_split_and_evaluation_sticks_to_it(metacv):
    root = fill(Path("own"), 20)
    assert metacv("train", *QUICK, "dataset.root=own", "hydra.run.dir=run")[0] == 0
    made = json.loads(Path("run/split.json").read_text())
    assert [len(made[split]) for split in ("train", "val", "test")] == [13, 3, 4]
    code, out, err = metacv("evaluate", "checkpoint=run", "way=2", "episodes=5")
    assert (code, err) == (0, "")
    assert "ImageFolder test" in out
    for c in range(20, 50):
        shutil.copytree(root / "class 0", root / f"class {c}")
    code, _, err = metacv("evaluate", "checkpoint=run", "way=2", "episodes=5")
    assert code == 1
    assert "were trained or validated on" in err
    assert "dataset.split_file=run/split.json keeps to the split of then" in err
    code, _, err = metacv("evaluate", "checkpoint=run", "way=2", "episodes=5", "dataset.split_file=run/split.json")
    assert (code, err) == (0, "")
    code, _, err = metacv("evaluate", "checkpoint=run", "way=2", "episodes=5", f"dataset.root={root.resolve()}")
    assert code == 1
    assert "were trained or validated on" in err
    code, _, err = metacv("train", "resume=run", "steps=6")
    assert code == 1
    assert "the classes are dealt out otherwise now; dataset.split_file=run/split.json keeps to its split" in err
    code, _, err = metacv("train", "resume=run", "steps=6", "dataset.split_file=run/split.json")
    assert (code, err) == (0, "")


def test_a_split_file_goes_before_the_folders_that_classes_lie_in(tmp_path):
    for split in ("train", "val", "test"):
        fill(tmp_path / split, 3, images=2)
        for c in range(3):
            (tmp_path / split / f"class {c}").rename(tmp_path / split / f"{split}{c}")
    made = {"train": ["test0", "val0"], "val": ["train1", "train0"], "test": ["val2", "test2"]}
    (tmp_path / "split.json").write_text(json.dumps(made))
    images = dataset(tmp_path, tmp_path, split_file=str(tmp_path / "split.json"))
    assert images.splits() == made
    assert images.load("train").class_names == ("test0", "val0")
    (tmp_path / "split.json").write_text(json.dumps(made | {"test": ["val2", "gone"]}))
    with pytest.raises(MetacvError, match=r"dataset.split_file=.*split.json: .* has no class gone"):
        images.load("train")
    (tmp_path / "split.json").write_text(json.dumps(made | {"test": ["val2"]}))
    with pytest.raises(MetacvError, match=r"holds 9 folders .* of which 1 are for test: a task needs 2 classes$"):
        images.load("test")
    (tmp_path / "split.json").unlink()
    with pytest.raises(MetacvError, match=r"dataset.split_file=.*split.json is not a split \(FileNotFoundError"):
        images.load("train")


def test_a_run_is_evaluated_and_goes_on_from_any_folder(metacv, monkeypatch, tmp_path):
    for place in ("own", "elsewhere/own"):
        fill(Path(place), 20)
    shutil.rmtree("elsewhere/own/class 0")
    assert metacv("train", *QUICK, "dataset.root=own", "hydra.run.dir=run")[0] == 0
    monkeypatch.chdir("elsewhere")
    words = ("way=2", "episodes=5", "hydra.run.dir=evaluation")
    assert metacv("evaluate", "checkpoint=../run", *words)[::2] == (0, "")
    assert metacv("train", "resume=../run", "steps=6")[::2] == (0, "")
    assert checkpoint.load(tmp_path / "run/last.pt")["config"]["dataset"]["root"] == str(tmp_path / "own")
    code, _, err = metacv("evaluate", "checkpoint=../run", *words, "dataset.root=own", "dataset.split_seed=1")
    assert code == 1  # by their names they are the same classes, in another place
    assert "were trained or validated on" in err


@pytest.mark.parametrize("place", ["a, b=c & d#(1) 'é", "2024", "~/fotos", "фото"])
def test_paths_are_taken_as_the_shell_hands_them_on(metacv, monkeypatch, tmp_path, place):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in (f"{place}", f"{place}/run's"):
        Path(name).expanduser().mkdir(parents=True)
    fill(Path(place).expanduser() / "own", 20)
    folders = (f"dataset.root={place}/own", f"data_dir={place}/cache")
    assert metacv("train", *QUICK, *folders, f"hydra.run.dir={place}/run's")[::2] == (0, "")
    assert metacv("train", f"resume={place}/run's", "steps=6")[::2] == (0, "")
    assert checkpoint.load(Path(place).expanduser() / "run's/last.pt")["step"] == 6
    words = ("way=2", "episodes=5", f"dataset.split_file={place}/run's/split.json", f"data_dir={place}/cache")
    test = ("evaluate", f"checkpoint={place}/run's", *words, f"hydra.run.dir={place}/test")
    assert metacv(*test)[::2] == (0, "")
    code, out, err = metacv("report", str(Path(place).expanduser()))
    assert (code, err) == (0, "")
    assert "5 episodes of ImageFolder test" in out


def test_folders_of_the_same_name_do_not_share_a_cache(tmp_path, monkeypatch):
    for i, place in enumerate((tmp_path / "a", tmp_path / "b")):
        for c in range(2):
            (place / f"own/{c}").mkdir(parents=True)
            Image.new("L", (28, 28), i).save(place / f"own/{c}/0.bmp")
            os.utime(place / f"own/{c}/0.bmp", (0, 0))
        monkeypatch.chdir(place)
        images = dataset(Path("own"), tmp_path, fractions={"train": 1, "val": 0, "test": 0}).load("train").images
        assert images.unique().tolist() == [i]


def test_layouts_that_are_easily_mistaken_get_a_hint(tmp_path, capsys):
    for split in ("train", "valid", "test"):
        fill(tmp_path / "own" / split, 2, images=1)
    with pytest.raises(MetacvError, match=r"dataset.root=.*own: rename its folder valid to val"):
        dataset(tmp_path / "own", tmp_path).load("train")
    for alphabet in ("Greek", "Latin"):
        fill(tmp_path / "alphabets" / alphabet, 3, images=1)
    bank = dataset(tmp_path / "alphabets", tmp_path, fractions={"train": 1, "val": 0, "test": 0}).load("train")
    assert bank.sizes.tolist() == [3, 3]
    said = "2 of its 2 classes hold folders and no image of their own (Greek, ...); all below is one class"
    assert capsys.readouterr().err == f"metacv: alphabets train: {said}\n"


def test_too_few_test_classes_are_told_before_the_training(metacv):
    fill(Path("own"), 20)
    words = ("dataset.root=own", "hydra.run.dir=run", "dataset.fractions={train:13,val:5,test:2}")
    code, _, err = metacv("train", *QUICK, *words)
    assert code == 0
    assert err == "metacv: way=3 but the test split has only 2 classes: dataset.fractions may give it more\n"


def test_root_missing_is_said(metacv):
    code, _, err = metacv("train", *QUICK)
    assert (code, err) == (1, "metacv: Missing mandatory value: dataset.root\n")


def test_a_class_too_small_for_the_task_is_named(metacv):
    fill(Path("own"), 20, images=2)
    code, _, err = metacv("train", *QUICK, "dataset.root=own", "hydra.run.dir=run")
    assert code == 1
    assert re.search(r"train_shot=1 \+ train_query=2 needs 3 images a class but class \d+ of own train has 2\n", err)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "is not a split"),
        ('{"train": []}', "is not a split"),
        ('{"train": ["class 0"], "val": ["nothing"], "test": []}', "has no class nothing"),
        ('{"train": ["class 0"], "val": ["class 0"], "test": []}', "the class class 0 is in both train and val"),
    ],
)
def test_a_split_file_that_does_not_fit_is_refused(tmp_path, content, words):
    root = fill(tmp_path / "own", 3, images=1)
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(MetacvError, match=words):
        dataset(root, tmp_path, split_file=str(tmp_path / "split.json")).load("train")
