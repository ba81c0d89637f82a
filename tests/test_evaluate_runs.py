"""Output of `metacv evaluate`: progress and results, for one run and for all runs of a folder."""

import json
import shutil
import time
from pathlib import Path

import numpy
import pytest
import torch
from conftest import SmoothNet, bank_of
from PIL import Image

from metacv import progress
from metacv.algorithms.metric.protonet import ProtoNet
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.episodes import evaluate_episodes
from metacv.model import load_checkpoint, save_checkpoint
from metacv.progress import Progress, header
from metacv.results import Result, read_results, warn_at_chance
from metacv.text import significant

pytestmark = pytest.mark.slow

ASKED = ("query=5", "episodes=20", "device=cpu")


@pytest.fixture
def sweep(trained):
    """sweep/ with three runs; the first in the alphabet is the worst in validation, and has the most episodes."""
    for name, algo, accuracy in (("a", "protonet", 0.5), ("b/deep", "protonet", 0.9), ("c", "protonet", 0.7)):
        Path("sweep", name).mkdir(parents=True)
        content = load_checkpoint(trained(algo)).content
        config = content["config"] | {"batch_norm": "inductive", "episodes": 12 if name == "a" else 8}
        validation = {"accuracy": accuracy, "ci95": 0.01, "step": 2}
        save_checkpoint(Path("sweep", name, "best.pt"), content | {"config": config, "validation": validation})
    Path("sweep/multirun.yaml").write_text("")
    return Path("sweep")


def evaluate(metacv, *words: str) -> tuple[int, str, str]:
    return metacv("evaluate", "checkpoint=sweep", "query=5", "device=cpu", "hydra.run.dir=out", *words)


def rows_of_table(out: str) -> list[str]:
    """The names in the table at the end, and its title."""
    title, heading, *rows = out.split("\n\n")[1].splitlines()
    assert heading.split() == ["run", "validation", "test"]
    assert rows.pop() == "result: out/result.json"
    return [title, *(row.split()[0] for row in rows)]


def test_all_runs_below_a_folder_are_evaluated_and_ranked_by_validation(metacv, sweep):
    metacv("evaluate", "checkpoint=sweep/a", *ASKED, "hydra.run.dir=alone")  # makes the episodes known
    code, out, err = evaluate(metacv, "episodes=20")
    assert (code, err) == (0, "")
    assert [line.split(": accuracy")[0] for line in out.splitlines() if ": accuracy" in line] == ["a", "b/deep", "c"]
    assert rows_of_table(out) == ["runs, the best in validation first:", "b/deep", "c", "a"]
    assert "b/deep  90.00 ± 1.00 %  " in out
    results = read_results(Path("out/result.json")).results
    assert [Path(result.checkpoint).parent.name for result in results] == ["a", "deep", "c"]
    accuracies = numpy.load("out/accuracies.npy")
    assert accuracies.mean(1) == pytest.approx([result.accuracy for result in results])
    assert accuracies[0].tolist() == numpy.load("alone/accuracies.npy")[0].tolist()


def test_a_run_that_cannot_be_built_is_reported_and_the_others_are_evaluated(metacv, sweep):
    Path("sweep/b/deep/best.pt").write_bytes(b"no checkpoint")
    code, out, err = evaluate(metacv, "episodes=4")
    assert code == 1
    first, last = err.splitlines()
    assert first == "metacv: b/deep: sweep/b/deep/best.pt is not a checkpoint of metacv, or is damaged"
    assert last == "metacv: 1 of 3 runs could not be evaluated: b/deep"
    assert len(read_results(Path("out/result.json")).results) == 2
    assert rows_of_table(out)[1:] == ["c", "a"]


def test_a_run_with_non_finite_predictions_is_reported_and_the_others_are_evaluated(metacv, sweep):
    content = load_checkpoint("sweep/c").content
    weights = {name: torch.full_like(own, 3e38) if own.dim() > 1 else own for name, own in content["algorithm"].items()}
    save_checkpoint(Path("sweep/c/best.pt"), content | {"algorithm": weights})
    code, out, err = evaluate(metacv, "episodes=4")
    assert code == 1
    assert err.startswith("metacv: c: predictions are not finite in ")
    assert rows_of_table(out)[1:] == ["b/deep", "a"]


def test_if_no_run_can_be_built_no_result_is_written(metacv):
    Path("sweep/a").mkdir(parents=True)
    Path("sweep/a/best.pt").write_bytes(b"no checkpoint")
    code, out, err = evaluate(metacv)
    assert (code, out) == (1, "")
    assert err.endswith("metacv: 1 of 1 run could not be evaluated: a\n")
    assert not Path("out").exists()
    Path("sweep/a/best.pt").unlink()
    assert evaluate(metacv) == (1, "", "metacv: sweep has no best.pt: it is not the folder of a run\n")


@pytest.mark.parametrize("change", ["high", 10**400, "protocol"])
def test_runs_without_comparable_validations_are_not_ranked(metacv, sweep, change):
    content = load_checkpoint("sweep/b/deep").content
    config = content["config"] | {"eval_episodes": 9} if change == "protocol" else content["config"]
    validation = content["validation"] if change == "protocol" else {"accuracy": change, "ci95": 0.01, "step": 2}
    save_checkpoint(sweep / "b/deep/best.pt", content | {"config": config, "validation": validation})
    _, out, _ = evaluate(metacv, "episodes=4")
    title, *names = rows_of_table(out)
    assert title == "runs, in order of their names (not all were validated on the same tasks):"
    assert names == ["a", "b/deep", "c"]


def test_each_run_keeps_its_settings_and_can_be_evaluated_in_both_modes(metacv, sweep):
    code, out, err = evaluate(metacv, "batch_norm=both")
    assert (code, err) == (0, "")
    results = read_results(Path("out/result.json")).results
    assert [result.episodes for result in results] == [12, 12, 8, 8, 8, 8]
    assert rows_of_table(out)[1:] == ["b/deep", "b/deep", "c", "c", "a", "a"]
    accuracies = numpy.load("out/accuracies.npy")
    assert numpy.isnan(accuracies).sum(1).tolist() == [0, 0, 4, 4, 4, 4]


def test_a_header_is_printed_before_an_evaluation(metacv, trained, monkeypatch):
    run = trained("protonet")
    _, out, _ = metacv("evaluate", f"checkpoint={run}", "head=ridge", *ASKED)
    assert out.splitlines()[:4] == [
        "method    ProtoNet + Ridge, 5-way 1-shot, 5 queries per class",
        "network   Conv4",
        "data      Glyphs test: 8 classes, 160 images; 1x28x28",
        "episodes  20",
    ]
    assert out.splitlines()[4].startswith("device    ")
    _, out, _ = metacv("evaluate", f"checkpoint={run}", "query=1", "episodes=2")
    assert "1 query per class" in out
    assert "1 queries" not in out
    monkeypatch.setattr("metacv.evaluate.predict_episodes", lambda *_: 1 / 0)
    _, out, _ = metacv("evaluate", f"checkpoint={run}", *ASKED)
    assert out.count("\n") == 5


def test_the_header_of_several_runs_lists_what_differs():
    one, other = {"method": "A", "data": "D"}, {"method": "B", "data": "D"}
    assert header([one, other, one]) == "method    A\n          B\ndata      D"


def test_without_a_terminal_progress_is_printed_in_lines(metacv, trained, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    _, out, _ = metacv("evaluate", f"checkpoint={trained('maml')}", "query=15", "episodes=30", "device=cpu")
    assert "\nevaluating: 12 of 30 tasks, about " in out
    assert "\nevaluating: 24 of 30 tasks, about " in out
    assert "30 of 30" not in out


def test_validation_prints_no_progress(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    episodes = EpisodeList(EpisodeSampler(bank_of([20] * 6, shape=(1, 6, 6)), way=3, shot=1, query=2), 400)
    for running_stats in (True, False):  # with features computed once, and without
        evaluate_episodes(ProtoNet(SmoothNet(running_stats=running_stats)), episodes, "inductive", "validating")
    assert capsys.readouterr().out == ""


def test_progress_lines_are_at_least_30_seconds_apart(capsys, monkeypatch):
    now = iter(range(0, 1000, 20))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    for lines in (True, False):
        with Progress("evaluating", lines=lines).track(40, "task") as done:
            for _ in range(4):
                done(10)
    assert capsys.readouterr().out == "evaluating: 20 of 40 tasks, about 40 s left\n"


@pytest.mark.parametrize(("accuracy", "above"), [(0.2, False), (0.211, False), (0.212, True)])
def test_an_accuracy_not_above_chance_gives_a_warning(accuracy, above, capsys):
    known = {"dataset": "D", "split": "test", "rotation": "none", "shot": 1, "query": 1, "episodes": 9, "seed": 0}
    result = Result(accuracy, 0.0115, way=5, batch_norm="inductive", **known)
    warn_at_chance(result)
    warn_at_chance(result, "a/b")
    expected = "metacv: warning: the accuracy is not above chance (20 %)\n"
    assert capsys.readouterr().err == ("" if above else expected + expected.replace("the", "a/b: the", 1))


def test_evaluate_and_compare_warn_of_an_accuracy_at_chance(metacv, trained):
    for name in ("a", "b"):
        shutil.copytree(trained("protonet"), name)
        content = load_checkpoint(name).content
        weights = {key: torch.zeros_like(own) if own.dim() > 1 else own for key, own in content["algorithm"].items()}
        save_checkpoint(Path(name) / "best.pt", content | {"algorithm": weights})
    line = "metacv: warning: the accuracy is not above chance (20 %)\n"
    assert metacv("evaluate", "checkpoint=a", *ASKED)[2] == line
    compared = metacv("compare", "a", "b", *ASKED)[2]
    assert compared == line.replace("the", "a: the", 1) + line.replace("the", "b: the", 1)


@pytest.mark.parametrize(
    ("value", "text"), [(0.25, "0.25"), (0.0123456, "0.0123"), (12.345, "12.3"), (1234.5, "1,230"), (98765, "98,800")]
)
def test_numbers_have_three_significant_digits_and_no_exponent(value, text):
    assert significant(value) == text


def test_compare_shows_the_header_once_and_progress_by_the_names_of_runs(metacv, trained, monkeypatch):
    for name in ("one", "two"):
        shutil.copytree(trained("maml"), name)
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    _, out, _ = metacv("compare", "one", "two", "query=15", "episodes=30", "device=cpu", "hydra.run.dir=out")
    assert out.startswith("method    MAML, 5-way 1-shot, 15 queries per class\nnetwork   Conv4\ndata      Glyphs test")
    assert out.count("device    ") == 1
    for name in ("one", "two"):
        assert f"\nevaluating {name}: 12 of 30 tasks" in out
    assert len(json.loads(Path("out/result.json").read_text())["results"]) == 2


@pytest.fixture
def photos(tmp_path):
    """photos/ with five test classes of ten colour images of noise, of another size than the glyphs."""
    for split, count in (("train", 1), ("val", 1), ("test", 5)):
        for c in range(count):
            folder = tmp_path / "photos" / split / f"{split}{c}"
            folder.mkdir(parents=True)
            for i in range(10):
                noise = numpy.random.default_rng(100 * c + i).integers(0, 256, (40, 40, 3), dtype=numpy.uint8)
                Image.fromarray(noise).save(folder / f"{i}.png")


@pytest.mark.usefixtures("photos", "may_be_at_chance")
def test_several_models_on_several_data_sets_give_a_table(metacv, sweep):
    words = "checkpoint=[sweep/c,sweep/a]", "dataset=[glyphs,image_folder]", "datasets.image_folder.root=photos"
    code, out, _ = metacv("evaluate", *words, *ASKED, "hydra.run.dir=out")
    assert code == 0
    heading, *rows, last = out.split("\n\n")[1].splitlines()
    results = read_results(Path("out/result.json")).results
    assert heading.split() == ["test", "glyphs", "image_folder"]
    assert [row.split()[0] for row in rows] == ["c", "a"]
    assert [result.dataset for result in results] == ["Glyphs", "ImageFolder"] * 2
    for row, own in zip(rows, (results[:2], results[2:]), strict=True):
        assert [word for word in row.split() if "." in word][::2] == [f"{100 * result.accuracy:.2f}" for result in own]
    assert last == "result: out/result.json"
    metacv("evaluate", "checkpoint=sweep/c", *ASKED, "hydra.run.dir=alone")
    assert read_results(Path("alone/result.json")).results[0].accuracy == results[0].accuracy


@pytest.mark.usefixtures("photos", "may_be_at_chance")
def test_settings_of_the_model_s_own_data_set_can_be_changed_beside_others(metacv, sweep):
    words = "checkpoint=sweep/a", "dataset=[glyphs,image_folder]", "datasets.image_folder.root=photos"
    code, _, _ = metacv("evaluate", *words, "datasets.glyphs.test_rotation=per_class", *ASKED, "hydra.run.dir=out")
    assert code == 0
    assert [one.rotation for one in read_results(Path("out/result.json")).results] == ["per_class", "none"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoint=[]"], "checkpoint=[]: must be a list of paths"),
        (["checkpoint=[sweep/a,]"], "checkpoint=[sweep/a,]: must be a list of paths"),
        (["checkpoint=sweep", "dataset=[glyphs,glyphs]"], "dataset=[glyphs,glyphs]: give each data set once"),
    ],
)
def test_lists_with_nothing_or_twice_the_same_are_refused(metacv, words, message):
    assert metacv("evaluate", *words) == (1, "", f"metacv: {message}\n")


@pytest.mark.usefixtures("photos", "may_be_at_chance")
def test_a_data_set_that_fails_leaves_its_cell_empty(metacv, sweep):
    words = "checkpoint=sweep/a", "dataset=[image_folder,glyphs]", "datasets.image_folder.root=nowhere"
    code, out, err = metacv("evaluate", *words, *ASKED, "hydra.run.dir=out")
    assert code == 1
    assert out.split("\n\n")[1].splitlines()[1].split()[0] == "a"
    assert "metacv: a on image_folder: " in err
    assert "metacv: 1 of 2 runs could not be evaluated: a on image_folder" in err


@pytest.mark.usefixtures("photos", "may_be_at_chance")
def test_images_of_another_data_set_are_resized_to_those_of_the_model(metacv, trained):
    words = f"checkpoint={trained('protonet')}", "dataset=image_folder", "dataset.root=photos", "dataset.size=40"
    code, out, err = metacv("evaluate", *words, *ASKED)
    assert code == 0
    warning = "the images of photos test are resized from 3x40x40 to 1x28x28, as the model takes them"
    assert f"metacv: warning: {warning}\n" in err
    assert "5 classes, 50 images; 1x28x28" in out


def test_settings_of_one_data_set_are_refused_beside_several(metacv, sweep):
    code, _, err = metacv("evaluate", "checkpoint=sweep", "dataset=[glyphs,omniglot]", "dataset.size=20")
    assert (code, err) == (1, "metacv: dataset.size: cannot be set together with several data sets\n")
