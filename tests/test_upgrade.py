"""Checkpoints that version 1 wrote, with what version 1 computed from them.

tests/data_v1/ALGO holds best.pt, last.pt and metrics.jsonl of a run of two steps, by `metacv train algo=ALGO way=3
query=5 steps=2 eval_every=2 log_every=3 meta_batch=2 eval_episodes=4 dataset.classes={train:6,val:4,test:4}` with 2 or
4 channels. expected.pt has version 1's logits, and the weights that it reached by `resume=RUN steps=4`;
metrics_step_4.jsonl has the metrics of that.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_tasks

from metacv.algorithms.base import Algorithm
from metacv.data.task import TaskBatch
from metacv.model import load_checkpoint, save_checkpoint

RUNS = Path(__file__).with_name("data_v1")
every_run = pytest.mark.parametrize("name", sorted(path.name for path in RUNS.iterdir()))


def read_metrics(path: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "train/tasks_per_second"} for line in lines]


def large_tasks() -> TaskBatch:
    tasks = random_tasks(tasks=2, way=3, shot=2, query=4, shape=(1, 28, 28))
    return replace(tasks, support_x=10 * tasks.support_x, query_x=10 * tasks.query_x)


def built(name: str, file: str) -> Algorithm:
    algorithm = load_checkpoint(RUNS / name, file).build()
    if name == "relationnet":
        algorithm.shot = None  # version 1 did not scale the sums over the support
    return algorithm


def rounds_alike(name: str) -> bool:
    """Whether this processor computes the logits of a run bit for bit as the one of version 1 did."""
    logits = torch.load(RUNS / name / "expected.pt", weights_only=True)["logits"]
    algorithm = built(name, "last.pt")
    return all(torch.equal(algorithm.predict(large_tasks(), mode), own) for mode, own in logits.items())


@every_run
@pytest.mark.parametrize("mode", ["inductive", "transductive"])
def test_checkpoints_of_version_1_predict_what_they_did(name, mode):
    tasks = large_tasks()
    expected = torch.load(RUNS / name / "expected.pt", weights_only=True)["logits"][mode]
    for file in ("best.pt", "last.pt"):
        checkpoint = load_checkpoint(RUNS / name, file)
        assert checkpoint.step == 2
        assert checkpoint.config.batch_norm in ("inductive", "transductive")
        torch.testing.assert_close(built(name, file).predict(tasks, mode), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@every_run
@pytest.mark.usefixtures("may_be_at_chance")
def test_runs_of_version_1_resume_as_version_1_does(name, metacv, tmp_path):
    shutil.copytree(RUNS / name, tmp_path / "run")
    code, _, err = metacv("train", "resume=run", "steps=4")
    assert (code, err) == (0, "")
    expected = torch.load(RUNS / name / "expected.pt", weights_only=True)["step_4"]
    weights = torch.load("run/last.pt", weights_only=True)["algorithm"]
    before = torch.load(RUNS / name / "last.pt", weights_only=True)["algorithm"]
    assert weights.keys() == expected.keys()
    # Processors round differently, and Adam turns a gradient that is only rounding error, such as that of a bias before
    # batch norm, into a whole step. So most weights are compared, not all; with other tasks or optimizer states, the
    # median difference is as large as the median step.
    names = [key for key in expected if expected[key].is_floating_point() and key in before]
    assert all(torch.equal(weights[key], expected[key]) for key in expected.keys() - {*names})  # counters
    differences = torch.cat([(weights[key] - expected[key]).flatten().abs() for key in names])
    steps = torch.cat([(before[key] - expected[key]).flatten().abs() for key in names])
    assert differences.median() < 0.1 * steps.median()
    alike = rounds_alike(name)
    if alike:
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-5)
    ours, theirs = read_metrics(tmp_path / "run/metrics.jsonl"), read_metrics(RUNS / name / "metrics_step_4.jsonl")
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        one_query = 1 / (4 * 15) if "train/loss" not in our and our["step"] == 4 and not alike else 0
        assert our == pytest.approx(their, abs=one_query + 1e-4)


def test_relation_networks_of_earlier_checkpoints_scale_sums_to_their_shot_in_training(trained, tmp_path):
    content = torch.load(Path(trained("relationnet")) / "best.pt", weights_only=True)
    assert content["config"]["algo"].pop("shot") == 1
    for vary, shot in ((None, 3), ("uniform", None)):
        config = content["config"] | {"train_shot": 3, "train_vary": vary}
        save_checkpoint(tmp_path / "old.pt", content | {"config": config})
        assert load_checkpoint(tmp_path / "old.pt").build().shot == shot
    scaled, unscaled = load_checkpoint(RUNS / "relationnet").build(), built("relationnet", "best.pt")
    tasks = random_tasks(shot=1, shape=(1, 28, 28))
    assert torch.equal(scaled.predict(tasks, "transductive"), unscaled.predict(tasks, "transductive"))
    assert not torch.equal(
        scaled.predict(large_tasks(), "transductive"), unscaled.predict(large_tasks(), "transductive")
    )
