"""Comparing runs on the same episodes."""

import json
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import SMALL, TRAIN, quick
from PIL import Image

from metacv.compare import difference, shortened, t_quantile

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


@pytest.mark.parametrize("episodes", [2, 5, 8, 200])
def test_the_interval_of_a_difference_holds_the_truth_in_95_of_100_cases(episodes):
    """Episodes of 75 queries, some harder than others for both models, 2000 comparisons."""
    generator = torch.Generator().manual_seed(0)
    hardness = 0.1 * torch.randn(2000, episodes, generator=generator, dtype=torch.float64)
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
    # and it is narrower than that of two independent samples, with the same quantile
    t = t_quantile(0.05, episodes - 1)
    alone = sum(float((t**2 * (a.var() + b.var()) / episodes) ** 0.5) for a, b in zip(one, other, strict=True))
    assert sum(result["ci95"] for result in found) < 0.65 * alone


def test_the_quantiles_of_students_t_are_those_of_the_tables():
    for beyond, freedom, known in (
        (0.05, 1, 12.7062), (0.05, 2, 4.3027), (0.05, 4, 2.7764), (0.05, 7, 2.3646), (0.05, 30, 2.0423),
        (0.05, 599, 1.9639), (0.05, 10**5, 1.95998), (0.01, 1, 63.6567), (0.01, 10, 3.1693), (0.001, 5, 6.8688),
    ):  # fmt: skip
        assert t_quantile(beyond, freedom) == pytest.approx(known, rel=1e-4)


def test_the_intervals_of_all_pairs_hold_together_in_95_of_100_cases():
    """Four models that are equally good, and 1000 comparisons of all six pairs."""
    accuracy = torch.randn(1000, 4, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    told_apart = 0
    for models in accuracy:
        found = [difference(one, other, pairs=6) for one, other in combinations(models, 2)]
        told_apart += any(abs(result["mean"]) > result["ci95"] for result in found)
    assert 10 <= told_apart <= 60


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


def test_a_sweep_is_compared_by_the_names_that_the_shell_gives_it(metacv, runs):
    for name in ("proto", "other"):
        shutil.copytree(Path(runs[0]).parent / name, Path("sweep") / name)
    Path("sweep/multirun.yaml").write_text("hydra: {}")
    code, out, err = metacv("compare", *sorted(map(str, Path("sweep").glob("*"))), *ASKED)
    assert (code, err) == (0, "")
    assert "other - proto" in out
    assert metacv("compare", "sweep/multirun.yaml", "sweep/proto/best.pt")[2] == (
        "metacv: sweep/multirun.yaml is not a checkpoint of metacv, or is damaged\n"
    )


def test_a_damaged_checkpoint_is_named(metacv, runs):
    shutil.copytree(runs[0], "damaged")
    path = Path("damaged/best.pt")
    path.write_bytes(path.read_bytes()[:500])
    code, out, err = metacv("compare", runs[1], "damaged", *ASKED)
    assert (code, out, err) == (1, "", "metacv: damaged/best.pt is not a checkpoint of metacv, or is damaged\n")


def test_two_episodes_are_enough_for_an_interval_which_is_wide(metacv, runs):
    code, out, err = metacv("compare", *runs[:2], *ASKED, "episodes=2", "hydra.run.dir=out")
    assert (code, err) == (0, "")
    assert "the same 2 episodes" in out
    assert "may be chance" in out
    assert "over the draw of episodes" in out
    assert metacv("compare", *runs[:2], *ASKED, "episodes=1")[2].startswith("metacv: episodes=1: an interval needs at")


def test_own_images_that_were_split_otherwise_make_no_comparison(metacv):
    for c in range(10):
        Path(f"own/class{c}").mkdir(parents=True)
        for i in range(5):
            pixels = torch.randint(
                0, 256, (28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(9 * c + i)
            )
            Image.fromarray(pixels.numpy()).save(f"own/class{c}/{i}.png")
    words = ("algo=protonet", *TRAIN[1:], "dataset=image_folder", "dataset.root=own", "dataset.size=28", "way=2",
             "query=2", "dataset.fractions={train:0.4,val:0.3,test:0.3}")  # fmt: skip
    for seed in (0, 1):
        assert metacv("train", *words, f"dataset.split_seed={seed}", f"hydra.run.dir=split{seed}")[0] == 0
    code, _, err = metacv("compare", "split0", "split1", "episodes=4")
    assert (code, err) == (1, "metacv: split1 is tested on other images than split0: say dataset=...\n")
    code, _, err = metacv("compare", "split0", "split1", "episodes=4", "dataset.split_seed=0")
    assert code == 1
    assert "were trained or validated on" in err
