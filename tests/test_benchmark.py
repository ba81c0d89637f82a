"""The benchmark: everybody computes the same, and the table says what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import benchmark  # noqa: E402

ROWS = {row.name: row for row in benchmark.rows()}


@pytest.mark.parametrize("name", [name for name in ROWS if "miniImageNet" not in name])
def test_every_contender_computes_the_same_gradient(name):
    row = ROWS[name]
    installed = []
    for contender, make in row.contenders.items():
        try:
            make(row.build())
            installed.append(contender)
        except ImportError:
            continue
    assert installed[:2] == ["metacv", "plain loop"]
    assert benchmark.disagreement(row, installed, torch.float64, torch.device("cpu")) <= row.agree


def test_a_contender_that_computes_something_else_is_found_out():
    row = ROWS["MAML, 5 inner steps, head on 64 features"]

    def first_order(algorithm):
        algorithm.first_order = True
        return algorithm.backward

    row.contenders["wrong"] = first_order
    try:
        found = benchmark.disagreement(row, ["metacv", "wrong"], torch.float64, torch.device("cpu"))
    finally:
        del row.contenders["wrong"]
    assert found > 1e-3


@pytest.mark.slow
def test_the_benchmark_writes_a_table(tmp_path):
    words = ["head", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]
    subprocess.run([sys.executable, str(ROOT / "scripts/benchmark.py"), *words], check=True, capture_output=True)
    result = json.loads((tmp_path / "benchmark.json").read_text())
    (row,) = result["rows"]
    assert row["peak_bytes"]["plain loop"] > 0
    assert row["tasks_per_second"]["metacv"] > 0
    for name, ratio in row["against"].items():
        assert ratio == pytest.approx(row["tasks_per_second"]["metacv"] / row["tasks_per_second"][name])
    assert f"{row['tasks_per_second']['metacv']:.3g}" in (tmp_path / "benchmark.md").read_text()


@pytest.mark.slow
def test_first_order_memory_is_flat_and_checkpointing_saves_most_of_second_order():
    first, tenth, plain, checkpointed = (
        benchmark.peak_memory(row, "metacv", torch.device("cpu")) for row in benchmark.memory_rows()
    )
    assert tenth <= 1.05 * first
    assert checkpointed <= 0.4 * plain


def test_the_usual_network_is_another_with_the_same_weights():
    row = ROWS["RelationNet, Omniglot"]
    own, usual = (row.algorithm(name, torch.device("cpu")) for name in ("metacv", "plain loop"))
    for key, value in own.state_dict().items():
        assert torch.equal(usual.state_dict()[key], value)
    for network in (usual.backbone, usual.relation):
        kinds = [type(layer).__name__ for layer in network.blocks[0]]
        assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]
