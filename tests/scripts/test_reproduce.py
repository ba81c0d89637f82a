"""reproduce.py: trains, tests and keeps an experiment, continues after a stop, and never replaces better results."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from metacv import cli
from metacv.data.bank import ImageBank
from metacv.data.omniglot import Omniglot
from metacv.model import load_checkpoint
from metacv.results import read_results

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import reproduce
import results_table

pytestmark = pytest.mark.slow

SCRIPTS = Path(reproduce.__file__).parent
SHORT = ["backbone.channels=4", "train_way=5", "train_query=2", "eval_every=2", "eval_episodes=4", "episodes=5"]
STEPS = ["steps=4", "eval_every=4"]
NAME = "omniglot/protonet_5w1s"


def in_this_process(*words: str) -> None:
    """Instead of reproduce.metacv, which starts a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["metacv", *words])
        patch.setenv("HYDRA_FULL_ERROR", "0")
        with pytest.raises(SystemExit) as stop:
            cli.main()
    if stop.value.code:
        raise reproduce.CommandFailed(f"metacv {words[0]} exited with an error")


def not_called(*words: str) -> None:
    raise AssertionError(words)


@dataclass
class Place:
    """A folder where reproduce.py runs on made-up characters."""

    folder: Path

    @property
    def kept(self) -> Path:
        return self.folder / "kept"

    @property
    def runs(self) -> Path:
        return self.folder / "some runs, (a)=b's"

    def reproduce(self, *words: str, metacv: Callable[..., None] = in_this_process) -> None:
        """reproduce("omniglot/protonet_5w1s", "--", "steps=2")"""
        cut = words.index("--")
        folders = ["--runs", str(self.runs), "--reference", str(self.kept), "--common-episodes", "6"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reproduce, "metacv", metacv)
            patch.setattr(sys, "argv", ["reproduce.py", *words[:cut], *folders, "--", *SHORT, *words[cut + 1 :]])
            reproduce.main()

    def copy(self, to: Path) -> "Place":
        other = Place(to)
        shutil.copytree(self.runs, other.runs)
        shutil.copytree(self.kept, other.kept)
        return other


def characters(_: Omniglot) -> ImageBank:
    """1623 characters x 20 images of noise."""
    generator = torch.Generator().manual_seed(0)
    names = tuple(f"images_background/Alphabet/character{c:04d}" for c in range(1623))
    images = torch.randint(0, 256, (1623 * 20, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return ImageBank("omniglot", images, torch.arange(0, 1624 * 20, 20), names)


@pytest.fixture(scope="module", autouse=True)
def omniglot(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METACV_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        patch.setattr(Omniglot, "_decode", characters)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Place:
    """protonet_5w1s after 4 steps, stopped once after 2. Tests that change it must use a copy."""
    place = Place(tmp_path_factory.mktemp("finished"))
    place.reproduce(NAME, "--", "eval_every=4", "steps=2")
    place.reproduce(NAME, "--", *STEPS)
    return place


def test_reproduce_keeps_all_files_that_the_table_needs(finished):
    folder = finished.kept / NAME
    assert sorted(path.name for path in folder.iterdir()) == sorted(results_table.FILES)
    kept = results_table.Kept(folder)
    assert kept.complete
    assert kept.training["steps"] == 4
    assert kept.overrides == [word.replace("eval_every=2", "eval_every=4") for word in SHORT] + ["steps=4"]
    assert kept.config == load_checkpoint(folder).config


def test_the_model_is_tested_under_both_protocols(finished):
    kept = results_table.Kept(finished.kept / NAME)
    own = kept.results["inductive"]
    assert (own.episodes, own.query, own.rotation, own.batch_norm) == (5, 15, "as_classes", "inductive")
    assert (kept.common.episodes, kept.common.query, kept.common.rotation) == (6, 15, "none")
    assert kept.common.checkpoint == os.path.relpath(finished.kept / NAME / "best.pt", results_table.ROOT)


def test_finished_work_is_not_repeated(finished):
    called = []
    finished.reproduce(NAME, "--", *STEPS, metacv=lambda *words: called.append(words[0]))
    assert called == ["train"]  # which has nothing to do; both evaluations are of this checkpoint


def test_a_run_continues_only_with_all_of_its_settings(finished, capsys):
    with pytest.raises(SystemExit):
        finished.reproduce(NAME, "--", metacv=not_called)
    assert "was started with steps=4: repeat these settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["steps=2"], "has a longer run, of 4 steps"),
        (["steps=6", "algo.temperature=2"], "was trained without algo.temperature=2: use another --name"),
    ],
)
def test_a_shorter_or_different_run_does_not_replace_results(finished, tmp_path, capsys, words, message):
    place = finished.copy(tmp_path)
    shutil.rmtree(place.runs)
    before = {path: path.read_bytes() for path in (place.kept / NAME).iterdir()}
    with pytest.raises(SystemExit):
        place.reproduce(NAME, "--", *words, metacv=not_called)  # refused before anything is trained
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (place.kept / NAME).iterdir()} == before


def test_a_run_that_serves_needs_no_first_stage(tmp_path, monkeypatch):
    for name in ("adopt", "evaluate", "keep", "build_dataset"):
        monkeypatch.setattr(reproduce, name, Mock())
    monkeypatch.setattr(reproduce, "first_stage", lambda *_: pytest.fail("trained a first stage"))
    places = {"runs": tmp_path / "runs", "reference": tmp_path / "kept", "common_episodes": 6}
    given = argparse.Namespace(run_of="miniimagenet/protonet_init_5w1s", **places)
    reproduce.reproduce(given, *["miniimagenet/protonet_init_5w5s"] * 2, [])
    reproduce.adopt.assert_called_once()


def test_a_first_stage_is_trained_on_the_same_data_and_device(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "reproduce", Mock())
    (config,) = reproduce.compose_all([["experiment=cifar_fs/meta_baseline_5w1s"]])
    given = argparse.Namespace(runs=tmp_path)
    words = ["data_dir=here", "steps=5", "device=cpu"]
    assert reproduce.first_stage(given, config, words) == [f"init={tmp_path}/cifar_fs/classifier_5w1s"]
    first = "cifar_fs/classifier_5w1s"
    reproduce.reproduce.assert_called_once_with(given, first, first, ["data_dir=here", "device=cpu"])


def test_a_run_serves_another_experiment_that_trains_in_the_same_way(finished, tmp_path):
    place = finished.copy(tmp_path)
    place.reproduce("omniglot/protonet_20w1s", "--run-of", NAME, "--", *STEPS)
    adopted = results_table.Kept(place.kept / "omniglot/protonet_20w1s")
    assert adopted.complete
    assert adopted.training["run_of"] == "protonet_5w1s"
    place.reproduce("omniglot/protonet_20w1s", "--name", "omniglot/trained", "--", *STEPS)
    trained = results_table.Kept(place.kept / "omniglot/trained")
    one, other = load_checkpoint(adopted.folder), load_checkpoint(trained.folder)
    assert (one.config, one.step) == (other.config, other.step)
    assert one.content["validation"] == other.content["validation"]
    assert all(torch.equal(value, other.content["algorithm"][name]) for name, value in one.content["algorithm"].items())
    (validation,), (expected,) = adopted.trained.results, trained.trained.results
    assert replace(validation, train_seconds=0) == replace(expected, train_seconds=0)
    assert adopted.results["inductive"].accuracy == trained.results["inductive"].accuracy


def test_a_run_does_not_serve_an_experiment_that_trains_otherwise(finished, capsys):
    with pytest.raises(SystemExit):
        finished.reproduce("omniglot/protonet_20w5s", "--run-of", NAME, "--", *STEPS, metacv=not_called)
    assert f"--run-of {NAME}: train_shot is 5 but was trained with 1" in capsys.readouterr().err


def test_an_unfinished_run_serves_no_other_experiment(finished, capsys):
    with pytest.raises(SystemExit):
        finished.reproduce("omniglot/protonet_20w1s", "--run-of", NAME, "--", "steps=6", metacv=not_called)
    assert f"--run-of {NAME}: is at step 4 of 6" in capsys.readouterr().err


def test_other_experiments_run_after_one_that_fails(monkeypatch):
    tried = []

    def fail(_, name, *__):
        tried.append(name)
        if len(tried) == 2:
            raise reproduce.CommandFailed("metacv train exited with an error")

    names = ["omniglot/maml_5w1s", "omniglot/reptile_5w1s", "miniimagenet/maml_5w5s"]
    monkeypatch.setattr(reproduce, "reproduce", fail)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *names])
    with pytest.raises(SystemExit, match="failed: omniglot/reptile_5w1s"):
        reproduce.main()
    assert tried == names


def test_an_unknown_experiment_is_refused_with_those_that_exist(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "omniglot/maml_6w1s"])
    with pytest.raises(SystemExit) as stop:
        reproduce.main()
    assert stop.value.code == 2
    assert "there is no experiment omniglot/maml_6w1s; one of: omniglot/maml_5w1s, " in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_until_the_command_has_saved(tmp_path, number):
    """A stand-in for metacv takes half a second to save."""
    package = tmp_path / "metacv"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(number, _):\n"
        "    time.sleep(0.5)\n"
        "    pathlib.Path('saved').touch()\n"
        "    sys.exit(128 + number)\n"
        "signal.signal(signal.SIGINT, stop), signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )
    paths = [str(SCRIPTS), str(SCRIPTS.parent)]
    code = f"import sys; sys.path[:0] = {paths!r}; import reproduce; reproduce.metacv()"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True)
    while not (tmp_path / "ready").exists():
        time.sleep(0.05)
        assert child.poll() is None
    if number == signal.SIGINT:  # a terminal sends it to the whole group
        os.killpg(child.pid, number)
    else:
        child.send_signal(number)
    assert child.wait(timeout=20) == 128 + number
    assert (tmp_path / "saved").exists()


def test_each_command_runs_in_a_separate_process(finished, tmp_path):
    command = reproduce.metacv
    place = Place(tmp_path)
    place.reproduce(NAME, "--", *STEPS, metacv=command)
    one, other = (read_results(where.kept / NAME / "common.json").results[0] for where in (place, finished))
    assert one.accuracy == other.accuracy
