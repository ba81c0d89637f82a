"""Training on several processes, started by torchrun as a user would start them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import TRAIN, bank_of
from hydra import compose, initialize_config_dir

from metacv import CONFIG_DIR
from metacv import processes as processes_module
from metacv.config import TrainConfig, typed
from metacv.data.sampler import EpisodeSampler
from metacv.data.transforms import Augment
from metacv.distributed import Ranks
from metacv.errors import UserError
from metacv.terminal import report_error
from metacv.train import prepare

# Steps so small that rounding stays rounding.
STEADY = (*TRAIN, "meta_batch=5", "optimizer=sgd", "optimizer.lr=1e-4", "augment.flip=true", "augment.crop=2")
REPTILE = ("algo.inner_optimizer=sgd", "algo.eval_inner_steps=3", "optimizer.lr=0.1")
ENDLESS = ("algo=protonet", *TRAIN, "steps=100000", "eval_every=50", "log_every=50", "hydra.run.dir=run")


def torchrun(*words: str, processes: int = 2, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*command, "-m", "metacv", "train", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def run_with(*words: str, processes: int = 2) -> str:
    run = torchrun(*words, processes=processes)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    return out


def state(folder: str) -> dict:
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def learned(folder: str) -> torch.Tensor:
    """All weights of a run in a row, without the running statistics of batch norm."""
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


def assert_two_processes_learn_what_one_learns(metacv, algorithms: list[str], words: tuple[str, ...]) -> None:
    """A sweep with one process, then with two, and one step at rate 0 for the initial weights.

    A second half of the jobs has too few tasks for two processes: each prints one line, and the others continue.
    """
    sweep = ("-m", f"algo={','.join(algorithms)}", *words, "hydra.sweep.subdir=${hydra:runtime.choices.algo}")
    assert metacv("train", *sweep, "hydra.sweep.dir=one")[0] == 0
    assert metacv("train", *sweep, "hydra.sweep.dir=start", "steps=1", "optimizer.lr=0")[0] == 0
    subdir = "hydra.sweep.subdir=${hydra:runtime.choices.algo}_${meta_batch}"
    run = torchrun(*sweep, "meta_batch=1,5", subdir, "hydra.sweep.dir=two")
    _, err = run.communicate(timeout=300)
    assert run.returncode != 0
    printed = [line for line in err.splitlines() if line.startswith("metacv: ") and "not above chance" not in line]
    assert printed == ["metacv: meta_batch=1: must be at least 2, the number of processes"] * len(algorithms)
    for algo in algorithms:
        assert_same_training(f"one/{algo}", f"two/{algo}_5", learned(f"start/{algo}"))
        for ours, theirs in zip(lines(f"one/{algo}"), lines(f"two/{algo}_5"), strict=True):
            assert ours.keys() == theirs.keys()
            assert ours.get("train/loss", 0) == pytest.approx(theirs.get("train/loss", 0), rel=1e-4)
            assert ours.get("train/accuracy", 0) == pytest.approx(theirs.get("train/accuracy", 0), abs=1e-6)


@pytest.mark.slow
def test_two_processes_reach_the_weights_of_one(metacv):
    assert_two_processes_learn_what_one_learns(metacv, ["maml", "protonet"], STEADY)


@pytest.mark.slow
@pytest.mark.parametrize(("algo", "words"), [("relationnet", STEADY), ("reptile", (*STEADY, *REPTILE))])
def test_two_processes_reach_the_weights_of_one_for_the_other_algorithms(metacv, algo, words):
    assert_two_processes_learn_what_one_learns(metacv, [algo], words)


@pytest.mark.slow
def test_a_run_resumes_with_more_processes_and_with_fewer(metacv):
    metacv("train", "algo=protonet", *STEADY, "steps=6", "hydra.run.dir=one")
    metacv("train", "algo=protonet", *STEADY, "steps=2", "hydra.run.dir=more")
    out = run_with("resume=more", "steps=4", processes=3)
    assert out.count("best in validation") == 1
    code, _, err = metacv("train", "resume=more", "steps=6")
    assert code == 0, err
    assert_same_training("one", "more")
    assert [line["step"] for line in lines("more")] == [line["step"] for line in lines("one")]


@pytest.mark.slow
def test_two_processes_resume_bit_exactly_with_random_layers(metacv):
    """FEAT has dropout. Each process draws its own masks."""
    words = ("algo=feat", *TRAIN, "meta_batch=2", "schedule=constant")
    run_with(*words, "steps=4", "hydra.run.dir=whole")
    run_with(*words, "steps=2", "hydra.run.dir=parts")
    run_with("resume=parts", "steps=4")
    assert torch.equal(learned("whole"), learned("parts"))
    metacv("train", *words, "steps=4", "hydra.run.dir=one")
    assert not torch.allclose(learned("whole"), learned("one"), atol=1e-6)  # the masks of the second task differ


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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes under /proc")
def test_if_one_process_is_killed_the_others_stop_and_the_run_resumes(metacv):
    run = torchrun(*ENDLESS, start_new_session=True)
    wait_for(lambda: Path("run/last.pt").exists(), run, "a checkpoint")
    os.kill(workers(run)[1], signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "metacv: rank 0 of 2: another process exited; stopping" in err
    step = state("run")["step"]
    code, _, err = metacv("train", "resume=run", f"steps={step + 1}")
    assert code == 0, err


@pytest.mark.slow
def test_a_signal_to_torchrun_saves_and_stops_all(metacv):
    run = torchrun(*ENDLESS, start_new_session=True)
    wait_for(lambda: Path("run/last.pt").exists(), run, "a checkpoint")
    run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    assert out.count("stopped at step") == 1
    assert f"stopped at step {state('run')['step']};" in out


@pytest.mark.slow
def test_an_error_is_printed_once(metacv):
    run = torchrun("algo=protonet", *TRAIN, "meta_batch=1", "hydra.run.dir=run")
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0
    printed = [line for line in err.splitlines() if line.startswith("metacv: ") and "not above chance" not in line]
    assert printed == ["metacv: meta_batch=1: must be at least 2, the number of processes"]


def test_other_ranks_print_only_errors_that_rank_zero_does_not_have(capsys, monkeypatch):
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    report_error(UserError("way=1"))
    assert capsys.readouterr().err == ""
    report_error(ConnectionResetError(104, "rank 1 of 2: another process exited"))
    assert capsys.readouterr().err == "metacv: rank 1 of 2: another process exited\n"
    monkeypatch.setenv("RANK", "0")
    report_error(UserError("way=1"))
    assert capsys.readouterr().err == "metacv: way=1\n"


def test_evaluation_runs_in_one_process(metacv, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, _, err = metacv("evaluate", "checkpoint=run")
    assert (code, err) == (1, "metacv: evaluate runs in one process; start it without torchrun\n")


def settings(data_dir: Path, *overrides: str) -> TrainConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return typed(compose("train", [*TRAIN, f"data_dir={data_dir}", *overrides]), TrainConfig)


def test_reptile_with_persistent_moments_refuses_several_processes(data_dir):
    with pytest.raises(UserError, match=r"algo.reset_moments=false .* 2 processes"):
        prepare(settings(data_dir, "algo=reptile"), [], Ranks(0, 2))
    run, _ = prepare(settings(data_dir, "algo=reptile", "algo.reset_moments=true"), [], Ranks())
    assert run.algorithm.sequential_because is None


def test_shares_are_complete_disjoint_and_even():
    for count, size in ((5, 2), (7, 3), (3, 3), (100, 7)):
        shares = [Ranks(rank, size).share(count) for rank in range(size)]
        assert [row for share in shares for row in range(count)[share]] == list(range(count))
        assert {len(range(count)[share]) for share in shares} <= {count // size, -(-count // size)}


def test_the_processes_together_draw_the_tasks_of_a_single_process():
    def sampler() -> EpisodeSampler:
        bank = bank_of([20] * 12, shape=(1, 8, 8))
        return EpisodeSampler(bank, 3, 2, 2, "per_class", 4, augment=Augment(2, True, 0.5, seed=1))

    whole = sampler().sample(5)
    parts = [sampler().sample(5, Ranks(rank, 2).share(5)) for rank in range(2)]
    assert torch.equal(torch.cat([part.support_x for part in parts]), whole.support_x)
    assert torch.equal(torch.cat([part.query_x for part in parts]), whole.query_x)
    assert torch.equal(torch.cat([part.seeds for part in parts]), whole.seeds)
    assert len(whole.seeds.unique()) == 5


def test_each_process_uses_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Ranks(3, 4, 1).device("auto") == "cuda:1"
    assert Ranks(3, 4, 1).device("cpu") == "cpu"
    assert Ranks().device("cuda:1") == "cuda:1"
    with pytest.raises(UserError, match="device=cuda:1: must be auto, cuda or cpu with 4 processes"):
        Ranks(3, 4, 1).device("cuda:1")


@pytest.mark.slow
def test_processes_on_the_command_line_train_as_torchrun_does(metacv, tmp_path):
    words = ("algo=protonet", *STEADY, "steps=4", "eval_every=2")
    for name, count in (("one", ()), ("two", ("processes=2",))):
        command = [sys.executable, "-m", "metacv", "train", *words, *count, f"hydra.run.dir={name}"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        assert run.stderr == ""
        assert run.stdout.count("best in validation") == 1
    assert_same_training("one", "two")
    assert metacv("train", "resume=two", "steps=6")[0] == 0


def processes(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "metacv", "train", "processes=2", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_command_alone_saves_and_stops_its_processes(metacv, number):
    run = processes(*ENDLESS)
    wait_for(lambda: Path("run/last.pt").exists(), run, "a checkpoint")
    run.send_signal(number)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    assert f"stopped at step {state('run')['step']};" in out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes under /proc")
def test_if_one_process_is_killed_before_it_connects_the_others_end(metacv):
    starter = "import sys; from metacv import cli, processes; processes.GRACE = 1; sys.argv[0] = 'metacv'; cli.main()"
    words = "train", "processes=2", *ENDLESS
    run = subprocess.Popen([sys.executable, "-c", starter, *words], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(workers(run)) == 2, run, "the processes")
    others = workers(run)
    os.kill(others[1], signal.SIGKILL)
    assert run.communicate(timeout=60)[1] == "metacv: a process was killed, and the others do not end; stopping them\n"
    assert run.returncode == 128 + signal.SIGKILL
    assert not Path(f"/proc/{others[0]}").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell a process that its parent has ended")
def test_if_the_command_is_killed_its_processes_save_and_end(metacv):
    run = processes(*ENDLESS)
    wait_for(lambda: Path("run/last.pt").exists(), run, "a checkpoint")
    run.kill()
    out, _ = run.communicate(timeout=60)  # its processes have the same output, so this waits for them
    assert f"stopped at step {state('run')['step']};" in out


def test_on_windows_the_parent_may_be_a_launcher_and_is_not_watched(monkeypatch):
    monkeypatch.setenv(processes_module.STARTER, "1")
    monkeypatch.setattr(threading, "Thread", lambda **_: pytest.fail("watches its parent"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "name", "nt")
        processes_module.end_with_starter()


def test_processes_that_do_not_end_are_killed_at_one_deadline_for_all(capfd):
    children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    start = time.monotonic()
    assert [processes_module.ended(child, start + 0.2) for child in children] == [-signal.SIGKILL] * 2
    assert time.monotonic() - start < 5
    assert "a process was killed, and the others do not end" in capfd.readouterr().err


@pytest.mark.slow
def test_an_error_in_several_processes_is_one_line(metacv, tmp_path):
    command = [sys.executable, "-m", "metacv", "train", "processes=2", "meta_batch=1", "hydra.run.dir=run"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (run.returncode, run.stderr) == (1, "metacv: meta_batch=1: must be at least 2, the number of processes\n")


@pytest.mark.parametrize("value", ["0", "two", "", "1.5", "100000"])
def test_processes_must_be_a_whole_number(metacv, value):
    assert metacv("train", f"processes={value}") == (
        1, "", f"metacv: processes={value}: must be a whole number from 1 to 1000\n"
    )  # fmt: skip


def test_processes_in_a_file_are_refused(metacv, tmp_path):
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "two.yaml").write_text("# @package _global_\nprocesses: 2\n")
    code, _, err = metacv("train", "--config-dir", "own", "experiment=two")
    assert code == 1
    assert "processes=2: give it on the command line, not in a file" in err
