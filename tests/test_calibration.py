"""Temperatures, label sets and scores with answers by hand, and what evaluate and predict make of them."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Identity
from PIL import Image
from sklearn.base import clone
from test_predict import as_files, lay_out, table

import metacv as package
from metacv.algorithms.metric.protonet import ProtoNet
from metacv.calibration import auroc, calibration_error, familiarity, fit_temperature, quantile, scores, scores_of
from metacv.data.glyphs import draw_glyphs
from metacv.data.task import TaskBatch
from metacv.files import read_checked
from metacv.model import load_checkpoint, save_checkpoint
from metacv.reliability import folds, leave_one_out
from metacv.results import read_results

pytestmark = pytest.mark.slow


def test_temperature_makes_the_mean_probability_that_of_the_frequencies():
    """Logits of 4 and 0, three of four times right: the best probability is 3/4, so 4 / T = log 3."""
    logits = torch.tensor([[4.0, 0.0]]).repeat(4000, 1)
    labels = torch.tensor([0, 0, 0, 1]).repeat(1000)
    assert float(fit_temperature(logits, labels)) == pytest.approx(4 / math.log(3), rel=1e-3)


def test_temperatures_of_several_tasks_are_those_of_each_alone_and_follow_the_scale_only():
    logits = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 4
    logits[..., 0] += 1.0
    together = fit_temperature(logits, labels)
    torch.testing.assert_close(together, torch.stack([fit_temperature(own, labels) for own in logits]))
    torch.testing.assert_close(fit_temperature(1000 * logits, labels), 1000 * together)
    torch.testing.assert_close(fit_temperature(logits.double() + torch.arange(50)[:, None], labels), together)


def test_a_model_that_is_always_right_has_a_temperature_above_zero():
    temperature = fit_temperature(torch.tensor([[4.0, 0.0]]).repeat(25, 1), torch.zeros(25, dtype=torch.long))
    assert 0.01 < float(temperature) < 4


def test_a_few_images_at_chance_keep_the_temperature_within_a_few_spreads_of_the_logits():
    """Most likely by themselves is an infinite temperature; the prior is around the logits' spread."""
    logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]]).repeat(10, 1)
    labels = torch.zeros(20, dtype=torch.long)
    assert float(logits.std()) < float(fit_temperature(logits, labels)) < 10 * float(logits.std())
    assert float(fit_temperature(logits.repeat(100, 1), labels.repeat(100))) > 10 * float(logits.std())


def test_scores_are_log_odds_against_a_class_also_of_confident_models():
    probabilities = torch.tensor([0.7, 0.2, 0.1])
    expected = ((1 - probabilities) / probabilities).log().double()
    torch.testing.assert_close(scores(probabilities.log() + 5), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores(torch.tensor([900.0, 100.0])), torch.tensor([-800.0, 800.0]).double())
    assert scores_of(torch.tensor([[900.0, 100.0]]), torch.tensor([1])).tolist() == [800]


def test_a_quantile_is_that_of_split_conformal_prediction():
    values = torch.arange(1.0, 10.0)  # 9 values: a new one is above the largest in one of ten cases
    assert float(quantile(values, 0.9)) == 9
    assert float(quantile(values, 0.5)) == 5
    assert float(quantile(values, 0.99)) == 9


def test_label_sets_cover_the_stated_share_of_new_images():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 50, 5, generator=generator).double()
    labels = logits.mul(0.5).softmax(-1).view(-1, 5).multinomial(1, generator=generator).view(4000, 50)
    own = scores(logits).gather(-1, labels.unsqueeze(-1))[..., 0]
    covered = own[:, 25:] <= quantile(own[:, :25], 0.9).unsqueeze(1)
    assert float(covered.double().mean()) == pytest.approx(0.9, abs=0.01)


def test_calibration_error_by_hand():
    """Two bins: two images at 0.9, one right; two at 0.5, both right. (2 * 0.4 + 2 * 0.5) / 4."""
    confidence = torch.tensor([0.9, 0.9, 0.5, 0.5])
    assert calibration_error(confidence, torch.tensor([True, False, True, True])) == pytest.approx(0.45)
    assert calibration_error(torch.ones(3), torch.ones(3, dtype=torch.bool)) == 0


def test_auroc_by_hand():
    assert auroc(torch.tensor([0.9, 0.4]), torch.tensor([0.5, 0.1])) == 0.75


def task(support: list[list[float]], labels: list[int], queries: list[list[float]]) -> TaskBatch:
    return TaskBatch(
        torch.tensor([support]), torch.tensor([labels]), torch.tensor([queries]),
        torch.zeros(1, len(queries), dtype=torch.long), max(labels) + 1, torch.zeros(1, max(labels) + 1),
    )  # fmt: skip


def test_familiarity_is_the_cosine_to_the_nearest_class_mean():
    tasks = task([[2.0, 0.0], [0.0, 4.0], [0.0, 2.0]], [0, 1, 1], [[1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(familiarity(tasks), torch.tensor([[0.5**0.5, 1.0, 0.0]]))


def test_each_image_is_held_out_once_and_no_class_without_another():
    labels = torch.tensor([0, 1, 0, 2, 1, 0, *[3] * 25])
    held = torch.stack([*folds(labels)])
    assert held.sum(0).tolist() == [int(c != 2) for c in labels.tolist()]  # class 2 has one image
    for fold in held:
        assert {*labels[~fold].tolist()} == {0, 1, 2, 3}


def test_leave_one_out_classifies_by_the_other_images_only():
    tasks = task([[0.0, 0.0], [2.0, 0.0], [5.0, 0.0], [7.0, 0.0]], [0, 0, 1, 1], [[0.0, 0.0]])
    method = ProtoNet(Identity())
    held = leave_one_out(method, tasks, tasks.support_x.unsqueeze(2))
    assert held.labels.tolist() == [0, 1, 0, 1]  # first of each class, then second
    assert held.logits[0].tolist() == [[-4, -49], [-9, -4], [-4, -9], [-49, -4]]


def test_the_scale_of_new_logits_is_that_of_leave_one_out_continued_by_one_over_the_number_of_images():
    """Logits are 1 + 8 / n times as wide with n images, for n = 4 with one lacking fold and n = 3 with two.

    The ratio of widths is (1 + 8 / 4) / (1 + 8 / 3) = 9 / 11, and three of five images remain: the exponent is 0.6.
    """

    class Widening(ProtoNet):
        def head(self, tasks: TaskBatch) -> torch.Tensor:
            logits = super().head(tasks)
            return logits / logits.std(-1, keepdim=True) * (1 + 8 * tasks.way / tasks.support_x.shape[1])

    support = [[c + 0.1 * k, 0.0] for c in (0, 5) for k in range(5)]
    tasks = task(support, [0] * 5 + [1] * 5, [[0.0, 0.0]])
    held = leave_one_out(Widening(Identity()), tasks, tasks.support_x.unsqueeze(2))
    assert float(held.scale) == pytest.approx((9 / 11) ** 0.6, rel=1e-4)


def answers(out: str) -> dict[str, float]:
    numbers = r"([\d.]+)"
    found = {"covered": f"{numbers} % have", "size": f"mean size {numbers}", "auroc": f"AUROC {numbers}"}
    return {name: float(re.search(pattern, out)[1]) for name, pattern in found.items()}


@pytest.mark.parametrize("how", ["loo", "val"])
def test_evaluate_prints_and_records_label_sets_errors_and_auroc(metacv, trained, may_be_at_chance, how):
    words = (f"checkpoint={trained('protonet')}", f"calibrate={how}", "way=3", "shot=5", "episodes=20")
    code, out, err = metacv("evaluate", *words, "hydra.run.dir=evaluation")
    assert (code, err) == (0, "")
    (result,) = read_results(Path("evaluation/result.json")).results
    printed = answers(out)
    assert printed["covered"] == pytest.approx(100 * result.coverage, abs=0.06)
    assert printed["size"] == pytest.approx(result.set_size, abs=0.006)
    assert printed["auroc"] == pytest.approx(result.auroc, abs=0.0006)
    assert result.calibrated == how
    assert 0.8 < result.coverage < 1
    assert result.set_size < 3
    assert result.ece < 0.15
    metacv("evaluate", *words[:1], *words[2:], "hydra.run.dir=plain")
    (plain,) = read_results(Path("plain/result.json")).results
    assert (plain.accuracy, plain.calibrated, plain.coverage) == (result.accuracy, "", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("checkpoint=MAML", "calibrate=loo"), "calibrate=loo: needs a model that embeds each"),
        (("checkpoint=RUN", "calibrate=loo", "shot=1"), "calibrate=loo: needs shot=2 or more"),
        (("checkpoint=RUN", "calibrate=test"), "calibrate=test: must be one of val, loo or null"),
        (("features=x.npz", "calibrate=loo"), "calibrate: cannot be set together with features"),
    ],
)
def test_evaluate_says_where_calibration_is_not_possible(metacv, trained, words, message):
    runs = {"RUN": str(trained("protonet")), "MAML": str(trained("maml"))}
    given = [f"{name}={runs.get(value, value)}" for name, _, value in (word.partition("=") for word in words)]
    code, _, err = metacv("evaluate", *given)
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"metacv: {message}")


def known_and_unknown() -> None:
    """Two classes of glyphs with ten examples and five queries each, and five other glyphs in a folder of no class."""
    glyphs = 255 - draw_glyphs(3, 15, seed=5)
    as_files("support", glyphs[:2, :10])
    as_files("query", glyphs[:, 10:])
    Path("query/2").rename("query/other")


def test_predict_marks_unknown_images_and_gives_label_sets(metacv):
    known_and_unknown()
    words = ("checkpoint=omniglot/protonet_5w1s", "support=support", "query=query", "hydra.run.dir=out")
    code, out, _ = metacv("predict", *words, "unknown=true", "coverage=0.9")
    assert code == 0
    assert "calibrated on 20 examples by leave-one-out" in out
    content = json.loads(Path("out/predictions.json").read_text())
    found = content["predictions"]
    others = [one for one in found if one["truth"] == "unknown"]
    assert [Path(one["file"]).parent.name for one in others] == ["other"] * 5
    assert all(one["label"] == "unknown" for one in others)
    assert "5 of 5 images of other folders" in out
    assert "AUROC 1.000" in out
    rest = [one for one in found if one["truth"] != "unknown"]
    assert content["accuracy"] == sum(one["label"] == one["truth"] for one in rest) / 10
    covered = 100 * sum(one["truth"] in one["label_set"] for one in rest) / 10
    assert f"{covered:.1f} % have the true class" in out
    assert [row["label_set"] for row in table("out")] == [" | ".join(one["label_set"]) for one in found]
    plain = metacv("predict", *words)[1]
    assert "unknown" not in plain
    assert "accuracy" not in plain  # the folder `other` is no class


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["checkpoint=MAML", "unknown=true"],
            "unknown=true: needs a model that embeds each image by itself, which MAML with batch_norm=transductive",
        ),
        (["checkpoint=RUN", "coverage=1"], "coverage=1: must be a number above 0 and below 1 or null"),
        (["checkpoint=RUN", "support=single", "coverage=0.9"], "leave-one-out needs a class with at least two images"),
        (["checkpoint=RUN", "support=named", "unknown=true"], "unknown=true: a class is called unknown; rename it"),
        (["checkpoint=RUN", "remove=alpha"], "remove: takes classes from a file of `save`, so it needs adapted=FILE"),
    ],
)
def test_predict_says_where_calibration_is_not_possible(metacv, trained, words, message):
    lay_out(Path("own"), [2, 2], query=1)
    for folder, name in (("single", "alpha"), ("single", "b"), ("named", "alpha"), ("named", "unknown")):
        Path(folder, name).mkdir(parents=True)
        shutil.copy(f"own/support/alpha/0{int(name != 'alpha')}.png", Path(folder, name))
    runs = {"RUN": str(trained("protonet")), "MAML": str(trained("maml"))}
    given = [f"{name}={runs.get(value, value)}" for name, _, value in (word.partition("=") for word in words)]
    given += ["support=own/support"] * (not any(word.startswith("support=") for word in words))
    code, out, err = metacv("predict", *given, "query=own/query", "hydra.run.dir=out")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"metacv: {message}")
    assert not Path("out").exists()


def test_too_few_examples_for_a_coverage_are_said(metacv, trained):
    lay_out(Path("own"), [2, 2], query=1)
    words = (f"checkpoint={trained('protonet')}", "support=own/support", "query=own/query", "coverage=0.9")
    assert "coverage=0.9: 4 examples in classes of two or more allow 80 % at most" in metacv("predict", *words)[2]


def test_classes_are_added_and_removed_without_the_old_images(metacv, trained):
    """As if all examples had been given at once."""
    lay_out(Path("own"), [2, 3, 2, 2], query=2)
    run = f"checkpoint={trained('protonet')}"
    Path("more/gamma,3").mkdir(parents=True)
    Path("first").mkdir()
    for name in ("alpha", "beta 2"):
        shutil.copytree(f"own/support/{name}", f"first/{name}")
    shutil.copytree("own/support/gamma,3", "more/gamma,3", dirs_exist_ok=True)
    Path("first/beta 2/02.png").unlink()
    Path("more/beta 2").mkdir()
    shutil.copy("own/support/beta 2/02.png", "more/beta 2/")
    assert metacv("predict", run, "support=first", "save=first.pt")[0] == 0
    shutil.rmtree("first")
    assert metacv("predict", "adapted=first.pt", "support=more", "save=all.pt")[::2] == (0, "")
    shutil.rmtree("own/support/delta=4")
    assert metacv("predict", run, "support=own/support", "query=own/query", "hydra.run.dir=one")[0] == 0
    assert metacv("predict", "adapted=all.pt", "query=own/query", "hydra.run.dir=two")[0] == 0
    one, two = (
        [{k: float(v) for k, v in row.items() if k.startswith("P(")} for row in table(name)] for name in ("one", "two")
    )
    assert one[0].keys() == two[0].keys()
    for mine, theirs in zip(one, two, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    words = ("predict", "adapted=all.pt", "remove=[alpha]", "save=less.pt", "query=own/query", "hydra.run.dir=three")
    assert metacv(*words)[0] == 0
    assert [name for name in table("three")[0] if name.startswith("P(")] == ["P(beta 2)", "P(gamma,3)"]
    assert len(read_checked(Path("less.pt"))["support"]["features"]) == 5
    for name, message in (
        ("alhpa", "there is no such class; did you mean alpha?"),
        ("[alpha,'beta 2']", "at least two"),
    ):
        code, _, err = metacv("predict", "adapted=all.pt", f"remove={name}", "query=own/query")
        assert (code, message in err) == (1, True)


def test_an_old_file_without_features_and_one_with_wrong_ones(metacv, trained):
    lay_out(Path("own"), [2, 2], query=1)
    metacv(
        "predict",
        f"checkpoint={trained('protonet')}",
        "support=own/support",
        "query=own/query",
        "save=kept.pt",
        "hydra.run.dir=one",
    )
    saved = load_checkpoint("kept.pt").content
    features = saved["support"]["features"]
    old = {name: value for name, value in saved["support"].items() if name != "features"}
    save_checkpoint(Path("old.pt"), saved | {"support": old})
    assert metacv("predict", "adapted=old.pt", "query=own/query", "hydra.run.dir=two")[0] == 0
    assert Path("one/predictions.csv").read_bytes() == Path("two/predictions.csv").read_bytes()
    for wrong in (features[:3], features[0], features.double(), features * math.nan, "features", features[..., :-1]):
        save_checkpoint(Path("wrong.pt"), saved | {"support": old | {"features": wrong}})
        code, _, err = metacv("predict", "adapted=wrong.pt", "query=own/query")
        assert (code, err) == (1, "metacv: adapted=wrong.pt is damaged\n")
    for other in (features[..., :-1].contiguous(), features.repeat(1, 2, 1)):  # of another network, or of other copies
        save_checkpoint(Path("other.pt"), saved | {"support": old | {"features": other}})
        assert metacv("predict", "adapted=other.pt", "query=own/query", "hydra.run.dir=two")[0] == 0
        assert Path("one/predictions.csv").read_bytes() == Path("two/predictions.csv").read_bytes()


def test_a_class_is_removed_in_python(trained, monkeypatch, data_dir):
    monkeypatch.setenv("METACV_DATA_DIR", str(data_dir))
    images = [Image.fromarray(255 - glyph[0, 0].numpy()) for glyph in draw_glyphs(3, 1, seed=1)]
    classifier = package.load(str(trained("protonet"))).fit(images, ["a", "b", "c"])
    fewer = clone(classifier).fit([images[0], images[2]], ["a", "c"])
    np.testing.assert_allclose(classifier.remove(["b"]).predict_proba(images), fewer.predict_proba(images), atol=1e-6)
    assert classifier.classes_.tolist() == ["a", "c"]


def test_the_page_escapes_names_and_links_and_shows_the_most_doubtful_first(metacv, trained):
    lay_out(Path("own"), [2, 2], query=3)
    hostile = "<img src=x onerror=alert(1)>&\"'"
    Path("own/support/alpha").rename(f"own/support/{hostile}")
    Path("own/query/alpha").rename(f"own/query/{hostile}")
    shutil.copy(f"own/query/{hostile}/02.png", "own/query/beta 2/javascript:alert(1).png")
    metacv(
        "predict", f"checkpoint={trained('protonet')}", "support=own/support", "query=own/query", "hydra.run.dir=out"
    )
    page = Path("out/predictions.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;" in page
    links = re.findall('href="([^"]*)"', page)
    assert "../own/query/beta%202/javascript%3Aalert%281%29.png" in links
    shown = [float(own) for own in re.findall(r"<ol>\s*<li>.*?<span>([\d.]+) %", page, re.DOTALL)]
    assert len(shown) == 7
    assert shown == sorted(shown)
    pictures = re.findall(r'src="(predictions/\w+\.jpg)"', page)
    assert len(pictures) == 7 * 4
    assert all(Image.open(Path("out") / name).size == (28, 28) for name in pictures)
