"""Runs in TensorBoard, read over HTTP from a real TensorBoard server."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import KINDS, quick

from metacv.config import flat, to_dict
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.episodes import evaluate_episodes
from metacv.logger import Logger
from metacv.model import build_dataset, load_checkpoint
from metacv.results import read_results

INNER_LOOPS = {"maml", "mamlpp", "reptile"}
ALGORITHMS = sorted([*KINDS, "feat", "mamlpp"])


@pytest.fixture(scope="module")
def board(trained, tmp_path_factory):
    """A function that queries a TensorBoard over a run of each algorithm."""
    place = tmp_path_factory.mktemp("runs")
    for algo in ALGORITHMS:
        shutil.copytree(trained(algo), place / algo)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(place), "--port", str(port), "--host", "127.0.0.1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def ask(path: str, body: dict | None = None):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/data/plugin/{path}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    try:
        for _ in range(600):
            try:
                if set(ask("scalars/tags")) >= set(ALGORITHMS):
                    break
            except OSError:
                assert process.poll() is None
            time.sleep(0.2)
        yield ask
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_every_algorithm_has_the_same_curves_and_pictures(board, trained):
    tags = board("scalars/tags")
    common = {"train/loss", "train/accuracy", "train/tasks_per_second", "train/lr", "val/accuracy", "val/ci95",
              "val/best_accuracy"}  # fmt: skip
    for algo in ALGORITHMS:
        own = {"train/contrast"} if algo == "feat" else set()  # a scalar of its training step
        assert {tag for tag in tags[algo] if not tag.startswith("inner_steps/")} == common | own
        assert ("inner_steps/accuracy_003" in tags[algo]) == (algo in INNER_LOOPS)
        assert list(board("images/tags")[algo]) == ["val/episode"]
        lines = [json.loads(line) for line in (trained(algo) / "metrics.jsonl").read_text().splitlines()]
        written = [(line["step"], line["val/accuracy"]) for line in lines if "val/accuracy" in line]
        shown = board(f"scalars/scalars?run={algo}&tag=val/accuracy")
        assert [(step, pytest.approx(value, rel=1e-5)) for _, step, value in shown] == written


@pytest.mark.slow
def test_the_table_of_runs_has_every_setting_and_the_best_accuracy(board, trained):
    columns = board("hparams/experiment", {"experimentName": ""})
    names = {info["name"] for info in columns["hparamInfos"]}
    assert {"algo", "way", "shot", "seed", "optimizer.lr"} <= names
    assert not {"data_dir", "device"} & names
    for algo in ALGORITHMS:  # each has settings that others lack
        own = flat(to_dict(load_checkpoint(trained(algo)).config))
        assert {f"{n}[]" if isinstance(value, list) else n for n, value in own if value is not None} <= names
    assert "val/best_accuracy" in {info["name"]["tag"] for info in columns["metricInfos"]}
    rows = session_groups(board, {"metric": {"group": "", "tag": "val/best_accuracy"}})
    shown = sorted(
        (row["hparams"]["algo"], value["value"])
        for row in rows
        for value in row["metricValues"]
        if value["name"]["tag"] == "val/best_accuracy"
    )
    results = [read_results(trained(algo) / "result.json").results[0] for algo in ALGORITHMS]
    expected = sorted((result.method, result.accuracy) for result in results)
    assert shown == [(method, pytest.approx(accuracy, rel=1e-5)) for method, accuracy in expected]


def session_groups(board, *columns: dict) -> list[dict]:
    query = {"experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"],
             "colParams": columns, "startIndex": 0, "sliceSize": 50}  # fmt: skip
    return board("hparams/session_groups", query)["sessionGroups"]


@pytest.mark.slow
def test_the_table_of_runs_is_sorted_by_any_setting(board):
    """Some settings are numbers in one run, and missing or null in others."""
    columns = board("hparams/experiment", {"experimentName": ""})
    for info in columns["hparamInfos"]:
        rows = session_groups(board, {"hparam": info["name"], "order": "ORDER_ASC"})
        values = [value for row in rows if (value := row["hparams"].get(info["name"])) is not None]
        assert len(rows) == len(ALGORITHMS)
        assert values == sorted(values)


def test_a_label_of_the_projector_is_one_line_whatever_the_name_of_its_class(tmp_path):
    with Logger(tmp_path, 0, -1) as logger:
        logger.hparams({"dataset": {"root": "photos\udce9"}})  # a file name that is not UTF-8
        logger.features(0, "val/features", torch.eye(2), ["a\tb\nc", "\udcff"], torch.zeros(2, 1, 4, 4))
    (names,) = tmp_path.rglob("metadata.tsv")
    assert names.read_text() == "a?b?c\n?\n"


def test_the_projector_gets_a_point_for_every_validation_image(metacv):
    assert metacv("train", *quick("protonet"), "projector=true", "hydra.run.dir=run")[0] == 0
    (folder,) = [path for path in Path("run").iterdir() if path.is_dir() and path.name.isdigit()]
    (names,) = folder.rglob("metadata.tsv")
    (features,) = folder.rglob("tensors.tsv")
    lines = names.read_text().splitlines()
    assert len(lines) == len(features.read_text().splitlines()) == 8 * 20
    assert len(set(lines)) == 8
    assert all(re.fullmatch(r"glyph\d+", name) for name in lines)
    assert Path("run/projector_config.pbtxt").is_file()


@pytest.mark.parametrize("algo", ["maml", "reptile"])
def test_accuracy_along_adaptation_is_that_of_fewer_inner_steps(trained, data_dir, algo):
    lines = [json.loads(line) for line in (trained(algo) / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "inner_steps/accuracy_003" in line][-1]
    assert [name for name in last if name != "step"] == [f"inner_steps/accuracy_{n:03d}" for n in (1, 2, 3)]
    checkpoint = load_checkpoint(trained(algo), "last.pt")
    config = checkpoint.config
    bank = build_dataset(config.dataset, str(data_dir)).load("val")
    episodes = EpisodeList(EpisodeSampler(bank, config.way, config.shot, config.query), 8)
    for n in (1, 2, 3):
        algorithm = checkpoint.build(replace(config, algo=config.algo | {"eval_inner_steps": n}))
        accuracy = evaluate_episodes(algorithm, episodes, config.batch_norm).mean()
        assert last[f"inner_steps/accuracy_{n:03d}"] == pytest.approx(float(accuracy), rel=1e-5)
