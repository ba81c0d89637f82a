"""The experiments: their settings are those of the papers, and no test character is used in training."""

import sys
from pathlib import Path

import pytest
import torch

from metacv import CONFIG_DIR
from metacv.config import to_dict
from metacv.data.bank import ImageBank
from metacv.data.omniglot import Omniglot
from metacv.model import build_dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from results_table import EXPERIMENTS, experiment_configs

pytestmark = pytest.mark.slow

CELLS = [(5, 1), (5, 5), (20, 1), (20, 5)]


def settings(experiment: str) -> dict:
    return to_dict(experiment_configs()[experiment], with_local=True)


def assert_contains(config: dict, expected: dict) -> None:
    """Every entry of `expected`, however deep, is in the config."""
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_contains(config[name], value)
        else:
            assert config[name] == value, name


def protocol(way: int, shot: int, query: int, episodes: int, batch_norm: str) -> dict:
    return {"way": way, "shot": shot, "query": query, "episodes": episodes, "batch_norm": batch_norm, "seed": 0}


def training(way: int, shot: int, query: int, meta_batch: int, steps: int) -> dict:
    names = {"train_way": way, "train_shot": shot, "train_query": query}
    return names | {"meta_batch": meta_batch, "steps": steps, "clip_value": None}


def omniglot(train: str, test: str, invert: bool = True, counts: tuple[int, int] = (1100, 100)) -> dict:
    classes = {"train": counts[0], "val": counts[1], "test": 423}
    rotations = {"train_rotation": train, "test_rotation": test}
    return {"split": "random", "split_seed": 0, "counts": classes, "size": 28, "invert": invert} | rotations


# On miniImageNet no paper augments the images, and only Relation Networks normalize them.
PLAIN = {
    "dataset": {"train_rotation": "none", "test_rotation": "none"},
    "augment": {"crop": 0, "flip": False, "jitter": 0.0},
    "normalize": {"mean": [0.0], "std": [1.0]},
}


@pytest.mark.parametrize(("way", "shot"), CELLS)
@pytest.mark.parametrize("method", ["maml", "fomaml"])
def test_maml_omniglot_settings_are_those_of_the_paper(method, way, shot):
    inner = (0.4, 1, 3) if way == 5 else (0.1, 5, 5)
    algo = dict(zip(("inner_lr", "inner_steps", "eval_inner_steps"), inner, strict=True))
    expected = {
        "algo": algo | {"first_order": method == "fomaml", "inner_loss": "mean", "adapt_norm": False},
        "backbone": {"channels": 64, "downsample": "stride", "global_pool": True, "norm_scale": False,
                     "running_stats": False},
        "dataset": omniglot("per_class", "per_class"),
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3},
        "schedule": {"_target_": "torch.optim.lr_scheduler.ConstantLR", "factor": 1.0},
        "clip_norm": None,
    }  # fmt: skip
    expected |= protocol(way, shot, shot, 600, "transductive")
    expected |= training(way, shot, shot, 32 if way == 5 else 16, 60000)
    assert_contains(settings(f"omniglot/{method}_{way}w{shot}s"), expected)


@pytest.mark.parametrize(("way", "shot"), CELLS)
def test_reptile_omniglot_settings_are_those_of_the_paper(way, shot):
    names = ("inner_lr", "inner_steps", "inner_batch", "eval_inner_steps", "eval_inner_batch")
    inner = (1e-3, 5, 10, 50, 5) if way == 5 else (5e-4, 10, 20, 50, 10)
    steps = 100000 if way == 5 else 200000
    expected = {
        "algo": dict(zip(names, inner, strict=True)) | {"inner_optimizer": "adam", "reset_moments": False},
        "backbone": {"channels": 64, "downsample": "stride", "global_pool": False, "running_stats": False},
        "dataset": omniglot("as_classes", "none", invert=False),
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 1.0},
        "schedule": {"start_factor": 1.0, "end_factor": 0.0, "total_iters": steps},
        "clip_norm": None,
    }
    expected |= protocol(way, shot, 1, 10000, "transductive")
    assert_contains(settings(f"omniglot/reptile_{way}w{shot}s"), expected | training(way, 10, 1, 5, steps))


@pytest.mark.parametrize(("way", "shot"), CELLS)
def test_protonet_omniglot_settings_are_those_of_the_paper(way, shot):
    expected = {
        "algo": {"metric": "sqeuclidean", "temperature": 1.0},
        "backbone": {"channels": 64, "downsample": "max_pool", "padding": 1, "norm_scale": True, "running_stats": True},
        "dataset": omniglot("as_classes", "as_classes", counts=(1028, 172)),
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3, "weight_decay": 0.0},
        "schedule": {"step_size": 2000, "gamma": 0.5},
        "clip_norm": None,
    }
    expected |= protocol(way, shot, 15, 1000, "inductive")
    assert_contains(settings(f"omniglot/protonet_{way}w{shot}s"), expected | training(60, shot, 5, 1, 20000))


@pytest.mark.parametrize(("way", "shot", "query"), [(5, 1, 19), (5, 5, 15), (20, 1, 10), (20, 5, 5)])
def test_relationnet_omniglot_settings_are_those_of_the_paper(way, shot, query):
    expected = {
        "algo": {"relation": "conv", "hidden": 8},
        "backbone": {"channels": 64, "downsample": ["max_pool", "max_pool", "none", "none"], "padding": [0, 0, 1, 1]},
        "dataset": omniglot("per_episode", "per_episode"),
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3},
        "schedule": {"step_size": 100000, "gamma": 0.5},
        "clip_norm": 0.5,
    }
    expected |= protocol(way, shot, shot, 10000, "transductive")
    assert_contains(settings(f"omniglot/relationnet_{way}w{shot}s"), expected | training(way, shot, query, 1, 1000000))


@pytest.mark.parametrize("shot", [1, 5])
@pytest.mark.parametrize("method", ["maml", "fomaml"])
def test_maml_miniimagenet_settings_are_those_of_the_paper(method, shot):
    expected = {
        "algo": {"inner_lr": 0.01, "inner_steps": 5, "eval_inner_steps": 10, "first_order": method == "fomaml"},
        "backbone": {"channels": 32, "downsample": "max_pool", "norm_scale": False, "running_stats": False,
                     "global_pool": False},
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3},
        "schedule": {"_target_": "torch.optim.lr_scheduler.ConstantLR", "factor": 1.0},
    }  # fmt: skip
    expected |= protocol(5, shot, shot, 600, "transductive") | PLAIN
    expected |= training(5, shot, 15, 4 if shot == 1 else 2, 60000) | {
        "clip_value": pytest.approx(10 * shot / 75, rel=1e-4)
    }
    assert_contains(settings(f"miniimagenet/{method}_5w{shot}s"), expected)


@pytest.mark.parametrize("shot", [1, 5])
def test_reptile_miniimagenet_settings_are_those_of_the_paper(shot):
    inner = {"inner_lr": 1e-3, "inner_steps": 8, "inner_batch": 10, "eval_inner_steps": 50}
    expected = {
        "algo": inner | {"eval_inner_batch": 5 if shot == 1 else 15, "inner_optimizer": "adam"},
        "backbone": {"channels": 32, "downsample": "max_pool", "ceil_pool": True, "running_stats": False,
                     "norm_scale": True},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 1.0},
        "schedule": {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 100000},
    }  # fmt: skip
    expected |= protocol(5, shot, 1, 10000, "transductive") | PLAIN
    assert_contains(settings(f"miniimagenet/reptile_5w{shot}s"), expected | training(5, 15, 1, 5, 100000))


@pytest.mark.parametrize(("shot", "way"), [(1, 30), (5, 20)])
def test_protonet_miniimagenet_settings_are_those_of_the_paper(shot, way):
    expected = {
        "algo": {"metric": "sqeuclidean", "temperature": 1.0},
        "backbone": {"channels": 64, "downsample": "max_pool", "running_stats": True, "global_pool": False},
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3},
        "schedule": {"step_size": 2000, "gamma": 0.5},
    }
    expected |= protocol(5, shot, 15, 600, "inductive") | PLAIN
    assert_contains(settings(f"miniimagenet/protonet_5w{shot}s"), expected | training(way, shot, 15, 1, 20000))


@pytest.mark.parametrize(("shot", "query"), [(1, 15), (5, 10)])
def test_relationnet_miniimagenet_settings_are_those_of_the_paper(shot, query):
    expected = {
        "algo": {"relation": "conv", "hidden": 8},
        "backbone": {"channels": 64, "downsample": ["max_pool", "max_pool", "none", "none"], "padding": [0, 0, 1, 1]},
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3},
        "schedule": {"step_size": 100000, "gamma": 0.5},
        "clip_norm": 0.5,
    }
    expected |= protocol(5, shot, 15, 6000, "transductive") | PLAIN
    expected |= {"normalize": {"mean": [0.92206], "std": [0.08426]}}
    assert_contains(settings(f"miniimagenet/relationnet_5w{shot}s"), expected | training(5, shot, query, 1, 500000))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_has_the_number_of_its_own_paper(experiment):
    config = experiment_configs()[experiment]
    modes = [entry["batch_norm"] for entry in config.paper]
    assert modes == [config.batch_norm] + ["inductive"] * ("/reptile" in experiment)
    for entry in config.paper:
        assert entry.keys() == {"accuracy", "ci95", "batch_norm", "source"}
        assert 20 < entry["accuracy"] < 100  # in %
        assert entry["ci95"] is None or 0 < entry["ci95"] < 2
    # and none is inherited from the experiment that it is based on
    assert "paper:" in (CONFIG_DIR / "experiment" / f"{experiment}.yaml").read_text()


def test_omniglot_experiments_share_their_test_characters_and_train_on_none_of_them(monkeypatch, tmp_path):
    names = tuple(f"images_background/Alphabet/character{c:04d}" for c in range(1623))
    characters = ImageBank("omniglot", torch.zeros(1623, 1, 1, 1, dtype=torch.uint8), torch.arange(1624), names)
    monkeypatch.setattr(Omniglot, "_decode", lambda self: characters)
    tests = set()
    for experiment in [name for name in EXPERIMENTS if name.startswith("omniglot/")]:
        dataset = build_dataset(experiment_configs()[experiment].dataset, str(tmp_path))
        train, val, test = (dataset.load(split).class_names for split in ("train", "val", "test"))
        assert not {*train, *val} & {*test}
        tests.add(test)
    assert [len(test) for test in tests] == [423]


def test_every_file_is_an_experiment_of_the_table():
    files = {f"{path.parent.name}/{path.stem}" for path in (CONFIG_DIR / "experiment").glob("*/*.yaml")}
    assert files == {*EXPERIMENTS}
    others = ("classifier", "_init_", "_fast_", "mamlpp")
    papers = [name for name in files if name.startswith(("omniglot/", "miniimagenet/"))]
    papers = [name for name in papers if not any(other in name for other in others)]
    assert len(papers) == 20 + 10


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if "_fast_" in name])
def test_a_faster_training_is_tested_as_in_the_paper(name):
    own, usual = (experiment_configs()[one] for one in (name, name.replace("_fast", "")))
    for setting in ("paper", "way", "shot", "query", "episodes", "batch_norm", "vary", "algo", "backbone"):
        assert getattr(own, setting) == getattr(usual, setting), setting
    for setting in ("split", "split_seed", "counts", "test_rotation", "invert", "size", "resample"):
        assert own.dataset[setting] == usual.dataset[setting], setting
