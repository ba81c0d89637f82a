"""Results of an evaluation by class: counts, classes.csv, the hardest pairs and the pictures."""

import csv
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from conftest import bank_of
from PIL import Image

from metacv.confusion import Predictions, confusion
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.evaluate import write_details
from metacv.pictures import clipped, confusion_matrix, embedding, legible_names, png
from metacv.results import read_results

NAMES = ("a rather long name of a class of birds", "красная_шапочка", "大熊猫", "cost_$x^2$_of_{", "=1+1")


def predictions(tasks: list[tuple[int, int]], classes: list[list[int]], names=("ant", "bee", "cow", "dog")):
    """Predictions for tasks of two classes with two queries of each; class c has the rows 5 c to 5 c + 4."""
    bank = replace(bank_of([5] * len(names)), class_names=names)
    episodes = EpisodeList(EpisodeSampler(bank, way=2, shot=1, query=2), len(tasks))
    episodes.rows = 5 * torch.tensor(tasks).unsqueeze(2) + torch.arange(3)
    return Predictions(episodes, torch.tensor(classes).short())


@pytest.fixture
def known():
    """An ant is taken for a bee in 3 of 4 queries of tasks with both, a cow for an ant in 1 of 2; no task has a dog."""
    return predictions([(0, 1), (1, 0), (0, 2)], [[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])


def test_queries_are_counted_by_true_and_predicted_class(known):
    found = confusion(known)
    assert found.episodes.tolist() == [3, 2, 1, 0]
    assert found.accuracy[:3].tolist() == [0.5, 1, 0.5]
    assert found.ci95[0] == pytest.approx(1.96 * 0.5 / 3**0.5)  # of 50, 0 and 100 %
    assert found.ci95[1] == 0
    assert numpy.isnan(found.ci95[2:]).all()
    assert [(own.true, own.other, own.wrong, own.queries) for own in found.pairs] == [(0, 1, 3, 4), (2, 0, 1, 2)]
    assert found.describe().splitlines() == [
        "hardest pairs, in tasks with both classes:",
        "  ant taken for bee  75 % of 4 queries",
        "  cow taken for ant  50 % of 2 queries",
    ]
    shares = found.shares([0, 1, 2, 3])
    numpy.testing.assert_array_equal(shares[0], [0.5, 0.75, 0, numpy.nan])
    numpy.testing.assert_array_equal(shares[2], [0.5, numpy.nan, 0.5, numpy.nan])
    assert known.accuracy.tolist() == [0.75, 0.5, 0.75]


def test_the_table_of_classes_has_a_line_for_each_class(known):
    lines = list(csv.reader(confusion(known).csv().decode("utf-8-sig").splitlines()))
    assert lines == [
        ["class", "episodes", "queries", "accuracy in %", "ci95 in %", "most often taken for", "share in %"],
        ["ant", "3", "6", "50.00", "56.58", "bee", "75.00"],
        ["bee", "2", "4", "100.00", "0.00", "", ""],
        ["cow", "1", "2", "50.00", "", "ant", "50.00"],
        ["dog", "0", "0", "", "", "", ""],
    ]


def test_class_names_cannot_become_formulas_in_the_table(known):
    known.episodes.sampler.bank = replace(known.episodes.sampler.bank, class_names=("=1+1", "@b", "c\n", "d"))
    text = confusion(known).csv().decode("utf-8-sig")
    assert "\n'=1+1,3" in text
    assert ",'@b," in text
    assert "\nc?,1" in text


def test_rotated_classes_are_named_by_angle_and_counts_equal_a_loop():
    sampler = EpisodeSampler(bank_of([6] * 3), way=4, shot=1, query=3, rotation="as_classes")
    episodes = EpisodeList(sampler, 40)
    found = Predictions(episodes, torch.randint(4, (40, 12), generator=torch.Generator().manual_seed(0)).short())
    counts, together = Counter(), Counter()
    for (tasks,), own in zip(((task,) for task in episodes.batches(1)), found.classes.tolist(), strict=True):
        classes = tasks.classes[0].tolist()
        for c in classes:
            together.update({(c, other): 3 for other in classes})
        counts.update(
            (classes[label], classes[pred]) for label, pred in zip(tasks.query_y[0].tolist(), own, strict=True)
        )
    measured = confusion(found)
    assert measured.names[:4] == ["class0", "class1", "class2", "class0 90°"]
    assert {pair: int(measured.taken[pair]) for pair in counts} == counts
    assert measured.taken.sum() == 40 * 12
    assert {pair: int(measured.together[pair]) for pair in together} == together
    assert measured.together.nnz == len(together)


def test_rare_pairs_do_not_rank_before_frequent_ones_by_chance():
    tasks = [(0, 1)] * 20 + [(2, 3)]
    wrong = confusion(predictions(tasks, [[0, 1, 1, 1]] * 10 + [[1, 1, 1, 1]] * 10 + [[1, 0, 1, 1]]))
    assert [(own.true, own.other) for own in wrong.pairs] == [(0, 1), (2, 3)]


def test_predictions_without_an_error_have_no_hardest_pair():
    found = confusion(predictions([(0, 1)], [[0, 0, 1, 1]]))
    assert (found.pairs, found.describe()) == ([], "")


def test_of_many_classes_the_most_confused_are_shown():
    names = tuple(f"c{i}" for i in range(30))
    found = confusion(predictions([(28, 29), (3, 7)], [[1, 1, 1, 1], [0, 1, 1, 1]], names))
    assert found.hardest_classes(20)[:4] == [28, 29, 3, 7]
    assert len(found.hardest_classes(20)) == 20
    figure = confusion_matrix(found, "Toy test")
    assert "The 20 of 30 classes that are mixed up most" in figure.texts[0].get_text()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][:2] == ["c28", "c29"]


def test_class_names_are_drawn_with_all_letters_and_without_formulas():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of letters that a font lacks
        found = predictions([(0, 1), (2, 3), (4, 0)], [[0, 1, 1, 1]] * 3, NAMES)
        rows = torch.arange(25)
        features = torch.rand(25, 4, generator=torch.Generator().manual_seed(0))
        pictures = [
            confusion_matrix(confusion(found), "Toy"),
            embedding(replace(found, rows=rows, features=features), ""),
        ]
        for figure in pictures:
            assert png(figure).startswith(b"\x89PNG")
    labels = [label.get_text() for label in pictures[0].axes[0].get_xticklabels()]
    assert labels == legible_names(NAMES, range(5))
    assert labels[1] == "красная_шапочка"
    assert labels[3] == "cost_$x^2$_of_{"
    assert labels == [text.get_text() for text in pictures[1].axes[0].get_legend().get_texts()]


def test_long_names_lose_their_middle_and_outer_folders():
    assert legible_names(["beta", "images/Greek/alpha"], [1]) == ["Greek/alpha"]
    assert legible_names(["a", "b", "\U0010fffd"], [2, 0]) == ["class 3", "a"]  # no font has this letter
    assert clipped("a" * 20 + "b" * 20) == "a" * 14 + "…" + "b" * 15
    assert clipped("猫" * 40) == "猫" * 7 + "…" + "猫" * 7


def test_too_few_or_equal_features_have_no_embedding_picture(known):
    rows = torch.arange(20)
    assert embedding(replace(known, rows=rows, features=torch.ones(20, 3)), "") is None
    assert embedding(replace(known, rows=rows, features=torch.rand(20, 1)), "") is None
    assert embedding(replace(known, rows=rows[:9], features=torch.rand(9, 3)), "") is None


@pytest.fixture
def drawing(metacv, monkeypatch):
    """The command line, which draws pictures."""
    monkeypatch.setattr("metacv.evaluate.write_details", write_details)
    return metacv


def test_evaluate_writes_pictures_and_a_table_whose_accuracies_are_those_of_the_result(drawing, trained):
    words = (f"checkpoint={trained('protonet')}", "episodes=30", "query=5", "device=cpu")
    code, out, err = drawing("evaluate", *words, "hydra.run.dir=out")
    assert (code, err) == (0, "")
    assert {path.name for path in Path("out").iterdir()} == {
        "result.json", "accuracies.npy", "classes.csv", "confusion.png", "embedding.png"
    }  # fmt: skip
    for name in ("confusion", "embedding"):
        width, height = Image.open(f"out/{name}.png").size
        assert 600 < width < 1600
        assert 500 < height < 1600
    (result,) = read_results(Path("out/result.json")).results
    lines = list(csv.DictReader(Path("out/classes.csv").read_text("utf-8-sig").splitlines()))
    queries = [int(line["queries"]) for line in lines]
    assert sum(queries) == 30 * 5 * 5
    right = sum(count * float(line["accuracy in %"]) for count, line in zip(queries, lines, strict=True))
    assert right / sum(queries) == pytest.approx(100 * result.accuracy, abs=0.01)
    assert "hardest pairs, in tasks" in out
    assert "written: out/classes.csv, confusion.png, embedding.png\n" in out


def test_two_batch_norm_modes_have_no_pictures(drawing, trained):
    words = (f"checkpoint={trained('protonet')}", "episodes=4", "query=5", "batch_norm=both", "device=cpu")
    code, _, _ = drawing("evaluate", *words, "hydra.run.dir=out")
    assert code == 0
    assert {path.name for path in Path("out").iterdir()} == {"result.json", "accuracies.npy"}


def test_without_pictures_the_table_of_classes_is_written_alone(drawing, trained):
    words = (f"checkpoint={trained('protonet')}", "episodes=4", "query=5", "pictures=false", "device=cpu")
    Path("out").mkdir()
    Path("out/confusion.png").write_text("of another evaluation")
    code, out, _ = drawing("evaluate", *words, "hydra.run.dir=out")
    assert code == 0
    assert {path.name for path in Path("out").iterdir()} == {"result.json", "accuracies.npy", "classes.csv"}
    assert "written: out/classes.csv\n" in out


def test_evaluating_features_writes_pictures(drawing):
    labels = numpy.arange(6).repeat(20)
    values = numpy.random.default_rng(0).normal(size=(120, 8)) + labels[:, None]
    numpy.savez("own.npz", features=values, labels=labels)
    code, out, err = drawing("evaluate", "features=own.npz", "episodes=50", "hydra.run.dir=out")
    assert (code, err) == (0, "")
    assert out.startswith(
        "method    features + NearestMean, 5-way 1-shot, 15 queries per class\ndata      own.npz: 6 classes"
    )
    assert "taken for" in out
    assert Path("out/embedding.png").exists()
    assert Path("out/classes.csv").read_text("utf-8-sig").splitlines()[1].startswith("0,")
