"""The benchmark: all implementations compute the same, and its table shows what was measured."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import benchmark

CPU = torch.device("cpu")
ROWS = {row.name: row for row in benchmark.rows()}


def installed(row: benchmark.Row) -> list[str]:
    names = []
    for name, make in row.implementations.items():
        try:
            make(row.build())
        except ImportError:
            continue
        names.append(name)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if "miniImageNet" not in name])
def test_all_implementations_compute_the_same_gradient(name):
    row = replace(ROWS[name], query=2, way=min(ROWS[name].way, 10))  # fewer images, for a fast test
    names = installed(row)
    assert {"metacv", "plain loop", benchmark.OWN_NETWORK} <= {*names}
    assert benchmark.disagreement(row, names, torch.float64, CPU) <= row.tolerance


@pytest.mark.parametrize("wrong", ["first order", "one task of two"])
def test_an_implementation_that_computes_another_gradient_is_noticed(wrong):
    row = ROWS["MAML, 5 inner steps, head on 64 features"]

    def implementation(algorithm):
        algorithm.first_order = wrong == "first order"
        if wrong == "first order":
            return algorithm.training_step
        return lambda tasks: algorithm.training_step(next(tasks.split(1)))

    row = replace(row, implementations={**row.implementations, "wrong": implementation})
    assert benchmark.disagreement(row, ["metacv", "wrong"], torch.float64, CPU) > 1e-3


def test_the_usual_network_has_the_usual_layer_order_and_the_same_weights():
    row = ROWS["RelationNet, Omniglot"]
    own, usual = (row.algorithm(name, CPU) for name in ("metacv", "plain loop"))
    for key, value in own.state_dict().items():
        assert torch.equal(usual.state_dict()[key], value)
    for network in (usual.backbone, usual.relation):
        kinds = [type(layer).__name__ for layer in network.blocks[0]]
        assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]


def test_the_table_shows_the_measured_numbers():
    machine = {"device": "abacus", "torch": "2", "repeats": 3, "flops_per_second": 1e11, "bytes_per_second": 2e10}
    row = {
        "row": "MAML",
        "tasks_per_second": {"metacv": 12.345, "plain loop": 5.0},
        "against": {"plain loop": 2.469, "higher": 3.0},
        "peak_bytes": {"metacv": 250e6, "plain loop": 67e6},
        "flops_per_second": 4e10,
        "bytes_per_second": 1e9,
        "parts_of_time": {"convolutions": 0.75, "rest": 0.25},
    }
    result = {"machine": machine, "rows": [row]} | {part: {} for part in benchmark.PARTS}
    result |= {"settings": {"precision=fp32": 60.0, "compile=true": 90.0}}
    page = benchmark.markdown(result)
    assert "| MAML | 12.3 | 2.47 |  | 3.00 |  | 250 (67) |" in page
    assert "| MAML | 40% | 5% | 75% | 25% |" in page
    assert "| compile=true | 90 | 1.50 |" in page


@pytest.mark.slow
def test_the_benchmark_writes_a_table(tmp_path):
    words = ["head", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]
    subprocess.run([sys.executable, benchmark.__file__, *words], check=True, capture_output=True)
    result = json.loads((tmp_path / "benchmark.json").read_text())
    (row,) = result["rows"]
    assert row["peak_bytes"]["plain loop"] > 0
    assert row["tasks_per_second"]["metacv"] > 0
    for name, ratio in row["against"].items():
        assert ratio == pytest.approx(row["tasks_per_second"]["metacv"] / row["tasks_per_second"][name])
    assert f"{row['tasks_per_second']['metacv']:.3g}" in (tmp_path / "benchmark.md").read_text()


@pytest.mark.slow
def test_first_order_memory_is_flat_and_checkpointing_saves_most_of_second_order():
    first, tenth, plain, checkpointed = (benchmark.peak_memory(row, "metacv", CPU) for row in benchmark.memory_rows())
    assert tenth <= 1.05 * first
    assert checkpointed <= 0.4 * plain
