"""Sweeps with the launchers and sweepers of Hydra's plugins: each needs its extra, and takes tens of seconds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import quick
from omegaconf import OmegaConf

from metacv.results import read_results

pytestmark = pytest.mark.slow


def sweep(*words: str, tmp_path: Path, data_dir: Path, monkeypatch) -> str:
    monkeypatch.setenv("METACV_DATA_DIR", str(data_dir))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "metacv", "train", "-m", *quick("protonet"), "hydra.sweep.dir=sweep", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        ("hydra_joblib_launcher", ["launcher=joblib"]),
        ("hydra_submitit_launcher", ["hydra/launcher=submitit_local"]),  # as launcher=slurm, without a Slurm
        ("hydra_ray_launcher", ["launcher=ray"]),
    ],
)
def test_a_launcher_runs_every_combination(plugin, words, tmp_path, data_dir, monkeypatch):
    pytest.importorskip(f"hydra_plugins.{plugin}")
    sweep(*words, "seed=0,1", "shot=1,2", tmp_path=tmp_path, data_dir=data_dir, monkeypatch=monkeypatch)
    files = [read_results(path) for path in (tmp_path / "sweep").glob("*/result.json")]
    assert sorted((file.training["seed"], file.results[0].shot) for file in files) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert len(list((tmp_path / "sweep").glob("*/best.pt"))) == 4


def test_a_requeued_job_continues_from_its_last_validation(tmp_path, data_dir):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = [*quick("protonet"), "steps=400", "eval_every=20", "resume=auto", "seed=3"]
    launch = ["-m", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=job"]
    environment = os.environ | {"METACV_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "metacv", "train", *launch, *words]
    sweep = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while not (tmp_path / "sweep/job/last.pt").exists():
        assert sweep.poll() is None
        time.sleep(0.1)
    found = subprocess.run(["pgrep", "-f", f"submitit.core._submit {tmp_path}"], capture_output=True, text=True)
    os.kill(int(found.stdout.split()[0]), signal.SIGUSR2)  # as Slurm before it takes a job's place
    assert sweep.wait(timeout=300) == 0
    first, *lines = (tmp_path / "sweep/job/train.log").read_text().splitlines()
    assert "400 steps on " in first
    (again,) = [line for line in lines if ", from step " in line]
    assert int(again.split("from step ")[1].split()[0]) % 20 == 0
    assert read_results(tmp_path / "sweep/job/result.json").training["steps"] == 400


def test_slurm_gets_the_resources_of_the_config(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = [sys.executable, "-m", "metacv", "train", "launcher=slurm", "--cfg", "hydra", "-p", "hydra.launcher"]
    shown = OmegaConf.create(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)
    assert "SlurmLauncher" in shown._target_
    settings = subprocess.run([*command[:5], "--cfg", "job"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert OmegaConf.create(settings.stdout).resume == "auto"  # for a job that Slurm starts again
    assert (shown.gpus_per_node, shown.timeout_min, shown.array_parallelism) == (1, 240, 16)


def test_optuna_finds_the_trial_with_the_best_accuracy_in_validation(tmp_path, data_dir, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    sweep("sweeper=optuna", "hydra.sweeper.n_trials=4", "optimizer.lr=tag(log,interval(1e-5,1e-1))",
          tmp_path=tmp_path, data_dir=data_dir, monkeypatch=monkeypatch)  # fmt: skip
    best = OmegaConf.load(tmp_path / "sweep/optimization_results.yaml")
    files = [read_results(path) for path in (tmp_path / "sweep").glob("*/result.json")]
    assert len(files) == 4
    winner = max(files, key=lambda file: file.results[0].accuracy)
    assert best.best_value == pytest.approx(winner.results[0].accuracy)
    assert f"optimizer.lr={best.best_params['optimizer.lr']}" in winner.training["overrides"]
