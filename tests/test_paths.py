"""Relative paths are resolved in the folder of the command that gave them, also if the run is used from another."""

import json
import shutil
import typing
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Any

import pytest
from conftest import TRAIN, assert_same, bank_of
from hydra import compose, initialize_config_dir
from PIL import Image
from test_values import SETTINGS, Setting

from metacv import CONFIG_DIR
from metacv.config import TrainConfig, is_path, typed, with_paths
from metacv.errors import UserError
from metacv.model import Checkpoint, Training, load_checkpoint
from metacv.results import read_results
from metacv.run import resumed
from metacv.train import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("may_be_at_chance")]  # models of noise


def is_text(hint: object) -> bool:
    return hint is str or (typing.get_origin(hint) in (UnionType, typing.Union) and str in typing.get_args(hint))


TEXTS = [own for own in SETTINGS if own.command == "train" and is_text(own.hint)]
PATHS = [own for own in TEXTS if is_path(own.name)]
OTHER_TEXTS = {  # names, what is read only once, and what is in data_dir
    *(
        "device",
        "backbone.name",
        "backbone.weights",
        "backbone.layer",
        "backbone.pool",
        "dataset.name",
        "name",
        "init",
        "resume",
    ),
    *("dataset.split_dir", "dataset.split_files.train", "dataset.split_files.val", "dataset.split_files.test"),
}
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda own: own.name)


def test_every_text_setting_is_classified_as_a_path_or_not():
    assert {own.name for own in TEXTS} - {own.name for own in PATHS} == OTHER_TEXTS
    assert {own.name for own in PATHS} >= {"data_dir", "algo.teacher", "dataset.root", "dataset.split_file"}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders a and b, each with a folder `place`; the current one is a."""
    for name in ("a", "b"):
        (tmp_path / name / "place").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        yield tmp_path / "a", tmp_path / "b"


def begun(*words: str) -> Checkpoint:
    """Return the last.pt of a run that was started with these words in the current folder."""
    config = typed(compose("train", [*words]), TrainConfig)
    return Checkpoint(Path("last.pt"), config, (1, 28, 28), 0, Training(), None, {"overrides": [*words]})


def value(config: TrainConfig, path: Setting) -> str:
    found: dict[str, str] = {}
    with_paths(vars(config), found.setdefault)
    return found[path.name]


@each_path
def test_a_run_resumed_from_another_folder_keeps_its_paths(folders, monkeypatch, path):
    source = begun(*path.words, f"{path.name}=place")
    assert value(source.config, path) == str(folders[0] / "place")
    monkeypatch.chdir(folders[1])
    assert resumed(source, ["patience=3"])[0] == replace(source.config, patience=3)


@each_path
def test_a_new_relative_path_is_resolved_in_the_folder_of_that_command(folders, monkeypatch, path):
    source = begun(*path.words, f"{path.name}=place")
    monkeypatch.chdir(folders[1])
    config, words = resumed(source, [f"{path.name}=place"])
    assert value(config, path) == str(folders[1] / "place")
    assert words[-1] == f"{path.name}=place"


@each_path
def test_a_relative_path_of_an_earlier_version_works_from_the_original_folder(folders, path):
    source = begun(*path.words, f"{path.name}=place")
    old = TrainConfig(**with_paths(vars(source.config), lambda name, now: "place" if name == path.name else now))
    assert resumed(replace(source, config=old), [])[0] == source.config


def test_the_data_dir_in_the_environment_applies_to_the_current_command(folders, monkeypatch):
    source = begun()
    monkeypatch.setenv("METACV_DATA_DIR", "place")
    assert resumed(source, [])[0].data_dir == str(folders[0] / "place")


def test_a_resumed_run_finds_character_lists_in_its_original_data_dir(folders, monkeypatch):
    source = begun("dataset=omniglot", "dataset.split=file", "dataset.split_dir=mine", "data_dir=place")
    monkeypatch.chdir(folders[1])
    config, _ = resumed(source, [])
    assert (config.data_dir, config.dataset["split_dir"]) == (str(folders[0] / "place"), "mine")


def test_a_run_with_a_teacher_cannot_resume_without_it(folders):
    source = begun("algo=classifier", "algo.teacher=place")
    with pytest.raises(UserError, match=r"^resume: algo.teacher is None, but last.pt was trained with /.*/a/place$"):
        resumed(source, ["algo.teacher=null"])


IMAGES = ("dataset=image_folder", "dataset.size=16", "dataset.color=false", "way=2")
OWN = ("algo=classifier", *TRAIN[1:], *IMAGES, "schedule=constant", "meta_batch=16")
RELATIVE = ("algo.teacher=first", "data_dir=data", "dataset.root=own", "dataset.split_file=own.json")


@pytest.fixture
def one_and_another(tmp_path, monkeypatch, metacv) -> list[Path]:
    """Two folders, each with images `own`, their split `own.json` and a run `first`: same names, different content."""
    names = [f"c{c:02}" for c in range(12)]
    images = bank_of([8] * 12, shape=(1, 16, 16)).images.view(12, 8, 16, 16).numpy()
    folders = [tmp_path / "one", tmp_path / "another"]
    for seed, folder in enumerate(folders):
        for c, name in enumerate(names):
            (folder / "own" / name).mkdir(parents=True)
            for i in range(8):
                Image.fromarray(images[c - seed, i]).save(folder / "own" / name / f"{i}.png")
        split = {"train": names[:6], "val": names[6:9], "test": names[9:]}
        (folder / "own.json").write_text(json.dumps(split))
        monkeypatch.chdir(folder)
        (folder / "first").mkdir()
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            train(compose("train", [*OWN, *RELATIVE[1:], "steps=1", f"seed={seed}"]), Path("first"), [])
    return folders


@pytest.mark.usefixtures("may_be_at_chance")
def test_commands_give_the_same_results_from_another_folder(metacv, monkeypatch, one_and_another, tmp_path):
    a, b = one_and_another
    shutil.copytree(a, tmp_path / "equal")
    states: list[dict[str, Any]] = []
    for folder in (a, tmp_path / "equal"):
        monkeypatch.chdir(folder)
        assert metacv("train", *OWN, f"init={folder}/first", *RELATIVE, "hydra.run.dir=run")[::2] == (0, "")
        states.append(load_checkpoint("run", "last.pt").content)
    for part in ("algorithm", "optimizer", "sampler", "random", "splits"):
        assert_same(states[0][part], states[1][part])

    (empty := tmp_path / "empty").mkdir()
    for folder in (a, b, empty):
        monkeypatch.chdir(folder)
        shutil.copytree(a / "run", "copy")
        assert metacv("train", "resume=copy", "steps=6")[::2] == (0, "")
        states.append(load_checkpoint("copy", "last.pt").content)
    assert [path.name for path in empty.iterdir()] == ["copy"]
    for state in states[-2:]:
        assert_same(state, states[-3])

    measured = []
    for folder in (a, b):
        monkeypatch.chdir(folder)
        words = (f"data_dir={a}/data", "episodes=4")
        assert metacv("evaluate", f"checkpoint={a}/run", *words, "hydra.run.dir=test")[::2] == (0, "")
        assert metacv("compare", f"{a}/run", f"{a}/first", *words, "hydra.run.dir=both")[::2] == (0, "")
        words = (f"checkpoint={a}/run", f"support={a}/own", f"query={a}/own/c00", "save=kept.pt")
        assert metacv("predict", *words, "hydra.run.dir=labels")[0] == 0
        results = [own for place in ("test", "both") for own in read_results(Path(place) / "result.json").results]
        exact = [(own.accuracy, own.episodes_sha256) for own in results]
        measured.append((exact, Path("labels/predictions.csv").read_bytes()))
    assert measured[0] == measured[1]
    assert str(a) in str(load_checkpoint("copy").config)
    assert str(a) not in str(load_checkpoint("kept.pt").config)  # a model to be given away
