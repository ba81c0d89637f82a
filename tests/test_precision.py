"""Precision, compiled steps and memory: results are equal up to the rounding of the chosen precision."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from conftest import TRAIN, SmoothNet, random_tasks

from metacv.algorithms.gradient.maml import MAML
from metacv.algorithms.gradient.reptile import Reptile
from metacv.algorithms.metric.feat import FEAT
from metacv.algorithms.metric.matchingnet import MatchingNet
from metacv.algorithms.metric.protonet import ProtoNet
from metacv.algorithms.metric.r2d2 import R2D2
from metacv.algorithms.metric.relationnet import RelationNet
from metacv.model import load_checkpoint, save_checkpoint
from metacv.precision import precision

BUILD = {
    "maml": lambda: MAML(SmoothNet(), 3, inner_lr=0.1, inner_steps=2, eval_inner_steps=2),
    "fomaml": lambda: MAML(SmoothNet(), 3, inner_lr=0.1, inner_steps=2, eval_inner_steps=2, first_order=True),
    "reptile": lambda: Reptile(SmoothNet(), 3, 1e-2, 3, 4, 3, 4, inner_optimizer="sgd"),
    "reptile by adam": lambda: Reptile(SmoothNet(), 3, 1e-2, 3, 4, 3, 4),
    "protonet": lambda: ProtoNet(SmoothNet(running_stats=True)),
    "matchingnet": lambda: MatchingNet(SmoothNet(running_stats=True), 10.0),
    "feat": lambda: FEAT(SmoothNet(running_stats=True), temperature=5.0, balance=0.1, dropout=0.0),
    "r2d2": lambda: R2D2(SmoothNet(running_stats=True), penalty=1.0, scale=10.0, learn_penalty=True),
    "relationnet": lambda: RelationNet(SmoothNet(image_shape=(1, 12, 12), running_stats=True)),
}
compiles = pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++"
)


def trained(algorithm, steps: int = 2) -> dict[str, torch.Tensor]:
    """The state of an algorithm after some steps of SGD on fixed tasks."""
    optimizer = torch.optim.SGD(algorithm.parameters(), lr=0.1)
    size = 12 if isinstance(algorithm, RelationNet) else 6
    dtype = next(algorithm.parameters()).dtype
    algorithm.train()
    for seed in range(steps):
        optimizer.zero_grad()
        algorithm.training_step(random_tasks(tasks=3, shape=(1, size, size), dtype=dtype, seed=seed))
        optimizer.step()
    return algorithm.state_dict()


def gradients(algorithm, tasks) -> torch.Tensor:
    algorithm.train()
    algorithm.zero_grad()
    algorithm.training_step(tasks)
    return torch.cat([p.grad.flatten() for p in algorithm.parameters() if p.grad is not None])


@pytest.fixture(params=["recorded", pytest.param("compiled", marks=[compiles, pytest.mark.slow])])
def graph(request, monkeypatch) -> None:
    """Run the recorded operations as they are, or compiled, which takes a minute."""
    if request.param == "recorded":
        monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILD)
def test_compiled_steps_reach_the_weights_of_uncompiled_ones(name, graph):
    """Includes running statistics and moments, after two float64 steps: the graph must keep no value of the first."""
    states = []
    for compiled in (False, True):
        torch.manual_seed(0)
        algorithm = BUILD[name]().double()
        if compiled:
            algorithm.compile_training()
        states.append(trained(algorithm))
    for key, value in states[0].items():
        if name == "reptile by adam" and re.search(r"conv\d.bias$", key):
            continue  # before batch norm it has no gradient but rounding, which Adam divides by rounding
        torch.testing.assert_close(states[1][key], value, rtol=1e-10, atol=1e-13, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
def test_a_compiled_group_of_tasks_counts_by_its_number_of_tasks(graph):
    tasks = random_tasks(tasks=3, dtype=torch.float64)
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        algorithm = MAML(SmoothNet(), 3, 0.1, 1, 1, task_batching="vmap", task_chunk=2).double()  # two and one
        if compiled:
            algorithm.compile_training()
        found.append(gradients(algorithm, tasks))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-13)


@pytest.mark.slow
def test_a_missing_compiler_is_reported_in_one_line(metacv, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",)):  # monkeypatch would not put it back
        code, _, err = metacv("train", "algo=protonet", *TRAIN, "compile=true")
    assert code == 1
    assert "compile=true" in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize("name", sorted(BUILD.keys() - {"reptile by adam"}))  # which divides rounding by rounding
def test_bf16_changes_a_gradient_by_rounding_only(name):
    size = 12 if name == "relationnet" else 6
    tasks = random_tasks(shape=(1, size, size))
    found = []
    for kind in ("fp32", "bf16"):
        torch.manual_seed(0)
        algorithm = BUILD[name]()
        with precision(kind, torch.device("cpu")):
            found.append(gradients(algorithm, tasks))
    apart = float((found[1] - found[0]).norm() / found[0].norm())
    assert 1e-6 < apart < 0.15
    assert found[1].dtype == torch.float32


def test_precision_restores_the_flags_of_torch():
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [f.allow_tf32 for f in flags]
    with precision("tf32", torch.device("cpu")):
        assert [f.allow_tf32 for f in flags] == [True, True]
    with precision("fp32", torch.device("cpu")):
        assert [f.allow_tf32 for f in flags] == [False, False]
        assert not torch.is_autocast_enabled("cpu")
    assert [f.allow_tf32 for f in flags] == before


def test_predictions_are_in_fp32_whatever_the_flags_of_torch_are():
    algorithm, tasks, seen = BUILD["maml"](), random_tasks(), []
    expected = algorithm.predict(tasks, "transductive")
    algorithm.net.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    with precision("tf32", torch.device("cpu")), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(algorithm.predict(tasks, "transductive"), expected)
    assert seen
    assert not any(seen)


@pytest.mark.slow
def test_a_graph_of_one_precision_is_not_used_for_another(graph):
    algorithm, tasks, found = BUILD["maml"](), random_tasks(), []
    algorithm.compile_training()
    for kind in ("fp32", "bf16"):
        with precision(kind, torch.device("cpu")):
            found.append(gradients(algorithm, tasks))
    assert 1e-6 < float((found[1] - found[0]).norm() / found[0].norm()) < 0.15


def test_an_invalid_precision_is_refused_in_one_line(metacv):
    code, _, err = metacv("train", "algo=protonet", *TRAIN, "precision=fp16")
    assert (code, err.strip()) == (1, "metacv: precision=fp16: must be one of fp32, tf32, bf16")
    code, _, err = metacv("train", "algo=protonet", *TRAIN, "precision=tf32", "device=cpu")
    assert code == 1
    assert "precision=tf32" in err
    code, _, err = metacv("train", "algo=protonet", "dataset=omniglot", "precision=tf32", "device=cpu")
    assert "precision=tf32" in err  # before the data are loaded


def test_a_run_that_is_complete_needs_no_device_for_its_precision(metacv, trained):
    shutil.copytree(trained("protonet"), "run")
    state = load_checkpoint("run", "last.pt").content
    save_checkpoint(Path("run/last.pt"), state | {"config": state["config"] | {"precision": "tf32"}})
    tf32 = ("train", "resume=run", "precision=tf32", "device=cpu")
    Path("run/result.json").unlink()
    assert metacv(*tf32)[0] == 0
    assert Path("run/result.json").exists()
    code, _, err = metacv(*tf32, "steps=6")
    assert code == 1
    assert "precision=tf32: needs a GPU" in err
    save_checkpoint(Path("run/last.pt"), load_checkpoint("run", "last.pt").content | {"since_best": 1})
    assert metacv(*tf32, "steps=6", "patience=1")[0] == 0  # out of patience, so complete too


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept by a setting of glibc's")
def test_freed_memory_is_kept_for_the_next_step():
    """Count how many of twenty 64 MB tensors, created one after another, get new memory: all, or only the first few."""
    program = """
import resource, torch
from metacv.precision import keep_freed_memory

def allocations_of_new_memory():
    new = 0
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        new += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before >= 32  # pages, of 4 kB to 2 MB
    return new

print(allocations_of_new_memory())
keep_freed_memory()
print(allocations_of_new_memory())
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    given_back, kept = map(int, done.stdout.split())
    assert given_back == 20
    assert kept <= 10


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory in use is read from /proc")
@pytest.mark.parametrize("name", ["maml", "reptile", "protonet"])
def test_a_thousand_steps_take_no_more_memory_than_a_hundred(name):
    program = """
import sys
import torch
from conftest import random_tasks
from test_precision import BUILD
from metacv.precision import keep_freed_memory

def resident():  # in kB
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])

keep_freed_memory()
algorithm = BUILD[sys.argv[1]]().train()
for step in range(1000):
    if step == 100:
        before = resident()
    algorithm.zero_grad()
    algorithm.training_step(random_tasks(tasks=3, shape=(1, 6, 6), seed=step))
print(resident() / before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, name], check=True, capture_output=True, cwd=Path(__file__).parent
    )
    assert float(done.stdout) < 1.02
