"""Training and evaluation on each data set that is made of files, from the command line."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAIN
from PIL import Image

from metacv.data import miniimagenet, omniglot
from metacv.model import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("may_be_at_chance")]  # models of noise

SHORT = TRAIN[1:]  # without the number of glyphs
OWN = ("algo=protonet", "dataset=image_folder", "dataset.size=28", "dataset.color=false", *SHORT, "way=3", "query=2")
EVALUATE = ("way=2", "episodes=5")


@pytest.fixture(scope="session")
def own_images(tmp_path_factory) -> Path:
    """20 classes of 3 images, not to be changed."""
    root = tmp_path_factory.mktemp("own_images")
    for c in range(20):
        (root / f"class {c}").mkdir()
        for i in range(3):
            noise = np.random.default_rng(100 * c + i).integers(0, 256, (28, 28, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / f"class {c}" / f"{i}.png")
    return root


@pytest.fixture
def own(tmp_path, own_images, metacv) -> Path:
    """The folder `own` of 20 classes in the current folder."""
    shutil.copytree(own_images, tmp_path / "own")
    return tmp_path / "own"


@pytest.fixture
def run(own, metacv) -> Path:
    """The folder `run` of a run that was trained on `own`."""
    assert metacv("train", *OWN, "dataset.root=own", "hydra.run.dir=run")[0] == 0
    return own.parent / "run"


def add_classes(own: Path) -> None:
    for c in range(20, 50):
        (own / f"class {c}").mkdir()
        for i in range(5):
            values = np.random.default_rng(10 * c + i).integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(values).save(own / f"class {c}" / f"{i}.png")


def test_a_run_saves_its_random_split_and_is_evaluated_on_it(metacv, run):
    splits = json.loads((run / "split.json").read_text())
    assert [len(splits[split]) for split in ("train", "val", "test")] == [13, 3, 4]
    code, out, err = metacv("evaluate", "checkpoint=run", *EVALUATE)
    assert (code, err) == (0, "")
    assert "ImageFolder" in out


def test_evaluation_refuses_classes_that_were_used_in_training(metacv, own, run):
    add_classes(own)
    for root in ((), (f"dataset.root={own}",)):
        code, _, err = metacv("evaluate", "checkpoint=run", *EVALUATE, *root)
        assert (code, err.count("\n")) == (1, 1)
        assert "were used in training or validation" in err
        assert "dataset.split_file=run/split.json" in err
    assert metacv("evaluate", "checkpoint=run", *EVALUATE, "dataset.split_file=run/split.json")[::2] == (0, "")


@pytest.mark.usefixtures("may_be_at_chance")
def test_a_run_resumes_only_on_its_original_split(metacv, own, run):
    add_classes(own)
    code, _, err = metacv("train", "resume=run", "steps=6")
    assert (code, err.count("\n")) == (1, 1)
    assert "dataset.split_file=run/split.json" in err
    assert metacv("train", "resume=run", "steps=6", "dataset.split_file=run/split.json")[::2] == (0, "")


@pytest.mark.usefixtures("may_be_at_chance")
def test_a_run_is_evaluated_and_resumed_from_any_folder(metacv, monkeypatch, own, run):
    (elsewhere := own.parent / "elsewhere").mkdir()
    shutil.copytree(own, elsewhere / "own")
    shutil.rmtree(elsewhere / "own/class 0")
    monkeypatch.chdir(elsewhere)
    words = (*EVALUATE, "hydra.run.dir=evaluation")
    assert metacv("evaluate", "checkpoint=../run", *words)[::2] == (0, "")
    assert metacv("train", "resume=../run", "steps=6")[::2] == (0, "")
    assert load_checkpoint(run, "last.pt").config.dataset["root"] == str(own)
    code, _, err = metacv("evaluate", "checkpoint=../run", *words, "dataset.root=own", "dataset.split_seed=1")
    assert code == 1  # classes of the same names in another place are the same classes
    assert "were used in training or validation" in err


@pytest.mark.parametrize("place", ["a, b=c & d#(1) 'é фото", "2024", "~/fotos"])
@pytest.mark.usefixtures("may_be_at_chance")
def test_paths_are_used_as_the_shell_passes_them(metacv, monkeypatch, tmp_path, own_images, place):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (folder := Path(place).expanduser()).mkdir(parents=True)
    shutil.copytree(own_images, folder / "own")
    words = (f"dataset.root={place}/own", f"data_dir={place}/cache")
    assert metacv("train", *OWN, *words, f"hydra.run.dir={place}/run's")[::2] == (0, "")
    assert metacv("train", f"resume={place}/run's", "steps=6")[::2] == (0, "")
    assert load_checkpoint(folder / "run's", "last.pt").step == 6
    words = (*EVALUATE, f"dataset.split_file={place}/run's/split.json", f"data_dir={place}/cache")
    assert metacv("evaluate", f"checkpoint={place}/run's", *words, f"hydra.run.dir={place}/test")[::2] == (0, "")
    code, out, err = metacv("report", str(folder))
    assert (code, err) == (0, "")
    assert "ImageFolder" in out


def test_too_few_test_classes_are_reported_before_the_training(metacv, own):
    words = ("dataset.root=own", "hydra.run.dir=run", "dataset.fractions={train:13,val:5,test:2}")
    code, _, err = metacv("train", *OWN, *words)
    assert (code, err.count("\n")) == (0, 1)
    assert "test split has only 2 classes" in err
    assert "dataset.fractions" in err


def test_a_missing_root_is_reported(metacv):
    code, _, err = metacv("train", *OWN)
    assert (code, err.count("\n")) == (1, 1)
    assert "dataset.root" in err


def test_a_class_with_too_few_images_for_a_task_is_named(metacv, own):
    for path in own.glob("*/2.png"):
        path.unlink()
    code, _, err = metacv("train", *OWN, "dataset.root=own", "hydra.run.dir=run")
    assert code == 1
    assert re.search(r"train_shot=1 \+ train_query=2 needs 3 images per class, but class \d+ of own train has 2\n", err)


def test_a_network_trained_on_glyphs_is_evaluated_on_omniglot(metacv, monkeypatch, trained, tmp_path):
    monkeypatch.setattr(omniglot, "CHARACTERS", {"images_background": 6, "images_evaluation": 3})
    monkeypatch.setattr(omniglot, "DRAWERS", 3)
    for alphabet in ("images_background/Latin", "images_background/Greek", "images_evaluation/Tengwar"):
        for c in range(3):
            (place := tmp_path / "omniglot" / alphabet / f"character0{c}").mkdir(parents=True)
            for drawer in range(3):
                (picture := Image.new("1", (105, 105), 1)).paste(0, (20, 20, 40 + 10 * drawer, 60))
                picture.save(place / f"{drawer}.png")
    settings = ("dataset.val_alphabets=[Greek]", "dataset.counts={train:3,val:3,test:3}", f"data_dir={tmp_path}")
    words = ("dataset=omniglot", *settings, "way=3", "query=2", "episodes=5")
    code, out, err = metacv("evaluate", f"checkpoint={trained('protonet')}", *words)
    assert (code, err) == (0, "")
    assert "Omniglot" in out


@pytest.fixture
def small_miniimagenet(metacv, monkeypatch, tmp_path) -> tuple[str, ...]:
    """3 classes a split of 3 images in colour: the words that train on them."""
    classes = {split: [f"n{10 * i + c}" for c in range(3)] for i, split in enumerate(("train", "val", "test"))}
    monkeypatch.setattr(miniimagenet, "CLASSES", classes)
    monkeypatch.setattr(miniimagenet, "IMAGES", 3)
    y, x = np.mgrid[:84, :84]
    for split, names in classes.items():
        for c, name in enumerate(names):
            (tmp_path / "data/miniimagenet" / split / name).mkdir(parents=True)
            for i in range(3):
                values = np.stack([x + 40 * c, 2 * y + 20 * i, x + y], -1).astype(np.uint8)
                Image.fromarray(values).save(tmp_path / "data/miniimagenet" / split / name / f"{i}.png")
    augment = ("augment.flip=true", "augment.jitter=0.3", "normalize.std=[0.2,0.3,0.4]")
    monkeypatch.setenv("METACV_DATA_DIR", str(tmp_path / "data"))
    return ("algo=protonet", "dataset=miniimagenet", *SHORT, "way=3", "query=2", *augment)


def test_training_in_colour_with_augmentation_is_resumed_exactly(metacv, small_miniimagenet):
    assert metacv("train", *small_miniimagenet, "hydra.run.dir=whole")[::2] == (0, "")
    assert metacv("train", *small_miniimagenet, "steps=2", "hydra.run.dir=parts")[::2] == (0, "")
    assert metacv("train", "resume=parts", "steps=4")[::2] == (0, "")
    whole, parts = (load_checkpoint(run, "last.pt").content["algorithm"] for run in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_in_colour_keeps_its_normalization_and_draws_its_episodes_in_colour(metacv, small_miniimagenet):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert metacv("train", *small_miniimagenet, "hydra.run.dir=run")[::2] == (0, "")
    code, out, err = metacv("evaluate", "checkpoint=run", "episodes=5")
    assert (code, err) == (0, "")
    assert "MiniImageNet" in out
    assert load_checkpoint("run").config.normalize.std == [0.2, 0.3, 0.4]
    (events := EventAccumulator("run", {"images": 0})).Reload()
    with Image.open(io.BytesIO(events.Images("val/episode")[0].encoded_image_string)) as image:
        red, green, blue = image.convert("RGB").split()
    assert red.tobytes() != green.tobytes() != blue.tobytes()


def test_a_sweep_trains_on_files_in_every_job(metacv, small_miniimagenet):
    words = ("-m", *small_miniimagenet, "steps=1", "seed=0,1", "hydra.sweep.dir=sweep")
    assert metacv("train", *words)[0] == 0
    assert len(list(Path("sweep").glob("*/best.pt"))) == 2


@pytest.mark.usefixtures("may_be_at_chance")
def test_a_mixture_trains_and_is_evaluated_on_all_and_on_one_of_its_data_sets(metacv, own):
    sets = "dataset=[glyphs,image_folder]", "dataset.sets.image_folder.root=own", "dataset.weights=[1,3]"
    few = "dataset.sets.glyphs.classes={train:6,val:6,test:4}", "dataset.size=28", "way=3", "query=2"
    code, out, err = metacv("train", "algo=protonet", *SHORT, *sets, *few, "hydra.run.dir=run")
    assert (code, err) == (0, "")
    assert "Glyphs+ImageFolder, 3x28x28: train 19 classes" in out
    assert "Glyphs+ImageFolder test: 8 classes" in metacv("evaluate", "checkpoint=run", *EVALUATE)[1]
    one = "checkpoint=run", "dataset=image_folder", "dataset.root=own", *EVALUATE
    assert "ImageFolder test: 4 classes" in metacv("evaluate", *one)[1]
    code, _, err = metacv("evaluate", *one, "dataset.split_seed=1")
    assert code == 1
    assert "were used in training or validation of" in err
    assert err.endswith("; unseen_only=true leaves them out\n")
    add_classes(own)
    code, _, err = metacv("train", "resume=run", "steps=6")
    text = "run/last.pt: the data set is now split differently from this run; its folders must have the "
    text += "classes that they had at the start\n"
    assert (code, err) == (1, f"metacv: {text}")
    torch.save(torch.load("run/last.pt", weights_only=True) | {"splits": None}, "run/last.pt")  # an older run
    assert metacv("train", "resume=run", "steps=6")[0] == 0
