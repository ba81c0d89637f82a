"""Heads that use the whole query set, from the command line to the report; unbalanced and disjoint episodes."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from conftest import quick

from metacv.backbones.conv4 import Conv4
from metacv.config import EvaluateConfig, from_dict
from metacv.data.image_files import files_below
from metacv.errors import UserError
from metacv.results import Result, ResultFile, read_results, summary, t_interval

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("may_be_at_chance")]


def results(folder: str) -> list[Result]:
    return read_results(Path(folder) / "result.json").results


def test_evaluate_shows_balanced_and_unbalanced_queries_beside_the_nearest_mean_on_the_same_episodes(metacv, trained):
    words = (f"checkpoint={trained('protonet')}", "way=3", "query=4", "episodes=10", "batch_norm=inductive")
    code, out, err = metacv("evaluate", *words, "head=tim", "head.flip=true", "hydra.run.dir=own")
    assert (code, err) == (0, "")
    own = results("own")
    assert [(one.head, one.uses_query_set, one.query_balance) for one in own] == [
        ("TIM", True, "balanced"),
        ("TIM", True, "dirichlet"),
        ("NearestMean", False, "balanced"),
        ("NearestMean", False, "dirichlet"),
    ]
    assert [own[0].episodes_sha256, own[1].episodes_sha256] == [one.episodes_sha256 for one in own[2:]]
    metacv("evaluate", *words, "head=ncm", "head.flip=true", "hydra.run.dir=alone")
    (alone,) = results("alone")
    assert (alone.accuracy, alone.episodes_sha256) == (own[2].accuracy, own[0].episodes_sha256)
    assert not alone.uses_query_set
    lines = out.splitlines()
    assert "inductive batch norm, head uses all queries, unbalanced queries (" in out
    start = next(i for i, line in enumerate(lines) if line.startswith("queries:"))
    assert lines[start].split() == ["queries:", "balanced", "dirichlet"]
    for line, (first, second) in zip(lines[start + 1 :], (own[:2], own[2:]), strict=False):
        assert line.startswith(f"ProtoNet + {first.head}")
        assert f"{100 * first.accuracy:.2f} ±" in line
        assert f"{100 * second.accuracy:.2f} ±" in line
    assert numpy.load("own/accuracies.npy").shape == (4, 10)


@pytest.mark.parametrize(
    ("head", "balance", "expected"),
    [
        ("ncm", "dirichlet", ["dirichlet"]),
        ("ncm", "both", ["balanced", "dirichlet"]),
        ("tim", "dirichlet", ["dirichlet"] * 2),
        ("tim", "balanced", ["balanced"] * 2),
    ],
)
def test_query_balance_chooses_what_is_measured_for_any_head_on_images_and_on_features(
    metacv, trained, head, balance, expected
):
    words = ("way=3", "query=4", "episodes=4", f"head={head}", f"query_balance={balance}")
    code, _, err = metacv(
        "evaluate", f"checkpoint={trained('protonet')}", *words, "batch_norm=inductive", "hydra.run.dir=images"
    )
    assert (code, err) == (0, "")
    assert [one.query_balance for one in results("images")] == expected
    numpy.savez("own.npz", features=numpy.random.default_rng(0).random((60, 8)), labels=numpy.arange(60) // 20)
    code, _, err = metacv("evaluate", "features=own.npz", *words, "hydra.run.dir=features")
    assert (code, err) == (0, "")
    assert [one.query_balance for one in results("features")] == expected
    assert {one.uses_query_set for one in results("features")} == ({False} if head == "ncm" else {True, False})


def test_runs_below_a_folder_are_measured_in_the_same_ways(metacv, trained):
    for name in ("a", "b"):
        shutil.copytree(trained("protonet"), f"runs/{name}")
    code, out, err = metacv("evaluate", "checkpoint=runs", "head=pt_map", "episodes=4", "hydra.run.dir=own")
    assert (code, err) == (0, "")
    assert [(one.head, one.query_balance) for one in results("own")] == 2 * [
        (head, balance) for head in ("PTMAP", "NearestMean") for balance in ("balanced", "dirichlet")
    ]
    table = out[out.index("runs, ") :]
    assert table.count("head uses all queries") == 4


def test_inductive_batch_norm_without_running_statistics_is_refused(metacv, trained):
    words = (f"checkpoint={trained('maml')}", "head=tim", "episodes=4")
    code, out, err = metacv("evaluate", *words, "batch_norm=both")
    assert (code, out) == (1, "")
    text = "head=TIM uses the whole query set, but batch_norm=inductive passes each query alone through a network"
    assert err == f"metacv: {text} without running statistics; set batch_norm=transductive\n"
    assert metacv("evaluate", *words, "batch_norm=transductive")[0] == 0


def test_validation_may_use_such_a_head_and_the_report_keeps_the_run_apart(metacv, trained):
    code, out, err = metacv("train", *quick("protonet"), "head=soft_kmeans", "hydra.run.dir=runs/with")
    assert (code, err) == (0, "")
    assert "inductive batch norm, head uses all queries)" in out
    assert results("runs/with")[0].uses_query_set
    shutil.copytree(trained("protonet"), "runs/without")
    assert not results("runs/without")[0].uses_query_set
    code, out, err = metacv("report", "runs")
    assert (code, err) == (0, "")
    headings = [line for line in out.splitlines() if line.startswith("5-way 1-shot, not tested yet")]
    assert [line.endswith("head uses all queries") for line in sorted(headings)] == [False, True]
    metacv("evaluate", "checkpoint=runs/with", "episodes=4", "hydra.run.dir=runs/test")
    code, out, err = metacv("report", "runs/with", "runs/test")
    assert (code, err) == (0, "")
    headings = [line for line in out.splitlines() if line.startswith("5-way 1-shot, 4 episodes")]
    assert sorted(line.partition("queries, ")[2] for line in headings) == [
        "inductive",
        "inductive batch norm, head uses all queries",
        "inductive batch norm, head uses all queries, unbalanced queries",
        "inductive, unbalanced queries",
    ]


def test_predict_labels_all_images_in_one_task_and_says_so(metacv, trained, monkeypatch, data_dir):
    import test_predict

    monkeypatch.setattr("metacv.predictor.QUERIES_AT_ONCE", 2)
    test_predict.lay_out(Path("own"), [2, 2, 2], query=4)
    words = (f"checkpoint={trained('protonet')}", "support=own/support", "query=own/query", "head=tim")
    code, out, err = metacv("predict", *words, "batch_norm=inductive", "hydra.run.dir=all")
    assert (code, err) == (0, "")
    assert "head TIM: each label depends on all query images, in both batch_norm modes\n" in out
    whole = json.loads(Path("all/predictions.json").read_text())["predictions"]
    for path in files_below(Path("own/query"))[1:]:
        path.unlink()
    metacv("predict", *words, "batch_norm=inductive", "hydra.run.dir=one")
    (alone,) = json.loads(Path("one/predictions.json").read_text())["predictions"]
    assert alone["file"] == whole[0]["file"]
    assert abs(alone["probability"] - whole[0]["probability"]) > 1e-3


def test_more_images_than_a_head_has_memory_for_are_refused_in_one_line(metacv, trained, monkeypatch):
    import test_predict

    def forward(*_: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 40 GB")

    monkeypatch.setattr("metacv.algorithms.heads.laplacian.LaplacianShot.forward", forward)
    test_predict.lay_out(Path("own"), [2, 2, 2], query=4)
    words = (f"checkpoint={trained('protonet')}", "support=own/support", "query=own/query", "head=laplacian")
    code, _, err = metacv("predict", *words, "batch_norm=inductive")
    text = "the head, which labels all images together, with 12 query images: not enough memory: you tried to allocate"
    assert (code, err) == (1, f"metacv: {text} 40 GB; try another head, or fewer images at a time\n")


def test_results_of_earlier_versions_use_no_queries_and_balanced_ones(tmp_path):
    known = {"accuracy": 0.5, "ci95": 0.1, "dataset": "X", "split": "test", "rotation": "none", "way": 5, "shot": 1}
    record = known | {"query": 15, "episodes": 10, "seed": 0, "batch_norm": "inductive"}
    (tmp_path / "result.json").write_text(json.dumps({"schema": 2, "results": [record]}))
    (own,) = read_results(tmp_path / "result.json").results
    assert (own.uses_query_set, own.query_balance, own.disjoint) == (False, "balanced", False)
    assert own.protocol == "10 episodes of X test, 15 queries, inductive"
    changed = dataclasses.replace(own, uses_query_set=True, query_balance="dirichlet", disjoint=True)
    ResultFile([changed]).write(tmp_path / "result.json")
    assert read_results(tmp_path / "result.json").results == [changed]
    text = "10 disjoint episodes of X test, 15 queries, inductive batch norm, head uses all queries, unbalanced queries"
    assert changed.protocol == text


def test_disjoint_episodes_have_an_interval_of_students_t(metacv, trained):
    words = (f"checkpoint={trained('protonet')}", "way=3", "shot=2", "query=4", "episodes=disjoint", "seed=3")
    code, out, err = metacv("evaluate", *words, "head=tim", "hydra.run.dir=own")
    assert (code, err) == (0, "")
    own = results("own")
    # glyphs have 20 images a class: 3 rounds with 6 of each, for two tasks of 3 of the 8 classes
    assert [(one.head, one.episodes, one.disjoint, one.query_balance) for one in own] == [
        (head, 6, True, "balanced") for head in ("TIM", "NearestMean")
    ]
    accuracies = torch.from_numpy(numpy.load("own/accuracies.npy"))
    assert own[0].ci95 == pytest.approx(2.5706 * float(accuracies[0].std()) / 6**0.5, rel=1e-4)
    assert "6 disjoint episodes of Glyphs test" in out
    run = trained("protonet")
    code, out, err = metacv("compare", str(run), str(run / "last.pt"), *words[1:], "hydra.run.dir=compared")
    assert (code, err) == (0, "")
    assert "on the same 6 episodes" in out
    assert all(one.disjoint for one in results("compared"))


def test_classes_with_too_few_images_for_unbalanced_queries_give_a_warning(metacv, trained):
    words = f"checkpoint={trained('protonet')}", "query_balance=both", "way=3", "episodes=5", "shot=5"
    _, _, err = metacv("evaluate", *words, "query=10")
    text = "classes of glyphs test have images for 15 queries only, and 10 on average"
    advice = "a smaller query gives more unbalanced tasks"
    assert err == f"metacv: warning: query_balance=dirichlet: {text}; {advice}\n"
    assert metacv("evaluate", *words, "query=7")[2] == ""


def test_disjoint_and_unbalanced_cannot_be_combined(metacv, trained):
    for balance in ("dirichlet", "both"):
        words = (f"checkpoint={trained('protonet')}", "episodes=disjoint", f"query_balance={balance}")
        text = f"metacv: query_balance={balance}: cannot be set together with episodes=disjoint\n"
        assert metacv("evaluate", *words) == (1, "", text)


@pytest.mark.parametrize("word", ["episodes=disjunct", "episodes=[disjoint]", "query_balance=uniform", "episodes=1"])
def test_other_words_are_refused_in_one_line_with_the_choices(metacv, trained, word):
    code, _, err = metacv("evaluate", f"checkpoint={trained('protonet')}", word)
    assert code == 1
    assert err.count("\n") == 1
    assert "must be" in err


def test_settings_know_which_balances_to_measure():
    def balances(uses_query_set: bool, **given) -> tuple[str, ...]:
        needed = {"split": "test", "unseen_only": False, "seed": 0, "device": "cpu", "data_dir": "."}
        return from_dict(EvaluateConfig, needed | given).balances(uses_query_set)

    assert balances(False) == ("balanced",)
    assert balances(True) == balances(False, query_balance="both") == ("balanced", "dirichlet")
    assert balances(True, episodes="disjoint") == ("balanced",)
    with pytest.raises(UserError):
        balances(True, episodes="disjoint", query_balance="both")


def test_the_interval_of_disjoint_episodes_is_over_rounds_if_there_are_ten_and_otherwise_over_episodes():
    values = torch.rand(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert summary(values, rounds=4)["ci95"] == t_interval(values) > summary(values)["ci95"]
    means = (values[::2] + values[1::2]) / 2
    # The quantile of nine degrees of freedom
    assert summary(values, rounds=10)["ci95"] == pytest.approx(2.2622 * float(means.std()) / 10**0.5, rel=1e-4)


def test_all_that_evaluate_measures_together_embeds_each_image_once(metacv, trained, monkeypatch):
    passed, forward = [], Conv4.forward
    monkeypatch.setattr(Conv4, "forward", lambda self, images: passed.append(len(images)) or forward(self, images))
    words = (f"checkpoint={trained('protonet')}", "head=tim", "episodes=30", "device=cpu", "hydra.run.dir=own")
    assert metacv("evaluate", *words)[0] == 0
    assert len(results("own")) == 4
    assert passed[-1] <= sum(one for one in passed if one != 2) <= 8 * 20  # classes and images; 2 when it is built
