"""Comparing runs on the same episodes."""

import shutil
from itertools import combinations
from pathlib import Path

import numpy
import pytest
import torch
from conftest import TRAIN
from PIL import Image

from metacv.compare import difference, shortened, t_interval
from metacv.model import load_checkpoint, save_checkpoint
from metacv.results import read_results

pytestmark = pytest.mark.slow

ASKED = ("query=5", "episodes=20", "batch_norm=inductive")
RUNS = ("proto", "other", "maml")


@pytest.fixture
def compare(metacv, trained):
    """`metacv compare` in a folder with three models: two of one method, and one of another."""
    for name, algo in (("proto", "protonet"), ("maml", "maml")):
        Path(name).mkdir()
        shutil.copy(trained(algo) / "best.pt", name)
    generator = torch.Generator().manual_seed(0)
    with_other_weights("other", lambda own: own + 0.1 * torch.randn(own.shape, generator=generator))
    return lambda *words: metacv("compare", *words)


def with_other_weights(folder: str, change) -> None:
    """A copy of `proto` with changed weights."""
    content = load_checkpoint("proto").content
    weights = {name: change(own) if own.dim() == 4 else own for name, own in content["algorithm"].items()}
    Path(folder).mkdir()
    save_checkpoint(Path(folder) / "best.pt", content | {"algorithm": weights})


def test_every_pair_has_the_difference_of_its_accuracies(metacv, compare):
    code, out, err = compare(*RUNS, *ASKED, "hydra.run.dir=out")
    assert (code, err) == (0, "")
    file = read_results(Path("out/result.json"))
    accuracies = numpy.load("out/accuracies.npy")
    assert accuracies.shape == (3, 20)
    for name, result, row in zip(RUNS, file.results, accuracies, strict=True):
        assert metacv("evaluate", f"checkpoint={name}", *ASKED, "hydra.run.dir=alone")[0] == 0
        (alone,) = read_results(Path("alone/result.json")).results
        for own in ("accuracy", "ci95", "episodes_sha256", "checkpoint_sha256"):
            assert getattr(result, own) == getattr(alone, own)
        assert row.mean() == pytest.approx(result.accuracy, abs=1e-12)
    pairs = list(combinations(range(3), 2))
    assert [(one["of"], one["less"]) for one in file.differences] == [(RUNS[a], RUNS[b]) for a, b in pairs]
    for one, (a, b) in zip(file.differences, pairs, strict=True):
        assert one["mean"] == pytest.approx((accuracies[a] - accuracies[b]).mean(), abs=1e-12)
        assert f"{one['of']} - {one['less']}" in out
        assert f"{100 * one['mean']:+6.2f} ± {100 * one['ci95']:.2f} %" in out


@pytest.mark.parametrize("episodes", [2, 5, 8, 200])
def test_the_interval_of_a_difference_covers_the_truth_in_95_of_100_cases(episodes):
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
    alone = sum((t_interval(a) ** 2 + t_interval(b) ** 2) ** 0.5 for a, b in zip(one, other, strict=True))
    assert sum(result["ci95"] for result in found) < 0.65 * alone


def test_a_difference_over_disjoint_episodes_has_the_interval_of_its_rounds():
    one, other = torch.rand(2, 12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = difference(one.flatten(), other.flatten(), pairs=3, rounds=12)
    assert found["mean"] == pytest.approx(float((one - other).mean()))
    assert found["ci95"] == pytest.approx(t_interval((one - other).mean(1), 0.05 / 3))
    assert difference(one.flatten(), other.flatten(), rounds=2)["ci95"] == t_interval((one - other).flatten())


@pytest.mark.parametrize(
    ("alpha", "freedom", "quantile"),
    [(0.05, 1, 12.7062), (0.05, 4, 2.7764), (0.05, 30, 2.0423), (0.05, 599, 1.9639), (0.01, 10, 3.1693)],
)
def test_intervals_have_the_quantiles_of_students_t_in_the_tables(alpha, freedom, quantile):
    values = torch.arange(freedom + 1, dtype=torch.float64)
    error = float(values.std()) / len(values) ** 0.5
    assert t_interval(values, alpha) == pytest.approx(quantile * error, rel=1e-4)


def test_the_intervals_of_all_pairs_hold_simultaneously_in_95_of_100_cases():
    """Four models that are equally good, and 1000 comparisons of all six pairs."""
    accuracy = torch.randn(1000, 4, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    significant = 0
    for models in accuracy:
        found = [difference(one, other, pairs=6) for one, other in combinations(models, 2)]
        significant += any(abs(result["mean"]) > result["ci95"] for result in found)
    assert 10 <= significant <= 60


def test_runs_are_named_without_the_folders_that_they_share():
    assert shortened(["a/b/one", "a/b/two/x"]) == ["one", "two/x"]
    assert shortened(["/x/one/best.pt", "/x/one/last.pt"]) == ["best.pt", "last.pt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["proto"], "compare proto: give two or more different runs, each once"),
        (["proto", "proto"], "give two or more different runs, each once"),
        (["proto", "nowhere"], "nowhere: there is no such file"),
        (
            ["proto", "maml"],
            "maml has batch_norm=transductive, proto has batch_norm=inductive; set batch_norm=VALUE for all runs",
        ),
        (["proto", "other", "batch_norm=both"], "batch_norm=both: must be one of inductive, transductive"),
        (["proto", "other", "way=100"], "way=100, but glyphs test has only 8 classes"),
        (["proto", "other", "episodes=1"], "episodes=1: "),
        (["proto", "damaged"], "damaged/best.pt is not a checkpoint of metacv, or is damaged"),
        (["proto", "other", "-m"], "-m: only train supports sweeps"),
    ],
)
def test_invalid_comparisons_exit_with_one_line_and_leave_no_folder(compare, words, message):
    Path("damaged").mkdir()
    Path("damaged/best.pt").write_bytes(Path("proto/best.pt").read_bytes()[:500])
    code, out, err = compare(*words)
    assert (code, out) == (1, "")
    assert err.startswith("metacv: ")
    assert message in err
    assert err.count("\n") == 1
    assert not Path("outputs").exists()


def test_runs_on_other_data_need_the_setting_of_the_data_set(compare):
    content = load_checkpoint("proto").content
    content["config"]["dataset"]["classes"]["test"] = 9
    Path("elsewhere").mkdir()
    save_checkpoint(Path("elsewhere/best.pt"), content)
    code, _, err = compare("proto", "elsewhere", *ASKED)
    assert code == 1
    assert "elsewhere and proto are tested on different images" in err
    code, _, err = compare("proto", "elsewhere", *ASKED, "dataset.classes={train:30,val:8,test:8}")
    assert (code, err) == (0, "")


def test_a_sweep_is_compared_by_the_names_that_the_shell_gives_it(compare):
    Path("sweep").mkdir()
    for name in ("proto", "other"):
        Path(name).rename(f"sweep/{name}")
    Path("sweep/multirun.yaml").write_text("hydra: {}")
    code, out, err = compare(*sorted(map(str, Path("sweep").glob("*"))), *ASKED)
    assert (code, err) == (0, "")
    assert "other - proto" in out
    assert compare("sweep/multirun.yaml", "sweep/proto/best.pt")[2] == (
        "metacv: sweep/multirun.yaml is not a checkpoint of metacv, or is damaged\n"
    )


def test_two_episodes_are_enough_for_a_wide_interval(compare):
    code, out, err = compare("proto", "other", *ASKED, "episodes=2", "hydra.run.dir=out")
    assert (code, err) == (0, "")
    assert "the same 2 episodes" in out
    assert "not significant" in out
    assert "choice of episodes" in out


def test_own_images_with_another_split_are_not_compared(metacv):
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
    assert code == 1
    assert "were used in training or validation of split1/best.pt; unseen_only=true leaves them out" in err
    code, out, _ = metacv("compare", "split0", "split1", "episodes=4", "unseen_only=true")
    assert code == 0  # on the classes that are in the test split of both
    assert out.count(" without ") == 2


def test_runs_that_are_tested_on_other_images_are_not_compared(metacv, trained):
    other = ("algo=protonet", *TRAIN, "dataset.seed=1", "hydra.run.dir=other")
    assert metacv("train", *other)[0] == 0
    code, _, err = metacv("compare", str(trained("protonet")), "other", "episodes=4")
    problem = f"other and {trained('protonet')} are tested on different images"
    assert (code, err) == (1, f"metacv: {problem}; set dataset=NAME for all runs\n")


def test_runs_are_named_in_their_lines_and_equal_ones_are_said_to_be_equal(metacv, trained, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(trained("protonet"), name)
    code, out, _ = metacv("compare", "a", "b", "episodes=4")
    assert code == 0
    *_, first, second, _, _, difference, _, _, _ = out.splitlines()
    assert first.startswith("a: accuracy ")
    assert second.startswith("b: accuracy ")
    assert difference == "a - b   +0.00 ± 0.00 %   equal"
