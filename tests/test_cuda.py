"""On a GPU, every method computes the same as on the CPU, also compiled and in other precisions."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ALGORITHMS, KINDS, quick
from test_contracts import MODES, new_run
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from metacv.algorithms.base import Algorithm
from metacv.data.task import ImageBatch, TaskBatch
from metacv.precision import precision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda")


def on(device: torch.device | str, batch: TaskBatch | ImageBatch) -> TaskBatch | ImageBatch:
    """The batch in float64 on a device."""
    moved = {}
    for name, value in vars(batch).items():
        if isinstance(value, Tensor) and name != "seeds":  # which stay on the CPU
            moved[name] = value.to(device, torch.float64 if value.is_floating_point() else value.dtype)
    return replace(batch, **moved)


def gradient(algorithm: Algorithm, batch: TaskBatch | ImageBatch) -> Tensor:
    algorithm.train()
    algorithm.zero_grad()
    algorithm.training_step(batch)
    return torch.cat([p.grad.flatten().cpu() for p in algorithm.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradients_and_predictions_equal_those_of_the_cpu_in_float64(name, data_dir):
    run, validation = new_run(name, data_dir)
    own = run.algorithm.double()
    for module in own.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # each device draws at random by itself
    other = copy.deepcopy(own).to(GPU)
    if run.optimizer:
        batch = run.sampler.sample(4)
        expected, found = gradient(own, on("cpu", batch)), gradient(other, on(GPU, batch))
        # Adam divides by gradients that are zero up to rounding: those of biases before batch norm.
        assert (found - expected).norm() < (1e-6 if name == "reptile" else 1e-9) * expected.norm()
    tasks = next(validation.batches(2))
    for mode in MODES:
        expected = own.predict(on("cpu", tasks), mode)
        torch.testing.assert_close(other.predict(on(GPU, tasks), mode).cpu(), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["tf32", "bf16", "compiled"])
def test_faster_steps_change_a_gradient_by_rounding_only(name, kind, data_dir):
    run, _ = new_run(name, data_dir)
    algorithm, batch = run.algorithm.to(GPU), run.sampler.sample(4)
    batch = replace(batch, **{k: v.to(GPU) for k, v in vars(batch).items() if isinstance(v, Tensor) and k != "seeds"})
    fast = copy.deepcopy(algorithm)
    if kind == "compiled":
        fast.compile_training()
    with precision("fp32" if kind == "compiled" else kind, GPU):
        found = gradient(fast, batch)
    with precision("fp32", GPU):
        expected = gradient(algorithm, batch)
    assert (found - expected).norm() < (1e-3 if kind == "compiled" else 0.3) * expected.norm()


@pytest.mark.parametrize("name", KINDS)
def test_a_run_is_trained_resumed_and_evaluated(name, metacv, tmp_path: Path):
    words = [word for word in quick(name) if not word.startswith("steps=")]
    code, _, err = metacv("train", *words, "steps=2", "device=cuda", "hydra.run.dir=run")
    assert code == 0, err
    if name not in ("reptile", "classifier"):  # whose schedule spans the steps
        code, _, err = metacv("train", "resume=run", "steps=4")
        assert code == 0, err
    for file in ("best.pt", "last.pt"):  # torch.load fails on tensors of a device that a machine lacks
        tensors = [own for own in tree_leaves(torch.load(tmp_path / "run" / file)) if isinstance(own, Tensor)]
        assert {own.device.type for own in tensors} == {"cpu"}
    accuracies = []
    for device in ("cuda", "cpu"):
        code, out, err = metacv("evaluate", "checkpoint=run", f"device={device}", "episodes=20")
        assert code == 0, err
        accuracies.append(float(out.split("accuracy ")[1].split()[0]))
    assert abs(accuracies[0] - accuracies[1]) <= 1.0
