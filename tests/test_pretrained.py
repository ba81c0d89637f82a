"""Pre-trained networks without a run: the same results as from a checkpoint with these weights; features on disk."""

import json
import os
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from metacv.backbones.conv4 import Conv4

ROOT = Path(__file__).parents[1]
DATA = ("dataset=glyphs", "dataset.classes={train:30,val:8,test:8}")
NETWORK = ("backbone=conv4", "backbone.channels=8", "backbone.weights_file=weights.pth")
TASK = ("query=5", "episodes=8", "batch_norm=inductive")

pytestmark = pytest.mark.usefixtures("may_be_at_chance")


@pytest.fixture
def run(metacv, trained, tmp_path):
    """A run in this folder, and weights.pth with the weights of its network."""
    shutil.copytree(trained("protonet"), tmp_path / "run")
    content = torch.load(tmp_path / "run/best.pt", weights_only=True)
    torch.save({n.removeprefix("backbone."): v for n, v in content["algorithm"].items()}, tmp_path / "weights.pth")
    return metacv


@pytest.fixture
def own_cache(metacv, monkeypatch, tmp_path):
    """No feature of another test is in the cache."""
    monkeypatch.setenv("METACV_DATA_DIR", str(tmp_path / "data"))


def result(folder):
    return json.loads(Path(folder, "result.json").read_text())["results"][0]


def test_a_network_without_a_run_has_the_accuracy_of_a_checkpoint_with_its_weights(run):
    assert run("evaluate", "checkpoint=run", "head=ncm", *DATA, *TASK, "hydra.run.dir=a")[0] == 0
    code, out, err = run("evaluate", *NETWORK, *DATA, *TASK, "hydra.run.dir=b")
    assert (code, err) == (0, "")
    assert "after: Conv4, weights of weights.pth, sha256 " in out
    assert "perhaps on classes of the test" in out
    assert numpy.array_equal(numpy.load("a/accuracies.npy"), numpy.load("b/accuracies.npy"))
    own, trained = result("b"), result("a")
    assert (own["backbone"], own["method"], own["head"]) == ("Conv4", "Embedding", "NearestMean")
    assert (own["checkpoint"], len(own["checkpoint_sha256"])) == ("weights.pth", 64)
    assert own["episodes_sha256"] == trained["episodes_sha256"]
    assert own["changes"] == {"backbone.channels": 8}
    words = ("head.cosine=true", "normalize.mean=[0.5]", "backbone.padding=[1,1,1,1]")
    assert run("evaluate", *NETWORK, *DATA, *TASK, *words, "hydra.run.dir=c")[0] == 0
    expected = {"head.cosine": True, "normalize.mean": [0.5], "normalize.std": [1.0], "backbone.padding": [1] * 4}
    assert result("c")["changes"] == own["changes"] | expected


def test_predict_without_a_run_labels_as_evaluate_does_and_saves_a_whole_model(run, tmp_path):
    generator = numpy.random.default_rng(0)
    for folder in ("examples", "photos"):
        for level, name in ((40, "dark"), (200, "light")):
            for number in range(3):
                place = tmp_path / folder / name / f"{number}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((level + generator.integers(0, 40, (30, 30))).astype("uint8")).save(place)
    words = ("dataset.size=28", "dataset.color=false", "support=examples", "query=photos", "save=model.pt")
    code, out, err = run("predict", *NETWORK, *words, "hydra.run.dir=a")
    assert (code, err) == (0, "")
    assert "accuracy" in out
    Path("weights.pth").unlink()
    assert run("predict", "adapted=model.pt", "query=photos", "hydra.run.dir=b")[0] == 0
    first, second = (Path(place, "predictions.csv").read_text() for place in "ab")
    assert first.count("\n") == 7
    assert first == second
    assert str(tmp_path).encode() not in Path("model.pt").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_later_evaluations_read_features_from_the_disk_and_embed_only_new_images(run, tmp_path, monkeypatch):
    embedded = []
    features = Conv4.features
    monkeypatch.setattr(Conv4, "features", lambda self, x: embedded.append(len(x)) or features(self, x))

    def evaluate(*words):
        embedded.clear()
        code, _, err = run("evaluate", *NETWORK, *DATA, "query=5", "batch_norm=inductive", *words, "hydra.run.dir=e")
        assert code == 0
        return result("e")["accuracy"], sum(embedded), err

    first, few, _ = evaluate("episodes=2")
    assert few > 0
    assert evaluate("episodes=2") == (first, 0, "")
    assert evaluate("episodes=2", "head=ridge")[1] == 0
    accuracy, more, _ = evaluate("episodes=8")
    assert 0 < more < 8 * 20
    assert evaluate("episodes=8", "head.flip=true")[1] > more  # other features
    files = sorted((tmp_path / "data/cache").glob("features-*.pt"))
    assert len(files) == 2
    for path in files:
        path.write_bytes(b"damaged")
    again, computed, err = evaluate("episodes=8")
    assert (again, computed) == (accuracy, few + more)
    assert err.startswith("metacv: ")
    assert err.endswith("creating it again\n")
    assert evaluate("episodes=8") == (accuracy, 0, "")


@pytest.mark.usefixtures("own_cache")
def test_other_weights_or_settings_have_other_features(run, tmp_path):
    run("evaluate", *NETWORK, *DATA, *TASK, "hydra.run.dir=a")
    run("evaluate", *NETWORK, *DATA, *TASK, "normalize.mean=[0.5]", "hydra.run.dir=b")
    weights = torch.load("weights.pth", weights_only=True)
    torch.save({name: 2 * value for name, value in weights.items()}, "weights.pth")
    run("evaluate", *NETWORK, *DATA, *TASK, "hydra.run.dir=c")
    assert len([*(tmp_path / "data/cache").glob("features-*.pt")]) == 3


@pytest.mark.usefixtures("own_cache")
def test_trained_networks_that_are_not_frozen_leave_no_features(run, tmp_path):
    assert run("evaluate", "checkpoint=run", *TASK)[0] == 0
    assert [*(tmp_path / "data/cache").glob("features-*.pt")] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("backbone=conv4",), "dataset is missing; set dataset=NAME, the images to test the network on"),
        (("backbone=conv4", *DATA), "backbone: Conv4 has no trained weights; set backbone.weights_file=FILE, or train"),
        (
            ("backbone=torchvision", *DATA),
            "backbone: Torchvision resnet18 has no trained weights; set backbone.weights=",
        ),
        (
            ("checkpoint=run", "backbone=conv4"),
            "give either checkpoint=RUN, or backbone=NAME for a pre-trained network",
        ),
        (("checkpoint=run", "backbone.channels=3"), "backbone.channels: set backbone=NAME too; the network of a"),
        (("checkpoint=run", "normalize.mean=[1.0]"), "normalize: only for backbone=NAME; a checkpoint has its own"),
        (("features=f.npz", "backbone=conv4"), "backbone: cannot be set together with features"),
        (
            (*NETWORK, *DATA, "normalize.mean=[1,2]"),
            "normalize.mean=[1.0, 2.0]: must have one value, or one for each of",
        ),
        ((*NETWORK, *DATA, "backbone.size=8"), "backbone.size: Conv4 has no such setting"),
        ((*NETWORK[:2], "backbone.weights_file=no.pth", *DATA), "backbone.weights_file="),
    ],
)
def test_wrong_settings_exit_with_one_line(metacv, words, message):
    code, out, err = metacv("evaluate", *words, "hydra.run.dir=e")
    assert (code, out) == (1, "")
    assert err.startswith(f"metacv: {message}")
    assert err.count("\n") == 1
    assert not Path("e").exists()


@pytest.mark.slow
@pytest.mark.skipif("METACV_WEIGHTS" not in os.environ, reason="METACV_WEIGHTS: a folder with efficientnet-lite0*.pth")
def test_a_published_network_has_the_accuracy_on_file(metacv, monkeypatch):
    """Its names differ from timm's. Needs CIFAR-100 in METACV_REAL_DATA_DIR, and 20 minutes without its features."""
    pytest.importorskip("timm")
    monkeypatch.setenv("METACV_DATA_DIR", os.environ["METACV_REAL_DATA_DIR"])
    (path,) = Path(os.environ["METACV_WEIGHTS"]).glob("efficientnet-lite0*.pth")
    network = ("backbone=timm", "backbone.name=tf_efficientnet_lite0", f"backbone.weights_file={path}")
    code, _, _ = metacv("evaluate", *network, "dataset=cifar_fs", "shot=5", "episodes=2000", "hydra.run.dir=e")
    assert code == 0
    kept = result(ROOT / "outputs/pretrained/cifar_fs_lite0_5w5s")
    assert result("e")["accuracy"] == pytest.approx(kept["accuracy"], abs=0.001)
