"""Runs an experiment of configs/experiment: trains, tests under the paper's protocol and under the one that all methods
share, and copies checkpoint, settings, metrics and results into a folder of outputs/reference.

    python scripts/reproduce.py                                         all experiments, one after another
    python scripts/reproduce.py omniglot/protonet_5w1s omniglot/maml_5w1s
    python scripts/reproduce.py omniglot/maml_5w1s -- steps=5000        with other settings, such as a smaller budget
    python scripts/reproduce.py omniglot/maml_5w1s --name omniglot/sum_5w1s -- algo.inner_loss=sum_per_shot
    python scripts/reproduce.py omniglot/reptile_5w5s --run-of omniglot/reptile_5w1s    which is trained in the same way

An experiment whose `init` is the run of another, outputs/NAME, runs that one first if it is missing.
After a stop or a crash, the same command continues where it was. Finished work is not repeated.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from results_table import COMMON_EPISODES, EXPERIMENTS, NOT_SHOWN, REFERENCE, ROOT, Kept, compose_all

from metacv.config import TrainConfig, differences, is_resumable, to_dict
from metacv.errors import UserError
from metacv.files import sha256, write_bytes_atomically
from metacv.model import build_dataset, execution_settings, load_checkpoint, save_checkpoint, settings
from metacv.results import ResultFile, read_results
from metacv.run import load_state, lock_folder

# The same tasks for every method. No experiment trains or selects on these classes.
COMMON = ["query=15", "batch_norm=inductive", "dataset.test_rotation=none"]
# Together with resumable settings: how long a run trains, and how it is validated and tested.
BUDGET = {"eval_episodes", "episodes", "schedule.step_size"}
TESTED = {"way", "shot", "query", "batch_norm", "eval_episodes", "episodes", "head"}
VALIDATION_SEED = 0


class CommandFailed(Exception):
    """A command of metacv exited with an error, which it has printed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="default: all")
    parser.add_argument("--name", help="another name for the folders of one experiment, if its settings are changed")
    parser.add_argument("--run-of", metavar="EXPERIMENT", help="use the finished run of this experiment")
    parser.add_argument(
        "--common-episodes", type=int, default=COMMON_EPISODES, help="of the test that all methods share"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs", help="folder of the runs")
    parser.add_argument("--reference", type=Path, default=REFERENCE, help="folder of the results")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    given, overrides = parser.parse_args(words[:cut]), words[cut + 1 :]
    for name in [*given.experiments, *([given.run_of] if given.run_of else [])]:
        if name not in EXPERIMENTS:
            parser.error(f"there is no experiment {name}; one of: {', '.join(EXPERIMENTS)}")
    if (given.name or given.run_of) and len(given.experiments) != 1:
        parser.error("--name and --run-of need exactly one experiment")
    failed = []
    for name in given.experiments or EXPERIMENTS:
        folder = given.name or name
        print(f"== {folder}", flush=True)
        try:
            reproduce(given, name, folder, overrides)
        except (CommandFailed, UserError, OSError, ValueError) as error:
            print(f"reproduce: {folder}: {error}", file=sys.stderr)
            failed.append(folder)
    if failed:
        sys.exit(f"reproduce: failed: {', '.join(failed)}")


def reproduce(given: argparse.Namespace, experiment: str, folder: str, overrides: list[str]) -> None:
    run, reference = given.runs / folder, given.reference / folder
    asked = [f"experiment={experiment}", *overrides]
    (config,) = compose_all([asked])
    check_replaceable(config, overrides, reference)
    if not given.run_of:
        asked += first_stage(given, config, overrides)
    build_dataset(config.dataset, config.data_dir).load("test")  # reports its errors before the training
    (run / "test").mkdir(parents=True, exist_ok=True)
    with lock_folder(run / "test"):
        if given.run_of:
            adopt(given.runs / given.run_of, given.run_of, run, config, asked)
        else:
            if (run / "last.pt").exists():
                check_complete(asked, run)
                asked.append("resume=true")
            metacv("train", *asked, f"hydra.run.dir={run}")
        published = {entry["batch_norm"] for entry in config.paper}
        evaluate(run, "test", ["batch_norm=both"] if len(published) > 1 else [])
        evaluate(run, "common", [*COMMON, f"episodes={given.common_episodes}"])
        keep(run, reference)


def first_stage(given: argparse.Namespace, config: TrainConfig, overrides: list[str]) -> list[str]:
    """Run the experiment whose run is the `init` of this one, unless it is complete; the setting for its folder."""
    name = (config.init or "").removeprefix("outputs/")
    if name not in EXPERIMENTS:
        return []
    if not (given.runs / name / "result.json").exists():
        print(f"== {name}, the first stage", flush=True)
        reproduce(given, name, name, [word for word in overrides if word.split("=")[0] in ("data_dir", "device")])
    return [f"init={given.runs / name}"] if given.runs != ROOT / "outputs" else []


def adopt(other: Path, name: str, run: Path, config: TrainConfig, asked: list[str]) -> None:
    """Validate the last weights of a finished run as `config` says, and save them as the best of `run`.

    Raises:
        UserError: the run was trained otherwise than `config` says, or is not finished.
    """
    last = load_checkpoint(other, "last.pt")
    execution = execution_settings(config.algo)
    for setting, asked_value, trained in differences(settings(config), settings(last.config)):
        group = setting.split(".")[0]
        if setting not in execution and group not in TESTED and not is_resumable(group):
            raise UserError(f"--run-of {name}: {setting} is {asked_value} but was trained with {trained}")
    if last.step != config.steps:
        raise UserError(f"--run-of {name}: is at step {last.step} of {config.steps}")
    names = ("image_shape", "step", "algorithm", "splits", "training", "centre")
    best = {name: last.content[name] for name in names if name in last.content}
    if average := last.content.get("average"):  # of the weights, if `ema` is set
        best["algorithm"] = {name.removeprefix("module."): average[name] for name in average if "module." in name}
    best["config"] = to_dict(config)
    save_checkpoint(run / "best.pt", best)
    words = ["split=val", f"episodes={config.eval_episodes}", f"seed={VALIDATION_SEED}"]
    metacv("evaluate", f"checkpoint={run}", *words, f"hydra.run.dir={run / 'val'}")
    (validated,) = read_results(run / "val/result.json").results
    validation = {key: getattr(validated, key) for key in ("accuracy", "ci95", "step")}
    save_checkpoint(run / "best.pt", best | {"validation": validation})
    trained_file = read_results(other / "result.json")
    tested = {key: getattr(validated, key) for key in ("batch_norm", "way", "shot", "query", "episodes", "head")}
    result = replace(trained_file.results[0], **validation, **tested)
    training = (trained_file.training or {}) | {"overrides": asked, "run_of": name.split("/")[-1]}
    ResultFile([result], training).write(run / "result.json")
    lines = [line for line in (other / "metrics.jsonl").read_text().splitlines() if '"train/loss"' in line]
    lines.append(json.dumps({"step": validated.step, "val/accuracy": validated.accuracy, "val/ci95": validated.ci95}))
    write_bytes_atomically(run / "metrics.jsonl", "".join(f"{line}\n" for line in lines).encode())


def check_complete(asked: list[str], run: Path) -> None:
    """A run continues with its own settings, so the command must repeat all of them."""
    own = {word.split("=")[0]: word for word in load_state(run / "last.pt").content["overrides"]}
    names = {word.split("=")[0] for word in asked}
    if missing := [word for name, word in own.items() if name not in names]:
        raise UserError(f"{run} was started with {' '.join(missing)}: repeat these settings, or use another --name")


def check_replaceable(config: TrainConfig, overrides: list[str], reference: Path) -> None:
    """A shorter run, or one with other settings, must not replace the results in `reference`."""
    kept = Kept(reference)
    if not kept.complete:
        return
    if (steps := kept.training["steps"]) > config.steps:
        raise UserError(f"{reference} has a longer run, of {steps} steps: use another --reference")
    names = {word: word.split("=")[0] for word in overrides}
    own = {word for word, name in names.items() if name not in BUDGET | NOT_SHOWN and not is_resumable(name)}
    if other := own - {*kept.overrides}:
        raise UserError(f"{reference} was trained without {' '.join(sorted(other))}: use another --name")


def evaluate(run: Path, name: str, protocol: list[str]) -> None:
    """Write RUN/NAME/result.json, unless it is there and of this checkpoint."""
    try:
        results = read_results(run / name / "result.json").results
        digest = sha256(run / "best.pt")
        if results and all(result.checkpoint_sha256 == digest for result in results):
            return
    except (UserError, OSError):
        pass
    metacv("evaluate", f"checkpoint={run}", *protocol, f"hydra.run.dir={run / name}")


def keep(run: Path, reference: Path) -> None:
    """Copy a run into `reference`. result.json comes last, so that a folder that has it is complete."""
    reference.mkdir(parents=True, exist_ok=True)
    (reference / "result.json").unlink(missing_ok=True)
    for name, kept_name in (("best.pt", "best.pt"), ("metrics.jsonl", "metrics.jsonl"), ("result.json", "train.json")):
        shutil.copy(run / name, reference / kept_name)
    config = torch.load(reference / "best.pt", weights_only=True)["config"]
    (reference / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for name, kept_name in (("common", "common.json"), ("test", "result.json")):
        place = os.path.relpath(reference / "best.pt", ROOT)
        results = [replace(result, checkpoint=place) for result in read_results(run / name / "result.json").results]
        ResultFile(results).write(reference / kept_name)


def metacv(*words: str) -> None:
    """Run a command of metacv. A signal to this program is passed on to the command, which saves before it exits."""
    child = subprocess.Popen([sys.executable, "-m", "metacv", *words])
    before = {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None)}  # Ctrl-C reaches the child directly
    for number in (signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, lambda number, _: child.send_signal(number))
    code = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if code < 0 or code > 128:
        sys.exit(code if code > 0 else 128 - code)
    if code:
        raise CommandFailed(f"metacv {words[0]} exited with an error")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
