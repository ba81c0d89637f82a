"""Training runs, from the command line: what they write, how they stop and how they go on."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ALGORITHMS, SMALL, TRAIN, quick
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metacv.config_dir import config_dir

RUN = "hydra.run.dir=run"
EXPERIMENTS = sorted(p.relative_to(config_dir() / "experiment").with_suffix("").as_posix()
                     for p in (config_dir() / "experiment").rglob("*.yaml"))  # fmt: skip
BACKBONES = sorted(path.stem for path in (config_dir() / "backbone").glob("*.yaml"))


def metrics(folder: str | Path) -> list[dict]:
    """Lines of metrics.jsonl, without how fast they came."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "train/tasks_per_second"} for line in lines]


def learning_rates(folder: str | Path) -> list[float]:
    return [line["train/lr"] for line in metrics(folder) if "train/lr" in line]


def weights(path: str | Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["algorithm"]


def assert_same_run(one: str | Path, other: str | Path) -> None:
    """Bit for bit: weights, optimizer, sampler, random states, best and metrics."""
    ours, theirs = (torch.load(Path(folder) / "last.pt", weights_only=True) for folder in (one, other))
    for content in (ours, theirs):
        del content["config"], content["overrides"], content["seconds"]

    def compare(a, b, name):
        assert type(a) is type(b), name
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), name
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), name
            for key in a:
                compare(a[key], b[key], f"{name}.{key}")
        elif isinstance(a, list | tuple):
            assert len(a) == len(b), name
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                compare(x, y, f"{name}.{i}")
        else:
            assert a == b, name

    compare(ours, theirs, "last.pt")
    assert metrics(one) == metrics(other)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_run_leaves_its_checkpoints_metrics_events_and_config(metacv, algo):
    code, out, err = metacv("train", *quick(algo), RUN)
    assert (code, err) == (0, "")
    assert "best in validation" in out
    assert "run/best.pt" in out
    folder = Path("run")
    assert OmegaConf.load(folder / ".hydra/config.yaml").steps == 4
    saved = torch.load(folder / "best.pt", weights_only=True)
    assert saved["config"]["steps"] == 4
    assert saved["config"]["algo"]["_target_"].startswith("metacv.")
    lines = metrics(folder)
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "val/accuracy" in line] == [2, 4]
    events = EventAccumulator(str(folder))
    events.Reload()
    assert {"train/loss", "train/accuracy", "val/accuracy"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["val/episode"]
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_learns_the_glyphs(metacv, algo):
    """From chance, 20 %, in a few steps."""
    steps = {"relationnet": 200}.get(algo, 40)
    inner = ["algo.eval_inner_steps=10"] if algo == "reptile" else []
    code, _, err = metacv("train", f"algo={algo}", *SMALL[:1], "query=5", "eval_episodes=60", f"steps={steps}",
                          f"eval_every={steps}", "backbone.channels=24", "meta_batch=2", *inner, RUN)  # fmt: skip
    assert code == 0, err
    result = json.loads(Path("run/result.json").read_text())
    assert result["accuracy"] - result["ci95"] > 0.3


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_same_seed_gives_the_same_run_and_another_seed_another(metacv, algo):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        code, _, err = metacv("train", *quick(algo), f"seed={seed}", f"hydra.run.dir={name}")
        assert code == 0, err
    assert_same_run("a", "b")
    one, other = weights("a/last.pt"), weights("c/last.pt")
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith("0.weight"))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_resuming_equals_never_having_stopped(metacv, algo, monkeypatch):
    """Stopped by a signal in the middle of a window of metrics, between two validations."""
    train = ("train", *quick(algo), "steps=9", "log_every=4", "eval_every=3")
    assert metacv(*train, "hydra.run.dir=whole")[0] == 0

    from metacv.data.sampler import EpisodeSampler

    sample, drawn = EpisodeSampler.sample, []

    def sample_and_interrupt(self, tasks, part):
        drawn.append(tasks)
        if len(drawn) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(self, tasks, part)

    monkeypatch.setattr(EpisodeSampler, "sample", sample_and_interrupt)
    code, out, _ = metacv(*train, RUN)
    assert code == 143
    assert "stopped at step 5" in out
    assert torch.load("run/last.pt", weights_only=True)["step"] == 5
    assert metacv("train", "resume=true", RUN)[0] == 0
    assert_same_run("whole", "run")
    assert OmegaConf.load("run/.hydra/config.yaml").algo == OmegaConf.load("whole/.hydra/config.yaml").algo


def test_a_run_can_be_lengthened_in_its_folder(metacv):
    assert metacv("train", *quick("protonet"), "steps=8", "hydra.run.dir=whole")[0] == 0
    assert metacv("train", *quick("protonet"), "steps=4", RUN)[0] == 0
    code, out, err = metacv("train", "resume=run", "steps=8")
    assert (code, err) == (0, "")
    assert "checkpoint: run/best.pt" in out
    assert_same_run("whole", "run")
    code, _, err = metacv("train", "resume=run/last.pt", "steps=3")
    assert (code, err) == (1, "metacv: steps=3 but run/last.pt is at step 8\n")


def test_resuming_into_another_folder_takes_the_best_and_the_metrics_along(metacv, monkeypatch):
    """With validations that get worse, so that the best is from before."""
    found = iter([0.9, 0.5, 0.4, 0.3])
    monkeypatch.setattr("metacv.train.evaluate_episodes", lambda *_: torch.full((8,), next(found)).double())
    assert metacv("train", *quick("protonet"), RUN)[0] == 0
    assert metacv("train", "resume=run", "steps=8", "hydra.run.dir=other")[0] == 0
    assert [line["val/accuracy"] for line in metrics("other") if "val/accuracy" in line] == [0.9, 0.5, 0.4, 0.3]
    assert Path("other/best.pt").read_bytes() == Path("run/best.pt").read_bytes()


def test_the_same_command_with_resume_goes_on_also_where_it_adds_and_deletes_keys(metacv):
    command = ("train", *quick("protonet"), "+optimizer.amsgrad=true", "~optimizer.weight_decay", RUN)
    assert metacv(*command)[0] == 0
    assert metacv(*command, "resume=true", "steps=6")[0] == 0
    code, _, err = metacv(*command, "resume=true", "steps=8")
    assert (code, err) == (0, "")
    assert torch.load("run/last.pt", weights_only=True)["step"] == 8


def test_resuming_refuses_what_would_make_it_another_run(metacv):
    assert metacv("train", *quick("reptile"), RUN)[0] == 0
    before = {path.name: path.read_bytes() for path in (Path("run/last.pt"), Path("run/.hydra/config.yaml"))}
    for change, message in [
        ("way=4", "resume: algo.way is 4 but run/last.pt was trained with 5"),
        ("steps=8", "resume: schedule.total_iters is 8 but run/last.pt was trained with 4"),
        ("algo.inner_lr=0.5", "resume: algo.inner_lr is 0.5 but run/last.pt was trained with 0.001"),
        ("resume=elsewhere", "elsewhere: there is no such file"),
        ("resume=run/typo.pt", "run/typo.pt: there is no such file"),
        ("resume=run/best.pt", "run/best.pt holds weights only"),
        ("resume=false", "run holds a run: resume=true goes on with it"),
    ]:
        code, _, err = metacv("train", "resume=true", RUN, change)
        assert code == 1
        assert message in err
        assert {
            path.name: path.read_bytes() for path in (Path("run/last.pt"), Path("run/.hydra/config.yaml"))
        } == before


def test_a_signal_in_validation_is_obeyed_at_once_and_the_validation_made_up_for(metacv, monkeypatch):
    from metacv.algorithms.metric.protonet import ProtoNet

    train = ("train", *quick("protonet"), "eval_episodes=40")
    assert metacv(*train, "hydra.run.dir=whole")[0] == 0
    predict, calls = ProtoNet.predict, []

    def predict_and_interrupt(self, tasks, norm):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, tasks, norm)

    monkeypatch.setattr(ProtoNet, "predict", predict_and_interrupt)
    code, out, _ = metacv(*train, RUN)
    assert code == 143
    assert "stopped at step 2" in out
    assert len(calls) == 1
    assert metacv("train", "resume=run")[0] == 0
    assert_same_run("whole", "run")


def test_a_signal_after_the_last_validation_is_obeyed_when_all_is_written(metacv, monkeypatch):
    from metacv import checkpoint

    save = checkpoint.save

    def save_and_interrupt(path, content):
        save(path, content)
        if content["step"] == 4 and path.name == "last.pt":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "save", save_and_interrupt)
    code, out, _ = metacv("train", *quick("protonet"), RUN)
    assert code == 143
    assert "best in validation" in out
    assert Path("run/result.json").exists()


def test_schedules_whose_annotations_cannot_be_resolved_work_too(metacv):
    milestones = ("schedule._target_=torch.optim.lr_scheduler.MultiStepLR", "+schedule.milestones=[2]")
    settings = (*milestones, "schedule.gamma=0.1", "~schedule.step_size")
    code, _, err = metacv("train", *quick("protonet"), *settings, RUN)
    assert (code, err) == (0, "")
    assert learning_rates("run") == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


def test_a_run_in_a_folder_of_any_name_goes_on(metacv):
    name = "a run (lr=0.1, it's)"
    code, out, err = metacv("train", *quick("protonet"), "hydra.run.dir='" + name.replace("'", "\\'") + "'")
    assert (code, err) == (0, "")
    (evaluate,) = [line for line in out.splitlines() if line.startswith("on test:")]
    checkpoint = shlex.split(evaluate)[-1]
    assert metacv("evaluate", checkpoint, "episodes=8")[0] == 0
    code, _, err = metacv("train", checkpoint.replace("checkpoint=", "resume="), "steps=6")
    assert (code, err) == (0, "")
    assert torch.load(Path(name) / "last.pt", weights_only=True)["step"] == 6


@pytest.mark.parametrize(
    ("algo", "settings", "expected"),
    [
        ("reptile", [], [1.0, 0.75, 0.5, 0.25]),
        ("protonet", ["schedule.step_size=2"], [1e-3, 1e-3, 5e-4, 5e-4]),
        ("protonet", ["schedule=constant"], [1e-3] * 4),
        ("maml", ["schedule=cosine", "optimizer=sgd"], [1e-2, 0.00853553, 0.005, 0.00146447]),
    ],
)
def test_the_learning_rate_follows_its_schedule(metacv, algo, settings, expected):
    code, _, err = metacv("train", *quick(algo), *settings, RUN)
    assert (code, err) == (0, "")
    assert learning_rates("run") == pytest.approx(expected, rel=1e-5)


def test_clipping_bounds_the_step(metacv):
    """With SGD at rate 1 a step is as long as the gradient: at most 1e-3 a network, here one backbone."""
    assert metacv("train", *quick("protonet"), "optimizer=sgd", "optimizer.lr=1", "clip_norm=1e-3", "schedule=constant",
                  "steps=1", "eval_every=1", RUN)[0] == 0  # fmt: skip
    assert metacv("train", *quick("protonet"), "optimizer=sgd", "optimizer.lr=1e-12", "schedule=constant", "steps=1",
                  "eval_every=1", "hydra.run.dir=start")[0] == 0  # fmt: skip
    after, before = weights("run/last.pt"), weights("start/last.pt")
    moved = sum(float((after[n] - before[n]).square().sum()) for n in after if "running" not in n and "num" not in n)
    assert moved**0.5 == pytest.approx(1e-3, rel=1e-2)


def test_best_is_the_best_validation_and_patience_ends_the_run(metacv, monkeypatch):
    accuracies = iter([0.3, 0.6, 0.5, 0.55, 0.9])
    monkeypatch.setattr("metacv.train.evaluate_episodes", lambda *_: torch.full((8,), next(accuracies)).double())
    code, _, _ = metacv("train", "algo=protonet", *TRAIN, "steps=10", "patience=2", RUN)
    assert code == 0
    best, last = (torch.load(f"run/{name}.pt", weights_only=True) for name in ("best", "last"))
    assert (best["step"], best["validation"]["accuracy"]) == (4, pytest.approx(0.6))
    assert (last["step"], last["since_best"], last["best"]["step"]) == (8, 2, 4)
    assert "optimizer" not in best


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step_and_the_last_good_checkpoint(metacv, monkeypatch):
    from metacv.algorithms.metric.protonet import ProtoNet

    loss, calls = ProtoNet.loss, []

    def breaking(self, logits, labels):
        calls.append(1)
        return loss(self, logits, labels) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(ProtoNet, "loss", breaking)
    code, _, err = metacv("train", "algo=protonet", *TRAIN, "steps=8", "eval_every=3", "log_every=100", RUN)
    assert (code, err) == (1, "metacv: the loss is not finite at step 5; the last good checkpoint is run/last.pt\n")
    saved = torch.load("run/last.pt", weights_only=True)
    assert saved["step"] == 3
    assert all(value.isfinite().all() for value in saved["algorithm"].values())


def test_weights_that_are_not_finite_are_never_saved(metacv):
    """The loss of the last step was still good; it is the update that was not."""
    code, _, err = metacv("train", *quick("protonet"), "optimizer=sgd", "optimizer.lr=1e38", "eval_every=1", RUN)
    assert code == 1
    assert "are not finite after step 1; no checkpoint had been saved" in err
    assert not list(Path("run").glob("*.pt"))


def test_eight_jobs_of_a_sweep_leave_eight_results(metacv):
    code, _, err = metacv("train", "-m", "algo=maml,reptile,protonet,relationnet", "shot=1,5", *TRAIN,
                          "steps=2", "eval_episodes=2", "hydra.sweep.dir=sweep")  # fmt: skip
    assert (code, err) == (0, "")
    results = [json.loads(path.read_text()) for path in Path("sweep").glob("*/result.json")]
    assert sorted(result["shot"] for result in results) == [1] * 4 + [5] * 4
    assert len(list(Path("sweep").glob("*/best.pt"))) == 8


def test_the_time_of_a_run_is_what_was_worked_and_not_what_lay_between(metacv):
    assert metacv("train", "algo=protonet", *TRAIN, "steps=2", "device=cpu", RUN)[0] == 0
    first = json.loads(Path("run/result.json").read_text())["seconds"]
    last = torch.load("run/last.pt", weights_only=True)
    torch.save(last | {"seconds": last["seconds"] + 1000}, "run/last.pt")
    start = time.perf_counter()
    assert metacv("train", "resume=run", "steps=4")[0] == 0
    result = json.loads(Path("run/result.json").read_text())
    assert 1000 < result["seconds"] < 1000 + first + time.perf_counter() - start
    assert result["steps"] == 4
    assert result["torch"] == torch.__version__
    assert result["overrides"] == ["algo=protonet", *TRAIN[:4], *TRAIN[5:], "device=cpu", "steps=4"]
    assert re.search(r"\S.*, \d+ threads?$", result["device"])
    last = torch.load("run/last.pt", weights_only=True)
    torch.save(last | {"hardware": "abacus"}, "run/last.pt")
    assert metacv("train", "resume=run")[0] == 0  # of a finished run, which was trained elsewhere
    assert json.loads(Path("run/result.json").read_text())["device"] == "abacus"


def test_training_never_loads_the_test_split(metacv, monkeypatch):
    from metacv.data.glyphs import Glyphs

    load, loaded = Glyphs.load, []
    monkeypatch.setattr(Glyphs, "load", lambda self, split: loaded.append(split) or load(self, split))
    assert metacv("train", "algo=protonet", *TRAIN, RUN)[0] == 0
    assert sorted(set(loaded)) == ["train", "val"]


def test_gradients_are_clipped_by_value_and_by_the_norm_of_each_network():
    from metacv.algorithms.metric.relationnet import RelationNet
    from metacv.backbones.conv4 import Conv4
    from metacv.train import clip

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


def test_a_sweep_runs_every_combination_and_goes_on_past_one_that_fails(metacv):
    code, _, err = metacv("train", "-m", "algo=maml,protonet", "shot=1,100", *TRAIN, "hydra.sweep.dir=sweep")
    assert code == 1
    assert err.count("metacv: train_shot=100 + train_query=5 needs 105 images a class") == 2
    assert sorted(path.parent.name for path in Path("sweep").glob("*/result.json")) == [
        "0_maml_glyphs_5w1s",
        "2_protonet_glyphs_5w1s",
    ]


@pytest.mark.parametrize("algo", ["maml", "reptile"])
def test_another_training_way_than_the_tested_one_remakes_the_head(metacv, algo):
    code, _, err = metacv("train", *quick(algo), "train_way=7", RUN)
    assert (code, err) == (0, "")
    assert weights("run/best.pt")["net.head.weight"].shape[0] == 7


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_builds(metacv, experiment):
    code, out, err = metacv("train", f"experiment={experiment}", "--cfg", "job", "--resolve")
    assert (code, err) == (0, "")
    config = OmegaConf.to_container(OmegaConf.create(out))
    from metacv.model import build_algorithm, build_dataset, build_optimizer

    build_dataset(config, "unused")
    shape = (3, 84, 84) if experiment.startswith("miniimagenet/") else (1, 28, 28)
    build_optimizer(config, build_algorithm(config, shape))


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_algorithm_runs_on_every_backbone(metacv, algo, backbone):
    settings = [*quick(algo), f"backbone={backbone}", "steps=1", RUN]
    if not backbone.startswith("conv4"):  # large, and of one width
        settings.remove("backbone.channels=8")
        settings += ["meta_batch=1", "query=1", "eval_episodes=2"]
        settings += ["algo.eval_inner_steps=1"] if algo in ("maml", "reptile") else []
    code, _, err = metacv("train", *settings)
    if algo == "relationnet" and backbone != "conv4_relation":
        assert code == 1
        assert "algo: relation=conv needs feature maps of 4x4 or more" in err
    else:
        assert (code, err) == (0, "")


def start(folder: Path, data_dir: Path, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"METACV_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "metacv", "train", "algo=protonet", *TRAIN, "steps=100000", RUN, *arguments],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves_with_the_usual_exit_code(tmp_path, data_dir, number, code):
    process = start(tmp_path, data_dir)
    wait_for(tmp_path / "run/last.pt", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, "")
    saved = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert f"stopped at step {saved['step']}; go on with: metacv train resume=run" in out


def test_two_runs_in_one_folder_are_refused(tmp_path, data_dir):
    first = start(tmp_path, data_dir)
    try:
        wait_for(tmp_path / "run/last.pt", first)
        second = start(tmp_path, data_dir, "resume=true")
        _, err = second.communicate(timeout=60)
        assert (second.returncode, err) == (1, "metacv: hydra.run.dir=run: another run is writing there\n")
    finally:
        first.kill()
        first.communicate()


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, data_dir, metacv):
    """Files may not grow beyond half of last.pt."""
    assert metacv("train", *quick("protonet"), f"hydra.run.dir={tmp_path}/run")[0] == 0
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
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize("delays", [[0.01, 0.05], pytest.param([0.013 * i for i in range(10)], marks=pytest.mark.slow)])
def test_a_kill_at_any_instant_leaves_a_loadable_checkpoint_that_goes_on_exactly(tmp_path, data_dir, metacv, delays):
    """Saving after every step; what is left resumes to the same weights."""
    for delay in delays:
        folder = tmp_path / str(delay)
        folder.mkdir()
        process = start(folder, data_dir, "eval_every=1", "eval_episodes=2")
        wait_for(folder / "run/last.pt", process)
        time.sleep(delay)
        process.kill()
        process.communicate()
        step = torch.load(folder / "run/last.pt", weights_only=True)["step"]
        torch.load(folder / "run/best.pt", weights_only=True)
        target = step + 2
        assert metacv("train", "resume=true", f"steps={target}", f"hydra.run.dir={folder}/run")[0] == 0
        assert metacv("train", "algo=protonet", *TRAIN, "eval_every=1", "eval_episodes=2", f"steps={target}",
                      f"hydra.run.dir={folder}/whole")[0] == 0  # fmt: skip
        assert_same_run(folder / "run", folder / "whole")
