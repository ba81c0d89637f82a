"""The experiments of the papers: what they say, that one command runs them, and that the numbers shown are on file."""

import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from metacv import checkpoint
from metacv.data.bank import ImageBank
from metacv.data.omniglot import Omniglot
from metacv.model import build_dataset
from metacv.upgrade import upgrade

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "outputs/reference"
sys.path.insert(0, str(ROOT / "scripts"))
results_table = importlib.import_module("results_table")
reproduce = importlib.import_module("reproduce")

KEPT = sorted(path for path in REFERENCE.glob("*/*_*w*s") if path.is_dir())
CELLS = [(5, 1), (5, 5), (20, 1), (20, 5)]


@pytest.fixture
def composed(metacv):
    def compose(experiment: str) -> dict:
        code, out, err = metacv("train", f"experiment={experiment}", "--cfg", "job", "--resolve")
        assert (code, err) == (0, "")
        return OmegaConf.to_container(OmegaConf.create(out))

    return compose


def assert_says(config: dict, expected: dict) -> None:
    """Every entry of `expected`, however deep, stands in the config."""
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_says(config[name], value)
        else:
            assert config[name] == value, name


def as_tested(way: int, shot: int, query: int, episodes: int, norm: str) -> dict:
    return {"way": way, "shot": shot, "query": query, "episodes": episodes, "norm": norm, "seed": 0}


def as_trained(way: int, shot: int, query: int, meta_batch: int, steps: int) -> dict:
    named = {"train_way": way, "train_shot": shot, "train_query": query}
    return named | {"meta_batch": meta_batch, "steps": steps, "clip_value": None}


def omniglot(train: str, test: str, invert: bool = True, counts: tuple[int, int] = (1100, 100)) -> dict:
    counted = {"train": counts[0], "val": counts[1], "test": 423}
    rotations = {"train_rotation": train, "test_rotation": test}
    return {"split": "random", "split_seed": 0, "counts": counted, "size": 28, "invert": invert} | rotations


# No paper augments miniImageNet, and Relation Networks alone normalize it.
PLAIN = {
    "dataset": {"train_rotation": "none", "test_rotation": "none"},
    "augment": {"crop": 0, "flip": False, "jitter": 0.0},
    "normalize": {"mean": [0.0], "std": [1.0]},
}


@pytest.mark.parametrize(("way", "shot"), CELLS)
@pytest.mark.parametrize("method", ["maml", "fomaml"])
def test_maml_is_trained_as_in_its_paper(composed, method, way, shot):
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
    expected |= as_tested(way, shot, shot, 600, "transductive")
    expected |= as_trained(way, shot, shot, 32 if way == 5 else 16, 60000)
    assert_says(composed(f"omniglot/{method}_{way}w{shot}s"), expected)


@pytest.mark.parametrize(("way", "shot"), CELLS)
def test_reptile_is_trained_as_in_its_paper(composed, way, shot):
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
    expected |= as_tested(way, shot, 1, 10000, "transductive")
    assert_says(composed(f"omniglot/reptile_{way}w{shot}s"), expected | as_trained(way, 10, 1, 5, steps))


@pytest.mark.parametrize(("way", "shot"), CELLS)
def test_protonet_is_trained_as_in_its_paper(composed, way, shot):
    expected = {
        "algo": {"metric": "sqeuclidean", "temperature": 1.0},
        "backbone": {"channels": 64, "downsample": "max_pool", "padding": 1, "norm_scale": True, "running_stats": True},
        "dataset": omniglot("as_classes", "as_classes", counts=(1028, 172)),
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3, "weight_decay": 0.0},
        "schedule": {"step_size": 2000, "gamma": 0.5},
        "clip_norm": None,
    }
    expected |= as_tested(way, shot, 15, 1000, "inductive")
    assert_says(composed(f"omniglot/protonet_{way}w{shot}s"), expected | as_trained(60, shot, 5, 1, 20000))


@pytest.mark.parametrize(("way", "shot", "query"), [(5, 1, 19), (5, 5, 15), (20, 1, 10), (20, 5, 5)])
def test_relationnet_is_trained_as_in_its_paper(composed, way, shot, query):
    expected = {
        "algo": {"relation": "conv", "hidden": 8},
        "backbone": {"channels": 64, "downsample": ["max_pool", "max_pool", "none", "none"], "padding": [0, 0, 1, 1]},
        "dataset": omniglot("per_episode", "per_episode"),
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3},
        "schedule": {"step_size": 100000, "gamma": 0.5},
        "clip_norm": 0.5,
    }
    expected |= as_tested(way, shot, shot, 10000, "transductive")
    assert_says(composed(f"omniglot/relationnet_{way}w{shot}s"), expected | as_trained(way, shot, query, 1, 1000000))


@pytest.mark.parametrize("shot", [1, 5])
@pytest.mark.parametrize("method", ["maml", "fomaml"])
def test_maml_on_miniimagenet_is_trained_as_in_its_paper(composed, method, shot):
    expected = {
        "algo": {"inner_lr": 0.01, "inner_steps": 5, "eval_inner_steps": 10, "first_order": method == "fomaml"},
        "backbone": {"channels": 32, "downsample": "max_pool", "norm_scale": False, "running_stats": False,
                     "global_pool": False},
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3},
        "schedule": {"_target_": "torch.optim.lr_scheduler.ConstantLR", "factor": 1.0},
    }  # fmt: skip
    expected |= as_tested(5, shot, shot, 600, "transductive") | PLAIN
    expected |= as_trained(5, shot, 15, 4 if shot == 1 else 2, 60000) | {
        "clip_value": pytest.approx(10 * shot / 75, rel=1e-4)
    }
    assert_says(composed(f"miniimagenet/{method}_5w{shot}s"), expected)


@pytest.mark.parametrize("shot", [1, 5])
def test_reptile_on_miniimagenet_is_trained_as_in_its_paper(composed, shot):
    inner = {"inner_lr": 1e-3, "inner_steps": 8, "inner_batch": 10, "eval_inner_steps": 50}
    expected = {
        "algo": inner | {"eval_inner_batch": 5 if shot == 1 else 15, "inner_optimizer": "adam"},
        "backbone": {"channels": 32, "downsample": "max_pool", "ceil_pool": True, "running_stats": False,
                     "norm_scale": True},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 1.0},
        "schedule": {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 100000},
    }  # fmt: skip
    expected |= as_tested(5, shot, 1, 10000, "transductive") | PLAIN
    assert_says(composed(f"miniimagenet/reptile_5w{shot}s"), expected | as_trained(5, 15, 1, 5, 100000))


@pytest.mark.parametrize(("shot", "way"), [(1, 30), (5, 20)])
def test_protonet_on_miniimagenet_is_trained_as_in_its_paper(composed, shot, way):
    expected = {
        "algo": {"metric": "sqeuclidean", "temperature": 1.0},
        "backbone": {"channels": 64, "downsample": "max_pool", "running_stats": True, "global_pool": False},
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3},
        "schedule": {"step_size": 2000, "gamma": 0.5},
    }
    expected |= as_tested(5, shot, 15, 600, "inductive") | PLAIN
    assert_says(composed(f"miniimagenet/protonet_5w{shot}s"), expected | as_trained(way, shot, 15, 1, 20000))


@pytest.mark.parametrize(("shot", "query"), [(1, 15), (5, 10)])
def test_relationnet_on_miniimagenet_is_trained_as_in_its_paper(composed, shot, query):
    expected = {
        "algo": {"relation": "conv", "hidden": 8},
        "backbone": {"channels": 64, "downsample": ["max_pool", "max_pool", "none", "none"], "padding": [0, 0, 1, 1]},
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3},
        "schedule": {"step_size": 100000, "gamma": 0.5},
        "clip_norm": 0.5,
    }
    expected |= as_tested(5, shot, 15, 6000, "transductive") | PLAIN
    expected |= {"normalize": {"mean": [0.92206], "std": [0.08426]}}
    assert_says(composed(f"miniimagenet/relationnet_5w{shot}s"), expected | as_trained(5, shot, query, 1, 500000))


def all_of_omniglot() -> ImageBank:
    """1623 characters x 20 images of noise under made-up names."""
    names = tuple(f"images_background/Alphabet/character{c:04d}" for c in range(1623))
    images = torch.randint(0, 256, (1623 * 20, 1, 28, 28), dtype=torch.uint8)
    return ImageBank("omniglot", images, torch.arange(0, 1624 * 20, 20), names)


def test_all_experiments_test_on_the_same_characters_and_none_has_them_in_training(composed, monkeypatch, data_dir):
    everything = all_of_omniglot()
    monkeypatch.setattr(Omniglot, "_decode", lambda self: everything)
    shared = set()
    for experiment in [name for name in reproduce.EXPERIMENTS if name.startswith("omniglot/")]:
        dataset = build_dataset(composed(experiment), str(data_dir / "noise"))
        test = dataset.load("test").class_names
        shared.add(test)
        assert not {*dataset.load("train").class_names, *dataset.load("val").class_names} & {*test}
    assert [len(characters) for characters in shared] == [423]


def test_the_experiments_are_every_method_at_every_task():
    files = {f"{path.parent.name}/{path.stem}" for path in (ROOT / "configs/experiment").glob("*/*.yaml")}
    assert files == {*reproduce.EXPERIMENTS}
    assert len(files) == 20 + 10


def test_the_results_and_the_heads_of_the_experiments_are_what_the_files_say():
    for path, text in results_table.files().items():
        assert path.read_text() == text, f"{path.name}: run scripts/results_table.py"


def test_the_table_compares_with_the_papers_interval_and_says_what_was_not_run(composed, tmp_path, monkeypatch):
    monkeypatch.setattr(results_table, "ROOT", tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    place = tmp_path / "outputs/reference/omniglot/reptile_5w1s"
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(
        OmegaConf.to_yaml(composed("omniglot/reptile_5w1s") | {"steps": 400, "episodes": 50})
    )
    (place / "metrics.jsonl").write_text("")
    (place / "best.pt").write_text("weights")
    of = {"checkpoint_sha256": hashlib.sha256(b"weights").hexdigest()}
    overrides = ["experiment=omniglot/reptile_5w1s", "data_dir=here", "steps=300", "episodes=50", "steps=400"]
    kept = {
        "result": {
            "transductive": {"accuracy": 0.9765, "ci95": 0.001} | of,
            "inductive": {"accuracy": 0.95, "ci95": 0.002} | of,
        },
        "common": {"accuracy": 0.9, "ci95": 0.01, "episodes": 600} | of,
        "train": {"steps": 400, "seconds": 600, "device": "abacus", "overrides": overrides},
    }
    for name, content in kept.items():
        (place / f"{name}.json").write_text(json.dumps(content))
    written = {f"{path.parent.name}/{path.name}": text for path, text in results_table.files().items()}
    page = written[f"{tmp_path.name}/RESULTS.md"].splitlines()
    rows = [line for line in page if "Reptile | 5w1s" in line][:2]
    link = "(outputs/reference/omniglot/reptile_5w1s)"
    # 97.65 is within 97.68 ± 0.04; 95.00 is not within 95.39 ± 0.09
    assert f"| 97.68 ± 0.04 | [97.65 ± 0.10]{link} | -0.03 | yes | 400 of 100000 | 10 min | abacus |" in rows[0]
    assert f"| 95.39 ± 0.09 | [95.00 ± 0.20]{link} | -0.39 | no | 400 of 100000 | 10 min | abacus |" in rows[1]
    assert [results_table.rounding(number) for number in ("98.9", "97.68")] == [0.05, 0.005]
    assert "| Reptile | 90.00 ± 1.00 % (600 episodes) | not run | not run | not run |" in page
    assert sum("| not run |" in line for line in page) == (5 * 4 - 1) + (4 - 1) + 5 + (5 * 2) + 2 + 5
    head = written["omniglot/reptile_5w1s.yaml"].splitlines()
    assert (
        "# measured  97.65 ± 0.10 %; inductive 95.00 ± 0.20 %; under the common protocol 90.00 ± 1.00 % (600 episodes)"
        in head
    )
    assert "# trained   400 of 100000 steps in 10 min, abacus" in head
    assert "# command   python scripts/reproduce.py omniglot/reptile_5w1s -- steps=400 episodes=50" in head
    assert "- `omniglot/reptile_5w1s`: `steps=400 episodes=50`" in page
    assert "inductive, rotation none, 50 episodes" in rows[1]
    assert "# measured  not run" in written["omniglot/reptile_5w5s.yaml"]

    (place / "best.pt").write_text("other weights")
    assert "97.65" not in "".join(results_table.files().values())


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.relative_to(REFERENCE).as_posix())
def test_a_kept_model_is_small_whole_and_the_one_that_was_measured(folder):
    best = folder / "best.pt"
    assert best.stat().st_size < 1_000_000
    content = checkpoint.load(best)
    assert content.keys() - {"splits"} == checkpoint.WEIGHTS | {"validation"}
    assert content.get("splits") is None  # which are of people's own images
    assert OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")) == content["config"]
    digest = hashlib.sha256(best.read_bytes()).hexdigest()
    result, common = (json.loads((folder / f"{name}.json").read_text()) for name in ("result", "common"))
    result = results_table.by_norm(result)
    assert content["config"]["norm"] in result
    measured = [*result.values(), common]
    assert {found["checkpoint_sha256"] for found in measured} == {digest}
    assert {found["checkpoint"] for found in measured} == {best.relative_to(ROOT).as_posix()}
    assert {found["step"] for found in measured} == {content["step"]}
    config = content["config"]
    protocol = {name: config[name] for name in ("way", "shot", "query", "episodes")}
    protocol |= {"split": "test", "seed": 0, "rotation": config["dataset"]["test_rotation"]}
    assert all(found.items() >= protocol.items() for found in result.values())
    train = json.loads((folder / "train.json").read_text())
    assert {name: train[name] for name in content["validation"]} == content["validation"]
    shared = {"split": "test", "query": 15, "episodes": 2000, "norm": "inductive", "rotation": "none", "seed": 0}
    assert common.items() >= (shared | {"way": config["way"], "shot": config["shot"]}).items()
    assert (folder / "metrics.jsonl").stat().st_size > 0


def test_models_of_one_task_were_compared_on_the_same_episodes():
    hashes: dict[tuple, set[str]] = {}
    for folder in KEPT:
        config = checkpoint.load(folder / "best.pt")["config"]
        common = json.loads((folder / "common.json").read_text())
        # the hash covers the pixels, and Reptile's are not inverted
        dataset = config["dataset"]
        key = (dataset["_target_"], config["way"], config["shot"], dataset.get("invert"))
        same = hashes.setdefault(key, set())
        same.add(common["episodes_sha256"])
    assert hashes
    assert all(len(same) == 1 for same in hashes.values())


@pytest.mark.parametrize("method", results_table.LOSS_SCALE)
def test_the_two_runs_of_the_loss_scale_differ_in_that_alone(method):
    folders = (REFERENCE / "omniglot" / folder for folder in results_table.LOSS_SCALE[method])
    one, other = (upgrade(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))) for folder in folders)
    assert [config["algo"].pop("inner_loss") for config in (one, other)] == ["mean", "sum_per_shot"]
    assert [config.pop("eval_every") for config in (one, other)] == [400, 400]
    assert {**one, "steps": 0} == {**other, "steps": 0}


SHORT = ["backbone.channels=4", "train_way=5", "train_query=2", "eval_every=2", "eval_episodes=4", "episodes=5"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """reproduce.py in this process on made-up characters: run("omniglot/protonet_5w1s", "--", "steps=2")."""
    monkeypatch.setenv("METACV_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(Omniglot, "_decode", lambda self: all_of_omniglot())
    content = OmegaConf.to_container(OmegaConf.load(ROOT / "configs/dataset/omniglot.yaml"))
    build_dataset({"dataset": content | {"split": "random"}}, str(tmp_path)).load("test")  # leaves the cache
    folders = ["--runs", str(tmp_path / "some runs"), "--reference", str(tmp_path / "kept"), "--common-episodes", "6"]

    def run(*words: str) -> Path:
        cut = words.index("--")
        settings = [*SHORT, *words[cut + 1 :]]
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *words[:cut], *folders, "--", *settings])
        reproduce.main()
        return tmp_path / "kept"

    return run


def test_reproduce_goes_on_with_a_run_and_keeps_all_that_the_table_needs(run, monkeypatch, capsys):
    run("omniglot/protonet_5w1s", "--", "steps=2")
    folder = run("omniglot/protonet_5w1s", "--", "steps=4") / "omniglot/protonet_5w1s"
    assert sorted(path.name for path in folder.iterdir()) == sorted(results_table.FILES)
    train, result, common = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("train", "result", "common")
    )
    assert train["steps"] == 4
    assert [result[name] for name in ("episodes", "query", "rotation", "norm")] == [5, 15, "as_classes", "inductive"]
    assert [common[name] for name in ("episodes", "query", "rotation", "norm")] == [6, 15, "none", "inductive"]
    kept = results_table.Kept(folder)
    assert kept
    assert kept.changes == [*SHORT, "steps=4"]

    called = []
    monkeypatch.setattr(reproduce, "metacv", lambda *words: called.append(words[0]))
    run("omniglot/protonet_5w1s", "--", "steps=4")
    assert called == ["train"]  # which finds nothing to do; both evaluations are of this checkpoint
    with pytest.raises(SystemExit):
        run("omniglot/protonet_5w1s", "--")
    assert "was begun with steps=4: say so again" in capsys.readouterr().err


def test_reproduce_does_not_replace_a_longer_run(run, tmp_path, capsys):
    folder = run("omniglot/protonet_5w1s", "--", "steps=4") / "omniglot/protonet_5w1s"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "some runs").rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit):
        run("omniglot/protonet_5w1s", "--", "steps=2")
    assert "keeps a longer run, of 4 steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("omniglot/protonet_5w1s", "--", "steps=6", "algo.temperature=2")
    assert "was trained without algo.temperature=2: give another --name" in capsys.readouterr().err
    assert not (tmp_path / "some runs/omniglot/protonet_5w1s/last.pt").exists()  # said before anything is trained
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_reproduce_lets_a_run_serve_an_experiment_that_is_trained_in_the_same_way(run, tmp_path, capsys):
    run("omniglot/protonet_5w1s", "--", "steps=4", "eval_every=4")
    kept = run("omniglot/protonet_20w1s", "--run-of", "omniglot/protonet_5w1s", "--", "steps=4") / "omniglot"
    one, other = (checkpoint.load(kept / f"protonet_{way}w1s/best.pt") for way in (5, 20))
    assert all(torch.equal(value, other["algorithm"][name]) for name, value in one["algorithm"].items())
    assert (other["config"]["way"], other["step"]) == (20, 4)
    folder = results_table.Kept(kept / "protonet_20w1s")
    assert folder
    assert folder.train["run_of"] == "protonet_5w1s"
    assert {name: folder.train[name] for name in other["validation"]} == other["validation"]
    # and that is what training it would have given
    run("omniglot/protonet_20w1s", "--name", "omniglot/trained", "--", "steps=4", "eval_every=4")
    trained = checkpoint.load(kept / "trained/best.pt")
    assert all(torch.equal(value, other["algorithm"][name]) for name, value in trained["algorithm"].items())
    assert trained["validation"] == other["validation"]

    with pytest.raises(SystemExit):
        run("omniglot/protonet_20w5s", "--run-of", "omniglot/protonet_5w1s", "--", "steps=4")
    assert "--run-of omniglot/protonet_5w1s: train_shot is 5 but was trained with 1" in capsys.readouterr().err


def test_reproduce_goes_on_after_an_experiment_that_fails(monkeypatch, tmp_path, capsys):
    tried = []

    def fail(_, name, *__):
        tried.append(name)
        if len(tried) == 2:
            raise reproduce.Failed("metacv train ended with an error")

    monkeypatch.setattr(reproduce, "reproduce", fail)
    monkeypatch.setattr(
        sys, "argv", ["reproduce.py", "omniglot/maml_5w1s", "omniglot/reptile_5w1s", "miniimagenet/maml_5w5s"]
    )
    with pytest.raises(SystemExit, match="failed: omniglot/reptile_5w1s"):
        reproduce.main()
    assert tried == ["omniglot/maml_5w1s", "omniglot/reptile_5w1s", "miniimagenet/maml_5w5s"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_reproduce_waits_for_a_stopped_command_to_save(tmp_path, number):
    """The command is a stand-in that takes a second to save."""
    place = tmp_path / "metacv"
    place.mkdir()
    (place / "__init__.py").write_text("")
    (place / "__main__.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(number, _):\n"
        "    time.sleep(1)\n"
        "    pathlib.Path('saved').touch()\n"
        "    sys.exit(128 + number)\n"
        "signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'scripts')!r}, {str(ROOT)!r}]; import reproduce; reproduce.metacv()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
        assert child.poll() is None
    if number == signal.SIGINT:  # as a terminal sends it: to all
        os.killpg(child.pid, number)
    else:
        child.send_signal(number)
    assert child.wait(timeout=20) == 128 + number
    assert (tmp_path / "saved").exists()


def test_reproduce_names_what_there_is():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/reproduce.py", "omniglot/maml_6w1s"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.search(r"there is no experiment omniglot/maml_6w1s; one of: omniglot/maml_5w1s, ", done.stderr)
