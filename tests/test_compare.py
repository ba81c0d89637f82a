"""Comparing runs on the same episodes."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, quick

from metacv.compare import difference, shortened

ASKED = ("query=5", "episodes=20", "norm=inductive")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def runs(metacv, place) -> list[str]:
    for name, words in (
        ("proto", quick("protonet")),
        ("other", (*quick("protonet"), "seed=1")),
        ("maml", quick("maml")),
    ):
        if not (place / name).exists():
            assert metacv("train", *words, *SMALL[1:4], f"hydra.run.dir={place / name}")[0] == 0
    return [str(place / name) for name in ("proto", "other", "maml")]


def accuracies(metacv, run: str, episodes: int) -> float:
    assert metacv("evaluate", f"checkpoint={run}", *ASKED, f"episodes={episodes}", "hydra.run.dir=alone")[0] == 0
    return json.loads(Path("alone/result.json").read_text())


def test_every_pair_has_the_difference_of_its_accuracies(metacv, runs):
    code, out, err = metacv("compare", *runs, *ASKED, "hydra.run.dir=out")
    assert (code, err) == (0, "")
    result = json.loads(Path("out/result.json").read_text())
    assert list(result["runs"]) == ["proto", "other", "maml"]
    for name, run in zip(result["runs"], runs, strict=True):
        alone = accuracies(metacv, run, 20)
        for field in ("accuracy", "ci95", "episodes_sha256", "checkpoint_sha256"):
            assert result["runs"][name][field] == alone[field]
    assert [(one["of"], one["less"]) for one in result["differences"]] == [
        ("proto", "other"), ("proto", "maml"), ("other", "maml"),
    ]  # fmt: skip
    for one in result["differences"]:
        of, less = (result["runs"][one[side]]["accuracy"] for side in ("of", "less"))
        assert one["mean"] == pytest.approx(of - less)
        assert f"{one['of']} - {one['less']}" in out
        assert f"{100 * one['mean']:+6.2f} ± {100 * one['ci95']:.2f} %" in out


def test_the_interval_of_a_difference_holds_the_truth_in_95_of_100_cases():
    """Episodes of 75 queries, some harder than others for both models, 2000 comparisons of 200 episodes each."""
    generator = torch.Generator().manual_seed(0)
    hardness = 0.1 * torch.randn(2000, 200, generator=generator, dtype=torch.float64)
    better, worse = (0.80 + hardness).clamp(0, 1), (0.77 + hardness).clamp(0, 1)
    truth = 0.0
    for draws in range(50):  # what clamping leaves of 3 %
        some = 0.1 * torch.randn(20000, generator=torch.Generator().manual_seed(draws), dtype=torch.float64)
        truth += float(((0.80 + some).clamp(0, 1) - (0.77 + some).clamp(0, 1)).mean()) / 50

    def measured(accuracy: torch.Tensor) -> torch.Tensor:
        return torch.binomial(torch.full_like(accuracy, 75), accuracy, generator=generator) / 75

    one, other = measured(better), measured(worse)
    found = [difference(a, b) for a, b in zip(one, other, strict=True)]
    covered = sum(abs(result["mean"] - truth) <= result["ci95"] for result in found) / len(found)
    assert 0.93 <= covered <= 0.97
    # and it is narrower than that of two independent samples
    alone = sum(float((1.96**2 * (a.var() + b.var()) / 200) ** 0.5) for a, b in zip(one, other, strict=True))
    assert sum(result["ci95"] for result in found) < 0.65 * alone


def test_runs_are_named_without_what_they_share():
    assert shortened(["a/b/one", "a/b/two/x"]) == ["one", "two/x"]
    assert shortened(["/x/one/best.pt", "/x/one/last.pt"]) == ["best.pt", "last.pt"]


def test_what_makes_no_comparison_is_said_in_one_line(metacv, runs):
    for words, said in (
        ([runs[0]], f"compare {runs[0]}: give two runs or more, each once"),
        ([runs[0], runs[0]], "give two runs or more, each once"),
        ([runs[0], "nowhere"], "nowhere: there is no such file"),
        (
            [runs[0], runs[2]],
            f"{runs[2]} is tested with norm=transductive, {runs[0]} with norm=inductive: say norm=...",
        ),
        ([*runs[:2], "norm=both"], "norm=both: one of inductive, transductive"),
        ([*runs[:2], "way=100"], "way=100 but glyphs test has only 8 classes"),
    ):
        code, out, err = metacv("compare", *words)
        assert (code, out) == (1, "")
        assert err.startswith("metacv: ")
        assert said in err
        assert err.count("\n") == 1
    code, _, err = metacv("compare")
    assert code == 1
    assert "runs" in err


def test_runs_on_other_data_need_a_data_set_that_is_said(metacv, runs, place):
    words = (*quick("protonet"), "dataset.classes={train:30,val:8,test:9}", *SMALL[1:4])
    assert metacv("train", *words, "hydra.run.dir=elsewhere")[0] == 0
    code, _, err = metacv("compare", runs[0], "elsewhere", *ASKED)
    assert code == 1
    assert "elsewhere is tested on other images than" in err
    code, _, err = metacv("compare", runs[0], "elsewhere", *ASKED, "dataset.classes={train:30,val:8,test:8}")
    assert (code, err) == (0, "")
