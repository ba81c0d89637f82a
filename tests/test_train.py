"""Training runs from the command line: what they write, how they stop and how they resume."""

import errno
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
from conftest import (
    BACKBONES,
    KINDS,
    SMALL,
    TRAIN,
    after_first_line,
    assert_same,
    bank_of,
    each,
    quick,
    random_tasks,
)
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metacv import CONFIG_DIR, __version__
from metacv import run as run_module
from metacv.algorithms.metric.protonet import ProtoNet
from metacv.algorithms.metric.relationnet import RelationNet
from metacv.backbones.conv4 import Conv4
from metacv.config import TrainConfig, typed
from metacv.data.glyphs import Glyphs
from metacv.data.sampler import EpisodeSampler
from metacv.distributed import Ranks
from metacv.errors import UserError
from metacv.logger import Logger
from metacv.model import build, build_dataset, build_optimizer, describe_device, load_checkpoint, save_checkpoint
from metacv.results import read_results
from metacv.run import Run
from metacv.text import duration
from metacv.train import RUNNING, clip, log_window, training_step

RUN = "hydra.run.dir=run"
PROTONET = ("train", *quick("protonet"))
EXPERIMENTS = sorted(
    p.relative_to(CONFIG_DIR / "experiment").with_suffix("").as_posix()
    for p in (CONFIG_DIR / "experiment").rglob("*.yaml")
)


def settings(*overrides: str) -> TrainConfig:
    """Return the settings of a command line, without the run's folder."""
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return typed(compose("train", [*overrides]), TrainConfig)


def metrics(folder: str | Path) -> list[dict]:
    """Lines of metrics.jsonl, without the speed."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "train/tasks_per_second"} for line in lines]


def learning_rates(folder: str | Path) -> list[float]:
    return [line["train/lr"] for line in metrics(folder) if "train/lr" in line]


def last(folder: str | Path) -> dict:
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def interrupt_at(monkeypatch, owner, name: str, condition, number: int = signal.SIGTERM) -> None:
    """Send this process a signal when `owner.name` is called for the first time with `condition(*arguments)`."""
    original, sent = getattr(owner, name), []

    def interrupting(*arguments):
        if condition(*arguments) and not sent:
            sent.append(True)
            os.kill(os.getpid(), number)
        return original(*arguments)

    monkeypatch.setattr(owner, name, interrupting)


def assert_same_run(one: str | Path, other: str | Path) -> None:
    """Compare bit for bit: weights, optimizer, sampler, random states, best and metrics."""
    ours, theirs = last(one), last(other)
    for content in (ours, theirs):
        del content["config"], content["overrides"], content["seconds"]

    assert_same(ours, theirs, "last.pt")
    assert metrics(one) == metrics(other)


def test_train_log_has_the_printed_lines_and_progress_lines(metacv, monkeypatch):
    monkeypatch.setattr("metacv.train.LINE_EVERY", 0)
    code, out, _ = metacv(*PROTONET, "log_every=2", RUN)
    assert code == 0
    lines = [line.split("  ", 1) for line in Path("run/train.log").read_text().splitlines()]
    texts = [text for _, text in lines]
    training = [text for text in texts if "tasks/s" in text]
    assert [text.split(":")[0] for text in training] == ["step 2 of 4", "step 4 of 4"]
    speed = r"step 2 of 4: loss [\d.]+, accuracy [\d.]+ %, [\d.]+ tasks/s, \d+ s left plus validation"
    assert re.fullmatch(speed, training[0])
    assert sum(": validation" in text for text in texts) == 2
    assert after_first_line(out).splitlines() == texts  # without a terminal, the output has all of them
    for moment, _ in lines:
        datetime.strptime(moment, "%Y-%m-%d %H:%M:%S")


def test_a_run_writes_checkpoints_metrics_events_and_config(metacv, trained):
    shutil.copytree(trained("protonet"), "run")
    folder = Path("run")
    assert OmegaConf.load(folder / ".hydra/config.yaml").steps == 4
    best = load_checkpoint(folder)
    assert best.config.steps == 4
    weights = {"config", "image_shape", "step", "algorithm", "splits", "training"}
    assert best.content.keys() == weights | {"validation", "format"}
    lines = metrics(folder)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "val/accuracy" in line] == [2, 4]
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/loss", "train/accuracy", "val/accuracy"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["val/episode"]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    (result,) = read_results(folder / "result.json").results
    best_line = max((line for line in lines if "val/accuracy" in line), key=lambda line: line["val/accuracy"])
    assert (result.step, result.split, result.method) == (best_line["step"], "val", "ProtoNet")
    assert result.accuracy == pytest.approx(best_line["val/accuracy"], rel=1e-5)


def test_a_run_prints_the_commands_that_come_next(metacv):
    code, out, err = metacv(*PROTONET, RUN)
    assert (code, err) == (0, "")
    assert "best in validation: " in out
    assert "checkpoint: run/best.pt" in out
    assert "metacv evaluate checkpoint=run" in out
    code, out, _ = metacv(*PROTONET, "hydra.run.dir=my run")
    assert code == 0
    assert "metacv evaluate 'checkpoint=my run'\n" in out
    assert "tensorboard --logdir 'my run'\n" in out


@pytest.mark.parametrize(
    "algo", [algo if algo == "protonet" else pytest.param(algo, marks=pytest.mark.slow) for algo in KINDS]
)
def test_training_learns_the_glyphs(metacv, algo):
    """From chance, 20 %, in a few steps."""
    steps = {"relationnet": 200}.get(algo, 40)
    inner = ["algo.eval_inner_steps=10"] if algo == "reptile" else []
    code, _, err = metacv("train", f"algo={algo}", *SMALL[:1], "query=5", "eval_episodes=60", f"steps={steps}",
                          f"eval_every={steps}", "backbone.channels=24", "meta_batch=2", *inner, RUN)  # fmt: skip
    assert code == 0, err
    (result,) = read_results(Path("run/result.json")).results
    assert result.accuracy - result.ci95 > 0.3


@pytest.mark.parametrize("algo", each())
def test_the_same_seed_gives_the_same_run(metacv, trained, algo):
    assert metacv("train", *quick(algo), RUN)[0] == 0
    assert_same_run("run", trained(algo))


def test_another_seed_gives_other_initial_weights_and_other_tasks(metacv, trained):
    assert metacv(*PROTONET, "seed=4", RUN)[0] == 0
    one, other = last("run"), last(trained("protonet"))
    assert not any(torch.equal(one["algorithm"][n], other["algorithm"][n]) for n in one["algorithm"] if "conv.w" in n)
    assert not torch.equal(one["sampler"]["generator"], other["sampler"]["generator"])


@pytest.mark.parametrize(
    ("algo", "number", "code"),
    [("protonet", signal.SIGTERM, 143), pytest.param("reptile", signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_resuming_equals_never_having_stopped(metacv, monkeypatch, algo, number, code):
    """The run is stopped by a signal between two validations and between two log entries."""
    train = ("train", *quick(algo), "steps=9", "log_every=4", "eval_every=3")
    assert metacv(*train, "hydra.run.dir=whole")[0] == 0
    drawn = []
    interrupt_at(monkeypatch, EpisodeSampler, "sample", lambda *_: drawn.append(1) or len(drawn) == 6, number)
    stopped, out, _ = metacv(*train, RUN)
    assert stopped == code
    assert "stopped at step 5; continue with: metacv train resume=run" in out
    assert last("run")["step"] == 5
    assert metacv("train", "resume=true", RUN)[0] == 0
    assert_same_run("whole", "run")
    assert OmegaConf.load("run/.hydra/config.yaml").algo == OmegaConf.load("whole/.hydra/config.yaml").algo


@pytest.mark.slow
def test_a_run_that_is_killed_between_validations_continues_from_the_last_log_entry(metacv, monkeypatch):
    words = (*PROTONET, "steps=6", "eval_every=6", "log_every=2")

    def killed_at_step_5(seconds: float) -> None:
        steps = iter(range(5))
        monkeypatch.setattr("metacv.train.SAVE_EVERY", seconds)
        with monkeypatch.context() as patch:
            patch.setattr("metacv.train.training_step", lambda *run: training_step(*run) if next(steps) < 4 else 1 / 0)
            assert metacv(*words, RUN)[0] == 1

    killed_at_step_5(seconds=300)
    assert not Path("run/last.pt").exists()
    killed_at_step_5(seconds=0)
    assert last("run")["step"] == 4
    assert not Path("run/best.pt").exists()
    assert metacv("train", "resume=true", RUN)[0] == 0
    monkeypatch.setattr("metacv.train.SAVE_EVERY", 300)
    assert metacv(*words, "hydra.run.dir=whole")[0] == 0
    assert_same_run("run", "whole")


def test_leftover_files_of_a_killed_run_do_not_affect_resuming(metacv, trained):
    """A kill leaves a temporary file, and half a line of metrics after the checkpoint."""
    shutil.copytree(trained("protonet"), "run")
    Path("run/.last.pt.123.tmp").write_bytes(b"half")
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/loss": 7.0}\n{"step": 6, "val/accur')
    assert metacv("train", "resume=run", "steps=6")[0] == 0
    assert metacv(*PROTONET, "steps=6", "hydra.run.dir=whole")[0] == 0
    assert_same_run("whole", "run")
    assert not list(Path("run").glob(".*.tmp"))


def test_a_run_can_be_lengthened_in_its_folder(metacv, trained):
    shutil.copytree(trained("protonet"), "run")
    assert metacv(*PROTONET, "steps=8", "hydra.run.dir=whole")[0] == 0
    code, out, err = metacv("train", "resume=run", "steps=8")
    assert (code, err) == (0, "")
    assert "checkpoint: run/best.pt" in out
    assert_same_run("whole", "run")
    code, _, err = metacv("train", "resume=run/last.pt", "steps=3")
    assert (code, err) == (1, "metacv: steps=3: must be at least 8, the step of run/last.pt\n")


def test_resuming_into_another_folder_copies_the_best_checkpoint_and_the_curves(metacv, monkeypatch):
    """Validations get worse, so that the best is an earlier one."""
    accuracies = iter([0.9, 0.5, 0.4, 0.3])
    monkeypatch.setattr("metacv.train.evaluate_episodes", lambda *_: torch.full((8,), next(accuracies)).double())
    assert metacv(*PROTONET, RUN)[0] == 0
    assert metacv("train", "resume=run", "steps=8", "hydra.run.dir=other")[0] == 0
    assert [line["val/accuracy"] for line in metrics("other") if "val/accuracy" in line] == [0.9, 0.5, 0.4, 0.3]
    assert Path("other/best.pt").read_bytes() == Path("run/best.pt").read_bytes()
    events = EventAccumulator("other").Reload()
    assert [(event.step, event.value) for event in events.Scalars("val/accuracy")] == [
        (2, pytest.approx(0.9)), (4, pytest.approx(0.5)), (6, pytest.approx(0.4)), (8, pytest.approx(0.3))
    ]  # fmt: skip
    assert [event.step for event in events.Scalars("train/loss")] == [*range(1, 9)]


def test_paths_mean_the_same_where_hydra_changes_the_folder(metacv, data_dir, monkeypatch):
    """Paths of the run, of another run to start from or to continue, of data, and printed paths."""
    monkeypatch.setenv("METACV_DATA_DIR", os.path.relpath(data_dir))
    here = Path.cwd()
    code, out, err = metacv(*PROTONET, RUN, "hydra.job.chdir=true")
    assert (code, err) == (0, "")
    assert "checkpoint: run/best.pt" in out
    assert metacv("train", "resume=run", "steps=6", "hydra.job.chdir=true")[::2] == (0, "")
    assert last("run")["step"] == 6
    assert metacv(*PROTONET, "hydra.run.dir=next", "init=run", "hydra.job.chdir=true")[::2] == (0, "")
    assert Path.cwd() == here
    assert sorted(path.name for path in Path().iterdir()) == ["next", "run"]


@pytest.mark.slow
@pytest.mark.usefixtures("may_be_at_chance")
@pytest.mark.parametrize("algo", ["maml", "reptile"])
def test_the_head_starts_at_zero_on_a_trained_backbone(metacv, trained, monkeypatch, algo):
    def head(folder: str, *words: str) -> float:
        words = (*quick(algo), "steps=1", "optimizer.lr=1e-9", *words, f"hydra.run.dir={folder}")
        assert metacv("train", *words)[::2] == (0, "")
        return float(last(folder)["algorithm"]["net.head.weight"].abs().max())

    assert head("new") > 0.01
    assert head("after_another_run", f"init={trained(algo)}") < 1e-6
    monkeypatch.setattr(Conv4, "load_pretrained", lambda self: "weights of some file")
    assert head("pretrained") < 1e-6


def test_a_backbone_without_running_statistics_starts_from_one_with_them(metacv, trained):
    first = trained("protonet")
    words = ("train", "algo=maml", *TRAIN, "backbone=conv4", "backbone.running_stats=false", "optimizer.lr=1e-9")
    assert metacv(*words, "steps=1", f"init={first}", "hydra.run.dir=run")[::2] == (0, "")
    before = {name: value for name, value in last(first)["algorithm"].items() if name.startswith("backbone.")}
    after = last("run")["algorithm"]
    shared = [name for name in before if f"net.{name}" in after]
    assert {name.rpartition(".")[2] for name in before.keys() - set(shared)} == RUNNING
    torch.testing.assert_close(
        {n: after[f"net.{n}"] for n in shared}, {n: before[n] for n in shared}, atol=1e-6, rtol=0
    )


def test_resume_works_with_overrides_that_add_or_delete_keys(metacv):
    command = (*PROTONET, "+optimizer.amsgrad=true", "~optimizer.weight_decay", RUN)
    assert metacv(*command)[0] == 0
    assert metacv(*command, "resume=true", "steps=6")[0] == 0
    code, _, err = metacv(*command, "resume=true", "steps=8")
    assert (code, err) == (0, "")
    assert last("run")["step"] == 8


@pytest.mark.slow
def test_resuming_refuses_changed_settings_that_affect_training(metacv, trained):
    shutil.copytree(trained("reptile"), "run")
    files = (Path("run/last.pt"), Path("run/.hydra/config.yaml"))
    before = [path.read_bytes() for path in files]
    for change, message in [
        ("way=4", "resume: algo.way is 4, but run/last.pt was trained with 5"),
        ("steps=8", "resume: schedule.total_iters is 8, but run/last.pt was trained with 4"),
        ("algo.inner_lr=0.5", "resume: algo.inner_lr is 0.5, but run/last.pt was trained with 0.001"),
        ("resume=elsewhere", "elsewhere: there is no such file"),
        ("resume=run/typo.pt", "run/typo.pt: there is no such file"),
        ("resume=run/best.pt", "run/best.pt holds weights only"),
        ("resume=false", "run holds a run; resume=auto continues it"),
    ]:
        code, _, err = metacv("train", "resume=true", RUN, change)
        assert code == 1
        assert message in err
        assert err.count("\n") == 1
        assert [path.read_bytes() for path in files] == before


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", ["inductive", "transductive"])
def test_a_signal_interrupts_validation_which_is_repeated_on_resume(metacv, monkeypatch, batch_norm):
    """Inductive validation embeds images once; transductive validation passes episode after episode."""
    train = (*PROTONET, "eval_episodes=40", f"batch_norm={batch_norm}")
    assert metacv(*train, "hydra.run.dir=whole")[0] == 0
    calls = []

    def validates(model, *_):
        inductive = batch_norm == "inductive"
        if not (inductive and model.training):  # images are embedded in training too
            calls.append(1)
        return bool(calls)

    interrupt_at(monkeypatch, ProtoNet, "embed" if batch_norm == "inductive" else "predict", validates)
    code, out, _ = metacv(*train, RUN)
    assert code == 143
    assert "stopped at step 2" in out
    assert len(calls) == 1
    assert not any("val/accuracy" in line for line in metrics("run"))
    assert metacv("train", "resume=run")[0] == 0
    assert_same_run("whole", "run")


def test_a_signal_after_the_last_validation_waits_until_all_files_are_written(metacv, monkeypatch):
    is_last = lambda path, content: content["step"] == 4 and path.name == "last.pt"  # noqa: E731
    interrupt_at(monkeypatch, run_module, "save_checkpoint", is_last)
    code, out, _ = metacv(*PROTONET, RUN)
    assert code == 143
    assert "best in validation" in out
    assert Path("run/result.json").exists()


def test_a_run_in_a_folder_of_any_name_continues(metacv):
    name = "a run (lr=0.1, it's)"
    code, out, err = metacv(*PROTONET, f"hydra.run.dir={name}")
    assert (code, err) == (0, "")
    (evaluate,) = [line for line in out.splitlines() if line.startswith("to test:")]
    checkpoint = shlex.split(evaluate)[-1]
    assert metacv("evaluate", checkpoint)[0] == 0
    code, _, err = metacv("train", checkpoint.replace("checkpoint=", "resume="), "steps=6")
    assert (code, err) == (0, "")
    assert last(name)["step"] == 6


def test_the_learning_rate_of_a_run_follows_its_schedule(trained, metacv):
    assert learning_rates(trained("reptile")) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert metacv(*PROTONET, "schedule.step_size=2", RUN)[0] == 0
    assert learning_rates("run") == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["schedule=constant"], [1e-3] * 4),
        (["algo=maml", "schedule=cosine", "optimizer=sgd"], [1e-2, 0.00853553, 0.005, 0.00146447]),
        # annotations of this class cannot be resolved
        (["schedule._target_=torch.optim.lr_scheduler.MultiStepLR", "+schedule.milestones=[2]", "schedule.gamma=0.1",
          "~schedule.step_size"], [1e-3, 1e-3, 1e-4, 1e-4]),
    ],
)  # fmt: skip
def test_schedules_give_the_expected_learning_rates(overrides, expected):
    cfg = settings("algo=protonet", "steps=4", "backbone.channels=4", *overrides)
    optimizer, schedule = build_optimizer(cfg, build(cfg, (1, 28, 28)))
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, rel=1e-5)


def test_clipping_bounds_the_step(metacv):
    """With SGD at rate 1, a step is as long as the gradient: at most 1e-3 for the only network."""
    sgd = (*PROTONET, "optimizer=sgd", "schedule=constant", "steps=1", "eval_every=1")
    assert metacv(*sgd, "optimizer.lr=1", "clip_norm=1e-3", RUN)[0] == 0
    assert metacv(*sgd, "optimizer.lr=1e-12", "hydra.run.dir=start")[0] == 0
    after, before = last("run")["algorithm"], last("start")["algorithm"]
    moved = sum(float((after[n] - before[n]).square().sum()) for n in after if "running" not in n and "num" not in n)
    assert moved**0.5 == pytest.approx(1e-3, rel=1e-2)


def test_gradients_are_clipped_by_value_and_by_the_norm_of_each_network():
    algorithm = RelationNet(Conv4((1, 28, 28), channels=4, downsample=["max_pool", "max_pool", "none", "none"]))
    for parameter in algorithm.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    clip(algorithm, norm=0.5, value=None)
    for network in (algorithm.backbone, algorithm.relation):
        total = sum(float(p.grad.square().sum()) for p in network.parameters()) ** 0.5
        assert total == pytest.approx(0.5, rel=1e-4)
    for parameter in algorithm.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)
    clip(algorithm, norm=None, value=2.0)
    assert all((p.grad == -2).all() for p in algorithm.parameters())


@pytest.mark.slow
def test_in_a_pipe_the_header_and_validations_are_flushed_at_once(tmp_path, data_dir):
    process = start(tmp_path, data_dir, *PROTONET[1:], "steps=400", "eval_every=2", RUN)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(9)]
    process.terminate()
    assert lines[0].startswith(f"metacv {__version__}: train algo=protonet ")
    starts = [re.match(r"\w+ +", line) for line in lines[1:7]]
    assert [start and start[0].rstrip() for start in starts] == [
        "method",
        "data",
        "network",
        "device",
        "steps",
        "folder",
    ]
    assert {start and len(start[0]) for start in starts} == {10}
    assert "train 30 classes (600 images), val 8 classes (160 images)" in lines[2]
    assert re.fullmatch(r"step 1 of 400: loss .* tasks/s, \d+ (s|min) left plus validation\n", lines[7])
    assert re.fullmatch(r"step 2 of 400: validation \d+\.\d\d ± \d+\.\d\d %, best so far, \d+ (s|min) left\n", lines[8])
    process.communicate(timeout=60)


@pytest.mark.slow
def test_the_header_says_when_several_processes_may_be_faster(metacv, monkeypatch, threads):
    threads(4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for words, expected in {
        ("algo=protonet", "meta_batch=6", "eval_episodes=3"): " (processes=3 may be faster)",
        ("algo=protonet", "meta_batch=6", "eval_episodes=2"): " (processes=2 may be faster)",  # each needs an episode
        ("algo=protonet", "meta_batch=1", "eval_episodes=3"): "",
        ("algo=classifier", "meta_batch=6", "eval_episodes=3"): "",  # its images pass through the network together
        ("algo=reptile", "meta_batch=6", "eval_episodes=3"): "",  # processes cannot share its moments
    }.items():
        _, out, _ = metacv("train", *words, "steps=1", "eval_every=1", "query=1", "device=cpu", RUN, "dry_run=true")
        assert re.search("^device .*, 4 threads(.*)$", out, re.MULTILINE)[1] == expected


def test_durations_are_shown_in_a_suitable_unit():
    texts = {0: "0 s", 99.4: "99 s", 100: "2 min", 5400: "90 min", 6000: "1.7 h", 360000: "100.0 h"}
    assert {seconds: duration(seconds) for seconds in texts} == texts


def test_best_is_the_best_validation_and_patience_ends_the_run(metacv, monkeypatch):
    accuracies = iter([0.3, 0.6, 0.5, 0.55, 0.9])
    monkeypatch.setattr("metacv.train.evaluate_episodes", lambda *_: torch.full((8,), next(accuracies)).double())
    code, out, _ = metacv(*PROTONET, "steps=10", "patience=2", RUN)
    assert code == 0
    assert "stopped at step 8: no new best in 2 validations (patience)" in out
    best, state = torch.load("run/best.pt", weights_only=True), last("run")
    assert (best["step"], best["validation"]["accuracy"]) == (4, pytest.approx(0.6))
    assert (state["step"], state["since_best"], state["best"]["step"]) == (8, 2, 4)
    assert "optimizer" not in best


def test_a_diverged_validation_is_logged_and_is_never_the_best(metacv, monkeypatch):
    values = iter([float("nan"), 0.3, float("nan"), 0.2])

    def accuracy(*_):
        some = torch.full((8,), 0.3).double()
        some[2:4] = next(values)
        return some

    monkeypatch.setattr("metacv.train.evaluate_episodes", accuracy)
    code, out, err = metacv(*PROTONET, "steps=8", "eval_every=2", "eval_episodes=8", RUN)
    assert code == 0
    assert "at step 4 " in out
    lines = [line for line in metrics("run") if any(name.startswith("val/") for name in line)]
    assert [line.get("val/diverged") for line in lines] == [0.25, None, 0.25, None]
    assert ["val/accuracy" in line for line in lines] == [False, True, False, True]
    assert "metacv: warning: validation at step 6: predictions are not finite in 2 of 8 episodes\n" in err


def test_a_run_whose_validations_all_diverged_fails_and_names_the_rate(metacv, monkeypatch):
    monkeypatch.setattr("metacv.train.evaluate_episodes", lambda *_: torch.full((8,), torch.nan).double())
    code, out, err = metacv("train", *quick("maml"), RUN)
    assert code == 1
    assert "best in validation" not in out
    assert err.splitlines()[-1] == (
        "metacv: every validation had predictions that are not finite: adaptation diverged with algo.inner_lr=0.4; "
        "there is no best.pt, and run/last.pt has the last weights"
    )
    assert not Path("run/best.pt").exists()
    assert all(math.isfinite(value) for line in metrics("run") for value in line.values())


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step_and_the_last_good_checkpoint(metacv, monkeypatch):
    loss, calls = ProtoNet.loss, []

    def breaking(self, logits, labels):
        calls.append(1)  # the first is counted in FLOPs, and is no step
        return loss(self, logits, labels) * (float("nan") if len(calls) == 6 else 1)

    monkeypatch.setattr(ProtoNet, "loss", breaking)
    code, _, err = metacv(*PROTONET, "steps=8", "eval_every=3", "log_every=100", RUN)
    assert (code, err) == (1, "metacv: the loss is not finite at step 5; the last good checkpoint is run/last.pt\n")
    saved = last("run")
    assert saved["step"] == 3
    assert all(value.isfinite().all() for value in saved["algorithm"].values())


def test_weights_that_are_not_finite_are_never_saved(metacv, monkeypatch):
    """The loss of the last step is still finite; its update is not."""

    def breaking(self) -> None:
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(torch.inf)

    monkeypatch.setattr(torch.optim.SGD, "step", breaking)
    code, _, err = metacv(*PROTONET, "optimizer=sgd", "eval_every=1", RUN)
    assert code == 1
    assert "are not finite after step 1; no checkpoint had been saved" in err
    assert not list(Path("run").glob("*.pt"))


@pytest.mark.slow
def test_a_sweep_runs_every_combination_and_continues_after_one_that_fails(metacv):
    code, _, err = metacv("train", "-m", "algo=maml,protonet", "shot=1,100", *TRAIN, "hydra.sweep.dir=sweep")
    assert code == 1
    assert err.count("metacv: train_shot=100 + train_query=5 needs 105 images per class,") == 2
    assert sorted(path.parent.name for path in Path("sweep").glob("*/result.json")) == [
        "0_maml_glyphs_5w1s",
        "2_protonet_glyphs_5w1s",
    ]


def test_the_option_of_a_sweep_may_stand_between_settings(metacv):
    assert metacv("train", *quick("protonet"), "-m", "seed=0,1", "hydra.sweep.dir=sweep")[0] == 0
    assert len(list(Path("sweep").glob("*/result.json"))) == 2


@pytest.mark.slow
def test_a_sweep_that_was_interrupted_is_finished_by_the_same_command_with_resume_auto(metacv, monkeypatch):
    """The first run was finished, the second stopped by a signal, and the third not begun."""
    command = ("train", "-m", *quick("protonet"), "seed=0,1,2", "resume=auto")
    assert metacv(*command, "hydra.sweep.dir=whole")[0] == 0
    drawn = []
    with monkeypatch.context() as patch:
        interrupt_at(patch, EpisodeSampler, "sample", lambda *_: drawn.append(1) or len(drawn) == 9, signal.SIGTERM)
        assert metacv(*command, "hydra.sweep.dir=sweep")[0] == 143
    before = [last(folder)["step"] for folder in sorted(Path("sweep").glob("*_*"))]
    assert before[0] == 4
    assert 0 < before[1] < 4
    assert len(before) == 2
    for _ in range(2):  # the second time all are finished
        assert metacv(*command, "hydra.sweep.dir=sweep")[0::2] == (0, "")
        for own, whole in zip(sorted(Path("sweep").glob("*_*")), sorted(Path("whole").glob("*_*")), strict=True):
            assert_same_run(str(own), str(whole))


def test_resume_auto_refuses_settings_that_the_run_was_not_trained_with(metacv, trained):
    shutil.copytree(trained("protonet"), "run")
    code, _, err = metacv(*PROTONET, RUN, "way=4", "resume=auto")
    assert (code, err) == (1, "metacv: resume: train_way is 4, but run/last.pt was trained with 5\n")


@pytest.mark.slow
def test_eight_jobs_of_a_sweep_leave_eight_results(metacv):
    code, _, err = metacv("train", "-m", f"algo={','.join(KINDS)}", "shot=1,5", *TRAIN, "steps=2",
                          "eval_episodes=2", "hydra.sweep.dir=sweep")  # fmt: skip
    assert code == 0
    assert all(line.startswith("metacv: warning: ") for line in err.splitlines())  # of accuracies at chance
    shots = [read_results(path).results[0].shot for path in Path("sweep").glob("*/result.json")]
    assert sorted(shots) == [1] * len(KINDS) + [5] * len(KINDS)
    assert len(list(Path("sweep").glob("*/best.pt"))) == 2 * len(KINDS)


def test_the_time_of_a_run_excludes_the_time_between_stop_and_resume(metacv, trained):
    shutil.copytree(trained("protonet"), "run")
    path = Path("run/last.pt")
    first = read_results(Path("run/result.json")).training["seconds"]
    state = last("run")
    save_checkpoint(path, state | {"seconds": state["seconds"] + 1000})
    start = time.perf_counter()
    assert metacv("train", "resume=run", "steps=6")[0] == 0
    file = read_results(Path("run/result.json"))
    assert 1000 < file.training["seconds"] < 1001 + first + time.perf_counter() - start
    assert file.training["steps"] == 6
    assert file.training["overrides"] == [word for word in quick("protonet") if word != "steps=4"] + ["steps=6"]
    assert file.results[0].torch == torch.__version__
    assert re.search(r"\S.*, \d+ threads?$", file.results[0].device)


@pytest.mark.slow
def test_a_result_names_each_hardware_that_a_run_was_trained_on(metacv, trained):
    shutil.copytree(trained("protonet"), "run")
    save_checkpoint(Path("run/last.pt"), last("run") | {"hardware": "abacus", "validated": 2})

    def device(*words):
        assert metacv("train", "resume=run", *words)[0] == 0
        return read_results(Path("run/result.json")).results[0].device

    assert device() == "abacus"  # the last step was only validated here
    here = describe_device(torch.device("cpu"))
    assert device("steps=6") == device("steps=8") == device() == f"abacus to step 4, then {here}"


def test_only_hardware_that_trained_a_step_is_named():
    run = object.__new__(Run)
    run.here, run.before, run.resumed, run.step = "here", "", 0, 0
    assert run.hardware == "here"

    def after(before, resumed, step):
        run.before, run.resumed, run.step = before, resumed, step
        return run.hardware

    assert after("abacus", 4, 4) == "abacus"  # so far
    assert after("abacus", 4, 5) == "abacus to step 4, then here"
    assert after("abacus", 0, 5) == "here"
    assert after("", 4, 5) == "here"  # by an earlier version, which kept no hardware
    assert after("abacus to step 4, then here", 6, 8) == "abacus to step 4, then here"
    assert after("here to step 4, then abacus", 6, 8) == "here to step 4, then abacus to step 6, then here"
    assert after("x" * 1000, 6, 8) == f"{'x' * 499}...{'x' * 477} to step 6, then here"


def test_training_never_loads_the_test_split(metacv, monkeypatch):
    load, loaded = Glyphs.load, []
    monkeypatch.setattr(Glyphs, "load", lambda self, split: loaded.append(split) or load(self, split))
    assert metacv(*PROTONET, RUN)[0] == 0
    assert sorted(set(loaded)) == ["train", "val"]


@pytest.mark.parametrize("algo", ["maml", "reptile"])
def test_the_head_has_a_row_for_each_class_of_a_training_task(algo):
    cfg = settings(f"algo={algo}", "train_way=7", "backbone.channels=4")
    assert build(cfg, (1, 28, 28)).net.head.weight.shape[0] == 7


@pytest.mark.slow
def test_a_frozen_backbone_is_validated_without_a_training_step(metacv):
    small = [word for word in TRAIN if not word.startswith("backbone")]
    frozen = ("backbone=torchvision", "backbone.name=mobilenet_v3_small", "backbone.frozen=true")
    code, out, err = metacv("train", "algo=protonet", *frozen, *small, "eval_episodes=2", "query=1", RUN)
    assert (code, err) == (0, "")
    assert "all parameters are frozen: the initial weights were validated, and nothing was trained" in out
    assert load_checkpoint("run").step == 0
    assert [line["step"] for line in metrics("run")] == [0]
    file = read_results(Path("run/result.json"))
    assert (file.training["steps"], file.results[0].step) == (0, 0)
    assert metacv("evaluate", "checkpoint=run", "split=val", "episodes=2", "hydra.run.dir=evaluation")[0] == 0
    evaluated = read_results(Path("evaluation/result.json")).results[0]
    assert evaluated.accuracy == file.results[0].accuracy
    assert metacv("train", "resume=run")[0] == 0


class TwoProcesses(Ranks):
    """The first of two processes; the other one adds 1 to every sum."""

    def __init__(self) -> None:
        super().__init__(rank=0, size=2)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values.add_(1)


class WithTemperature(ProtoNet):
    def training_step(self, tasks) -> dict[str, torch.Tensor]:
        return super().training_step(tasks) | {"temperature": torch.tensor(4.0)}


def test_every_scalar_of_a_training_step_is_averaged_over_the_processes_and_logged(tmp_path):
    cfg = settings("meta_batch=2", "way=3", "query=2")
    algorithm = WithTemperature(Conv4((1, 28, 28), channels=4))
    sampler = EpisodeSampler(bank_of([20] * 6, (1, 28, 28)), 3, 1, 2)
    run = Run(cfg, [], algorithm, *build_optimizer(cfg, algorithm), sampler, "", None)
    run.window.append(training_step(run, TwoProcesses()))
    with Logger(tmp_path, 0, 0) as logger:
        log_window(run, logger, 1.0)
    (line,) = metrics(tmp_path)
    assert line["train/temperature"] == 4 / 2 + 1
    assert line.keys() == {"step", "train/temperature", "train/loss", "train/accuracy", "train/lr"}


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_builds(experiment):
    cfg = settings(f"experiment={experiment}")
    build_dataset(cfg.dataset, "unused")
    shapes = {"miniimagenet": (3, 84, 84), "cifar_fs": (3, 32, 32), "fc100": (3, 32, 32)}
    shape = shapes.get(experiment.split("/")[0], (1, 28, 28))
    assert build_optimizer(cfg, build(cfg, shape, classes=64)) is not None


@pytest.mark.slow
@pytest.mark.parametrize("algo", [kind for kind in KINDS if kind != "classifier"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_algorithm_trains_every_backbone(algo, backbone):
    cfg = settings(f"algo={algo}", f"backbone={backbone}", "train_way=3", "train_shot=2")
    if algo == "relationnet" and backbone != "conv4_relation":
        with pytest.raises(UserError, match="algo: relation=conv needs feature maps of 4x4 or more"):
            build(cfg, (1, 28, 28))
        return
    algorithm = build(cfg, (1, 28, 28)).train()
    algorithm.training_step(random_tasks(1, 3, 2, 1, shape=(1, 28, 28)))
    gradients = [p.grad for p in algorithm.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def start(folder: Path, data_dir: Path, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"METACV_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"}
    return subprocess.Popen(
        [sys.executable, "-m", "metacv", *PROTONET, "steps=100000", RUN, *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_one_run_in_a_folder_at_a_time_which_a_signal_stops_with_the_usual_exit_code(metacv, tmp_path, data_dir):
    process = start(tmp_path, data_dir)
    try:
        wait_for(tmp_path / "run/last.pt", process)
        code, out, err = metacv("train", "resume=true", RUN)
        assert (code, after_first_line(out)) == (1, "")
        assert err == "metacv: hydra.run.dir=run: another process is writing there; choose another folder\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, "")
    assert f"stopped at step {last('run')['step']}; continue with: metacv train resume=run" in out


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_good_one(metacv, monkeypatch, trained):
    shutil.copytree(trained("protonet"), "run")
    before = Path("run/last.pt").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("metacv.files.torch.save", full)
    monkeypatch.setattr("metacv.train.evaluate_episodes", lambda *_: torch.zeros(8).double())  # no new best
    code, _, err = metacv("train", "resume=run", "steps=6")
    assert (code, err) == (1, "metacv: run/last.pt cannot be written: No space left on device\n")
    assert Path("run/last.pt").read_bytes() == before
    assert not list(Path("run").glob(".*.tmp"))


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(metacv, trained, tmp_path, data_dir):
    """Files may not grow beyond half of last.pt."""
    shutil.copytree(trained("protonet"), "run")
    before = (tmp_path / "run/last.pt").read_bytes()
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2); "
    code = limit + "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from metacv.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "resume=run", "steps=6"],
        cwd=tmp_path, env=os.environ | {"METACV_DATA_DIR": str(data_dir), "HYDRA_FULL_ERROR": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "metacv: run/last.pt cannot be written: File too large\n"
    assert (tmp_path / "run/last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.013 * i for i in range(10)])
def test_a_kill_at_any_instant_leaves_a_checkpoint_that_resumes_exactly(tmp_path, data_dir, monkeypatch, delay):
    """Saving after every step; the last checkpoint resumes to the same weights, all in processes of their own."""
    monkeypatch.chdir(tmp_path)
    saving = ("eval_every=1", "eval_episodes=2")
    process = start(tmp_path, data_dir, *saving)
    wait_for(tmp_path / "run/last.pt", process)
    time.sleep(delay)
    process.kill()
    process.communicate()
    load_checkpoint("run")
    steps = f"steps={last('run')['step'] + 2}"
    for words in (("resume=true",), ("hydra.run.dir=whole",)):
        process = start(tmp_path, data_dir, *saving, steps, *words)
        out, err = process.communicate()
        assert process.returncode == 0, out + err
    assert_same_run("run", "whole")
