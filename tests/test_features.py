"""Precomputed features: evaluated with the same heads and episodes as a checkpoint."""

from pathlib import Path

import numpy
import pytest
import torch

from metacv.data.glyphs import Glyphs
from metacv.model import load_checkpoint
from metacv.results import read_results

SMALL = ("dataset.classes={train:6,val:6,test:6}", "way=3", "query=3", "eval_episodes=4", "backbone.channels=8")


def result(folder: str):
    return read_results(Path(folder) / "result.json").results[0]


@pytest.fixture
def exported(metacv, data_dir) -> str:
    """features.npz has the features of the test classes under the model in run/, the last three classes first."""
    code, _, err = metacv(
        "train", "algo=protonet", *SMALL, "steps=2", "eval_every=2", "device=cpu", "hydra.run.dir=run"
    )
    assert code == 0, err
    checkpoint = load_checkpoint("run")
    settings = {name: value for name, value in checkpoint.config.dataset.items() if name != "_target_"}
    bank = Glyphs(data_dir, **settings).load("test")
    with torch.no_grad():
        features = checkpoint.build().eval().embedding.features(bank.images.float() / 255)
    labels = torch.arange(6).repeat_interleave(20) * 7 - 3
    order = torch.cat([torch.arange(60, 120), torch.arange(60)])
    numpy.savez("features.npz", features=features[order].numpy(), labels=labels[order].numpy())
    return "features.npz"


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ncm", "logistic", "ridge", "svm", "finetune"])
def test_a_head_scores_the_same_on_features_as_on_their_images(metacv, exported, head):
    task = ("way=3", "shot=2", "query=3", "episodes=20", f"head={head}")
    assert metacv("evaluate", f"features={exported}", *task, "hydra.run.dir=own")[0] == 0
    assert metacv("evaluate", "checkpoint=run", *task, "hydra.run.dir=images")[0] == 0
    own, images = result("own"), result("images")
    assert own.accuracy == pytest.approx(images.accuracy, abs=2 / 180)
    assert (own.head, own.dataset, own.way, own.episodes) == (images.head, exported, 3, 20)


def test_features_use_default_tasks_unless_the_command_line_changes_them(metacv, exported):
    code, out, _ = metacv("evaluate", f"features={exported}", "hydra.run.dir=own")
    assert code == 0
    assert "NearestMean, 5-way 1-shot, 15 queries per class, 600 episodes of features.npz" in out
    assert (Path("own/accuracies.npy")).exists()
    assert metacv("evaluate", f"features={exported}", "head=ncm", "head.cosine=true", "hydra.run.dir=cosine")[0] == 0
    changes = [read_results(Path(place, "result.json")).results[0].changes for place in ("own", "cosine")]
    assert changes == [{}, {"head.cosine": True}]


def test_predictions_that_are_not_finite_exit_with_one_clear_line(metacv):
    huge = numpy.full((12, 2), 1e30, dtype=numpy.float32)  # whose squares are infinite
    numpy.savez("huge.npz", features=huge, labels=numpy.arange(12) % 3)
    code, _, err = metacv("evaluate", "features=huge.npz", "head.normalize=false", "way=3", "episodes=4", "query=3")
    assert (code, err) == (
        1,
        "metacv: predictions are not finite in episode 0 (counted from 0): NearestMean diverged\n",
    )


def test_invalid_features_and_settings_exit_with_one_clear_line(metacv, exported):
    numpy.savez("flat.npz", features=numpy.zeros(5), labels=numpy.zeros(5, dtype=int))
    numpy.savez("nan.npz", features=numpy.full((5, 2), numpy.nan), labels=numpy.zeros(5, dtype=int))
    numpy.savez("objects.npz", features=numpy.array([{}, []], dtype=object), labels=numpy.zeros(2, dtype=int))
    numpy.savez("short.npz", features=numpy.zeros((5, 2)))
    numpy.savez("huge.npz", features=numpy.full((5, 2), 1e300), labels=numpy.zeros(5, dtype=int))
    Path("text.npz").write_text("text")
    for words, message in {
        ("features=nowhere.npz",): "features=nowhere.npz cannot be used (",
        ("features=text.npz",): "features=text.npz cannot be used (",
        ("features=short.npz",): "features=short.npz cannot be used (",
        ("features=objects.npz",): "features=objects.npz cannot be used (Object arrays cannot be loaded",
        ("features=nan.npz",): "features=nan.npz cannot be used (labels must be integers, and features finite)",
        ("features=huge.npz",): "features=huge.npz cannot be used (labels must be integers, and features finite)",
        (f"features={exported}", "batch_norm=inductive"): "batch_norm: cannot be set together with features",
        ("features=flat.npz",): "features=flat.npz cannot be used (features (5,) and labels (5,), not [M, D] and [M])",
        (
            f"features={exported}",
            "head=cl2n",
        ): "head: augment, flip, cl2n and adapt=backbone need images, which features",
        (f"features={exported}", "head=ncm", "head.flip=true"): "head: augment, flip, cl2n and adapt=backbone",
        (f"features={exported}", "head=finetune", "head.adapt=backbone"): "head: augment, flip, cl2n and",
        (f"features={exported}", "normalize.mean=[0.5]"): "normalize: cannot be set together with features",
        (f"features={exported}", "checkpoint=run"): "checkpoint: cannot be set together with features",
        (f"features={exported}", "way=9"): "way=9, but features.npz has only 6 classes",
        (): "evaluate needs a model: checkpoint=RUN",
    }.items():
        code, _, err = metacv("evaluate", *words, "hydra.run.dir=failed")
        assert (code, err.count("\n")) == (1, 1), err
        assert err.startswith(f"metacv: {message}"), err
