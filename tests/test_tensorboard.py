"""What TensorBoard shows of a run, asked of the real TensorBoard over HTTP."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import ALGORITHMS, quick

from metacv import checkpoint
from metacv.data.sampler import EpisodeList, EpisodeSampler
from metacv.evaluate import evaluate_episodes
from metacv.model import build_algorithm, build_dataset


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def board(metacv, place):
    """Asks a TensorBoard that shows a run of each algorithm."""
    for algo in ALGORITHMS:
        if not (place / algo).exists():
            assert metacv("train", *quick(algo), "projector=true", f"hydra.run.dir={place / algo}")[0] == 0
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


def test_every_algorithm_has_the_same_tags_and_its_table_and_pictures(board, place):
    tags = board("scalars/tags")
    common = {"train/loss", "train/accuracy", "train/tasks_per_second", "train/lr", "val/accuracy", "val/ci95",
              "val/best_accuracy"}  # fmt: skip
    for algo in ALGORITHMS:
        own = {tag for tag in tags[algo] if not tag.startswith("inner_steps/")}
        assert own == common
    assert "inner_steps/accuracy_003" in tags["maml"]
    assert "inner_steps/accuracy_003" in tags["reptile"]
    assert not any(tag.startswith("inner_steps/") for tag in tags["protonet"])
    for algo in ALGORITHMS:
        assert list(board("images/tags")[algo]) == ["val/episode"]
        lines = [json.loads(line) for line in (place / algo / "metrics.jsonl").read_text().splitlines()]
        written = [(line["step"], line["val/accuracy"]) for line in lines if "val/accuracy" in line]
        shown = board(f"scalars/scalars?run={algo}&tag=val/accuracy")
        assert [(step, pytest.approx(value, rel=1e-5)) for _, step, value in shown] == written

    columns = board("hparams/experiment", {"experimentName": ""})
    assert {"algo", "way", "shot", "seed", "optimizer.lr"} <= {info["name"] for info in columns["hparamInfos"]}
    assert not {"data_dir", "device"} & {info["name"] for info in columns["hparamInfos"]}
    metrics = [{"group": info["name"].get("group", ""), "tag": info["name"]["tag"]} for info in columns["metricInfos"]]
    assert [metric["tag"] for metric in metrics] == ["val/best_accuracy"]
    asked = {"experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"],
             "colParams": [{"metric": metrics[0]}], "startIndex": 0, "sliceSize": 50}  # fmt: skip
    rows = board("hparams/session_groups", asked)["sessionGroups"]
    assert {row["hparams"]["algo"] for row in rows} == {"MAML", "ProtoNet", "RelationNet", "Reptile"}
    for row in rows:
        result = json.loads((place / row["hparams"]["algo"].lower() / "result.json").read_text())
        assert row["metricValues"][0]["value"] == pytest.approx(result["accuracy"], rel=1e-5)


def test_the_projector_gets_a_point_for_every_image_when_asked(board, place):
    projected = board("projector/runs")
    assert set(projected) == set(ALGORITHMS)
    (folder,) = [path for path in (place / "protonet").iterdir() if path.is_dir() and path.name.isdigit()]
    (names,) = folder.rglob("metadata.tsv")
    (features,) = folder.rglob("tensors.tsv")
    lines = names.read_text().splitlines()
    assert len(lines) == len(features.read_text().splitlines()) == 8 * 20
    assert len(set(lines)) == 8
    assert all(re.fullmatch(r"glyph\d+", name) for name in lines)


def test_accuracy_along_adaptation_is_that_of_fewer_inner_steps(metacv, board, place):
    for algo, steps in (("maml", [1, 2, 3]), ("reptile", [1, 2, 3])):
        lines = [json.loads(line) for line in (place / algo / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "inner_steps/accuracy_003" in line][-1]
        assert [name for name in last if name != "step"] == [f"inner_steps/accuracy_{n:03d}" for n in steps]
        saved = checkpoint.load(place / algo / "last.pt")
        config = saved["config"]
        bank = build_dataset(config, config["data_dir"]).load("val")
        episodes = EpisodeList(EpisodeSampler(bank, config["way"], config["shot"], config["query"]), 8)
        for n in steps:
            algorithm = build_algorithm(config | {"algo": config["algo"] | {"eval_inner_steps": n}}, bank.image_shape)
            algorithm.load_state_dict(saved["algorithm"])
            found = evaluate_episodes(algorithm, episodes, config["norm"]).mean()
            assert last[f"inner_steps/accuracy_{n:03d}"] == pytest.approx(float(found), rel=1e-5)
