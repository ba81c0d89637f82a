"""Training on several processes, started by torchrun as a user would start them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ALGORITHMS, TRAIN, bank_of
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from metacv import MetacvError
from metacv.config import TrainConfig
from metacv.config_dir import config_dir
from metacv.data.sampler import EpisodeSampler
from metacv.data.transforms import Augment
from metacv.distributed import Processes
from metacv.run import plain
from metacv.train import prepare

# Steps so small that rounding stays rounding.
STEADY = (*TRAIN, "meta_batch=5", "optimizer=sgd", "optimizer.lr=1e-4", "augment.flip=true", "augment.crop=2")
REPTILE = ("algo=reptile", "algo.inner_optimizer=sgd", "algo.eval_inner_steps=3", "optimizer.lr=0.1")
ENDLESS = ("algo=protonet", *TRAIN, "steps=100000", "eval_every=50", "log_every=50", "hydra.run.dir=run")


def torchrun(*words: str, processes: int = 2, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*command, "-m", "metacv", "train", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def trained(*words: str, processes: int = 2) -> str:
    run = torchrun(*words, processes=processes)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    return out


def state(folder: str) -> dict:
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def learned(folder: str) -> torch.Tensor:
    """All weights of a run in a row, without the statistics that batch norm keeps."""
    kept = state(folder)["algorithm"].items()
    return torch.cat([value.flatten() for name, value in kept if value.is_floating_point() and "running" not in name])


def assert_same_training(one: str, other: str, start: torch.Tensor | None = None) -> None:
    assert torch.equal(state(one)["sampler"]["generator"], state(other)["sampler"]["generator"])
    difference = (learned(one) - learned(other)).abs().max()
    assert difference < 1e-5
    if start is not None:
        assert (learned(one) - start).abs().max() > 30 * difference


def lines(folder: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_learn_what_one_learns_with_each_algorithm(metacv):
    others = ",".join(name for name in ALGORITHMS if name != "reptile")
    sweep = ("-m", f"algo={others}", *STEADY, "hydra.sweep.subdir=${hydra:runtime.choices.algo}")
    for words, where in ((sweep, "hydra.sweep.dir="), ((*STEADY, *REPTILE), "hydra.run.dir=")):
        below = "" if words is sweep else "/reptile"
        metacv("train", *words, f"{where}one{below}")
        metacv("train", *words, f"{where}start{below}", "steps=1", "optimizer.lr=0")
        trained(*words, f"{where}two{below}")
    for algo in ALGORITHMS:
        assert_same_training(f"one/{algo}", f"two/{algo}", learned(f"start/{algo}"))
        for ours, theirs in zip(lines(f"one/{algo}"), lines(f"two/{algo}"), strict=True):
            assert ours.keys() == theirs.keys()
            assert ours.get("train/loss", 0) == pytest.approx(theirs.get("train/loss", 0), rel=1e-4)


def test_a_run_goes_on_with_more_processes_and_with_fewer(metacv):
    metacv("train", "algo=protonet", *STEADY, "steps=6", "hydra.run.dir=one")
    metacv("train", "algo=protonet", *STEADY, "steps=2", "hydra.run.dir=more")
    out = trained("resume=more", "steps=4", processes=3)
    assert out.count("best in validation") == 1
    code, _, err = metacv("train", "resume=more", "steps=6")
    assert code == 0, err
    assert_same_training("one", "more")
    assert [line["step"] for line in lines("more")] == [line["step"] for line in lines("one")]


def wait_for(condition, run: subprocess.Popen, what: str) -> None:
    for _ in range(1200):
        if condition():
            return
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    run.kill()
    pytest.fail(f"never came: {what}")


def workers(run: subprocess.Popen) -> dict[int, int]:
    """Process ids by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == run.pid:
                words = (folder / "environ").read_bytes().split(b"\0")
                found[next(int(word[5:]) for word in words if word.startswith(b"RANK="))] = int(folder.name)
        except (OSError, StopIteration):
            continue
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes under /proc")
def test_a_killed_process_ends_the_others_with_a_line_and_the_run_goes_on(metacv, tmp_path):
    run = torchrun(*ENDLESS, start_new_session=True)
    wait_for(lambda: Path("run/last.pt").exists(), run, "a checkpoint")
    os.kill(workers(run)[1], signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "metacv: process 0 of 2: another one has ended, and so does this" in err
    step = state("run")["step"]
    code, _, err = metacv("train", "resume=run", f"steps={step + 1}")
    assert code == 0, err


def test_a_signal_to_torchrun_saves_and_ends_all(tmp_path, monkeypatch, data_dir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METACV_DATA_DIR", str(data_dir))
    run = torchrun(*ENDLESS, start_new_session=True)
    wait_for(lambda: Path("run/last.pt").exists(), run, "a checkpoint")
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    assert out.count("stopped at step") == 1
    assert f"stopped at step {state('run')['step']};" in out


def test_what_is_wrong_is_said_once(tmp_path, monkeypatch, data_dir):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("METACV_DATA_DIR", str(data_dir))
    run = torchrun("algo=protonet", *TRAIN, "meta_batch=1", "hydra.run.dir=run")
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0
    said = [line for line in err.splitlines() if line.startswith("metacv: ")]
    assert said == ["metacv: meta_batch=1 is too few to share out between 2 processes"]


def test_evaluation_is_for_one_process(metacv, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, _, err = metacv("evaluate", "checkpoint=run")
    assert (code, err) == (1, "metacv: evaluate is one process's work: call it without torchrun\n")


def settings(data_dir, *overrides: str) -> dict:
    ConfigStore.instance().store(name="train_schema", node=TrainConfig)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return plain(compose("train", [*TRAIN, f"data_dir={data_dir}", *overrides]))


def test_reptile_with_moments_that_pass_from_task_to_task_is_refused(data_dir):
    with pytest.raises(MetacvError, match=r"algo.reset_moments=false passes moments .* cannot have 2 processes"):
        prepare(settings(data_dir, "algo=reptile"), [], Processes(0, 2))
    prepare(settings(data_dir, "algo=reptile", "algo.reset_moments=true"), [], Processes(0, 2))


def test_shares_are_whole_disjoint_and_even():
    for count, size in ((5, 2), (7, 3), (3, 3), (100, 7)):
        shares = [Processes(rank, size).share(count) for rank in range(size)]
        assert [row for share in shares for row in range(count)[share]] == list(range(count))
        assert {len(range(count)[share]) for share in shares} <= {count // size, -(-count // size)}


def test_the_parts_of_a_draw_are_the_tasks_of_the_whole():
    def sampler() -> EpisodeSampler:
        bank = bank_of([20] * 12, shape=(1, 8, 8))
        return EpisodeSampler(bank, 3, 2, 2, "per_class", 4, augment=Augment(2, True, 0.5, seed=1))

    whole = sampler().sample(5)
    parts = [sampler().sample(5, Processes(rank, 2).share(5)) for rank in range(2)]
    assert torch.equal(torch.cat([part.support_x for part in parts]), whole.support_x)
    assert torch.equal(torch.cat([part.query_x for part in parts]), whole.query_x)
    assert torch.equal(torch.cat([part.seeds for part in parts]), whole.seeds)
    assert len(whole.seeds.unique()) == 5


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Processes(3, 4, 1).device("auto") == "cuda:1"
    assert Processes(3, 4, 1).device("cpu") == "cpu"
    assert Processes().device("cuda:1") == "cuda:1"
    with pytest.raises(MetacvError, match="device=cuda:1: with 4 processes take auto, cuda or cpu"):
        Processes(3, 4, 1).device("cuda:1")
