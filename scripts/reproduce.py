"""From an experiment in configs/experiment to its folder in outputs/reference: trains, evaluates on test under the
paper's protocol and under the common one, and keeps checkpoint, config, metrics and results.

    python scripts/reproduce.py                                   every experiment, one after another
    python scripts/reproduce.py omniglot/protonet_5w1s omniglot/maml_5w1s        these
    python scripts/reproduce.py omniglot/maml_5w1s -- steps=5000  with other settings, here a smaller budget
    python scripts/reproduce.py omniglot/maml_5w1s --name omniglot/mean_5w1s -- algo.inner_loss=mean
    python scripts/reproduce.py omniglot/reptile_5w5s --run-of omniglot/reptile_5w1s    which is trained in the same way

Stopped or killed, the same command goes on where it was; what is done is not done again.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from results_table import COMMON_EPISODES, ELSEWHERE, EXPERIMENTS, REFERENCE, ROOT, Kept, by_norm, compose_all

from metacv import MetacvError, checkpoint
from metacv.cli import quoted
from metacv.files import write_bytes_atomically
from metacv.model import build_dataset
from metacv.run import differences, only_run_in
from metacv.upgrade import upgrade

# The same tasks for every method: no experiment trains or selects on these classes.
COMMON = ["query=15", "norm=inductive", "dataset.test_rotation=none"]
# What of a run says how long it trains and how closely it is watched, and not what is trained.
BUDGET = {"steps", "eval_every", "eval_episodes", "log_every", "patience", "episodes", "schedule.step_size"}
TESTED = {"way", "shot", "query", "norm", *BUDGET - {"steps", "schedule.step_size"}}
VALIDATION_SEED = 0


class Failed(Exception):
    """A command of metacv's ended in an error, and has said so."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="default: all")
    parser.add_argument("--name", help="of one experiment's folders, when its settings are changed")
    parser.add_argument("--run-of", metavar="EXPERIMENT", help="whose finished run serves this one experiment too")
    parser.add_argument(
        "--common-episodes", type=int, default=COMMON_EPISODES, help="of the test that all methods share"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs", help="where the runs are")
    parser.add_argument("--reference", type=Path, default=ROOT / REFERENCE, help="where results go")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    given, overrides = parser.parse_args(words[:cut]), words[cut + 1 :]
    for name in [*given.experiments, *([given.run_of] if given.run_of else [])]:
        if name not in EXPERIMENTS:
            parser.error(f"there is no experiment {name}; one of: {', '.join(EXPERIMENTS)}")
    if (given.name or given.run_of) and len(given.experiments) != 1:
        parser.error("--name and --run-of go with one experiment")
    failed = []
    for name in given.experiments or EXPERIMENTS:
        folder = given.name or name
        print(f"== {folder}", flush=True)
        try:
            reproduce(given, name, folder, overrides)
        except (Failed, MetacvError, OSError, ValueError) as error:
            print(f"reproduce: {folder}: {error}", file=sys.stderr)
            failed.append(folder)
    if failed:
        sys.exit(f"reproduce: failed: {', '.join(failed)}")


def reproduce(given: argparse.Namespace, experiment: str, folder: str, overrides: list[str]) -> None:
    run, reference = given.runs / folder, given.reference / folder
    asked = [f"experiment={experiment}", *overrides]
    config = compose_all([asked])[0]
    check_worth_it(config, overrides, reference)
    build_dataset(config, config["data_dir"]).load("test")  # what is wrong with it is said before the training
    (run / "test").mkdir(parents=True, exist_ok=True)
    with only_run_in(run / "test"):
        if given.run_of:
            adopt(given.runs / given.run_of, given.run_of, run, config, asked)
        else:
            if (run / "last.pt").exists():
                check_same(asked, run / "last.pt")
                asked.append("resume=true")
            metacv("train", *asked, f"hydra.run.dir={quoted(str(run))}")
        # Reptile's paper reports both ways of batch norm.
        evaluate(run, "test", ["norm=both"] if "/reptile" in experiment else [])
        evaluate(run, "common", [*COMMON, f"episodes={given.common_episodes}"])
        keep(run, reference)


def adopt(other: Path, name: str, run: Path, config: dict[str, Any], asked: list[str]) -> None:
    """Makes the last weights of a finished run, trained as `config` says, the best of `run`, and validates them."""
    state = checkpoint.load(other / "last.pt", checkpoint.STATE)
    trained = upgrade(state["config"])
    for setting, here, there in differences(config, trained):
        if {setting, setting.split(".")[0]}.isdisjoint(TESTED | ELSEWHERE):
            raise MetacvError(f"--run-of {name}: {setting} is {here} but was trained with {there}")
    if state["step"] != config["steps"]:
        raise MetacvError(f"--run-of {name}: is at step {state['step']} of {config['steps']}")
    best = {key: state.get(key) for key in ("image_shape", "step", "algorithm", "splits")}
    best["config"] = checkpoint.without_places(config)
    checkpoint.save(run / "best.pt", best)
    words = ["split=val", f"episodes={config['eval_episodes']}", f"seed={VALIDATION_SEED}"]
    metacv("evaluate", f"checkpoint={quoted(str(run))}", *words, f"hydra.run.dir={quoted(str(run / 'val'))}")
    found = json.loads((run / "val/result.json").read_text())
    validation = {key: found[key] for key in ("accuracy", "ci95", "step")}
    checkpoint.save(run / "best.pt", best | {"validation": validation})
    result = json.loads((other / "result.json").read_text())
    result |= validation | {key: config[key] for key in ("norm", "way", "shot", "query", "eval_episodes")}
    result |= {"overrides": asked, "run_of": name.split("/")[-1]}
    write_bytes_atomically(run / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    lines = [line for line in (other / "metrics.jsonl").read_text().splitlines() if '"train/loss"' in line]
    lines.append(json.dumps({"step": found["step"], "val/accuracy": found["accuracy"], "val/ci95": found["ci95"]}))
    write_bytes_atomically(run / "metrics.jsonl", "".join(f"{line}\n" for line in lines).encode())


def check_same(asked: list[str], last: Path) -> None:
    """A run goes on with the settings that it has: those asked for must not be fewer."""
    trained = {word.split("=")[0]: word for word in checkpoint.load(last, checkpoint.STATE)["overrides"]}
    names = {word.split("=")[0] for word in asked}
    if forgotten := [word for name, word in trained.items() if name not in names]:
        raise MetacvError(f"{last.parent} was begun with {' '.join(forgotten)}: say so again, or give another --name")


def check_worth_it(config: dict[str, Any], overrides: list[str], reference: Path) -> None:
    """Neither a trial with fewer steps nor one with other settings takes the place of what is kept."""
    kept = Kept(reference)
    if not kept:
        return
    if kept.train["steps"] > config["steps"]:
        raise MetacvError(f"{reference} keeps a longer run, of {kept.train['steps']} steps: give another --reference")
    own = {word for word in overrides if word.split("=")[0] not in BUDGET | ELSEWHERE}
    if other := own - {*kept.changes}:
        raise MetacvError(f"{reference} was trained without {' '.join(sorted(other))}: give another --name")


def evaluate(run: Path, name: str, protocol: list[str]) -> None:
    try:
        found = by_norm(json.loads((run / name / "result.json").read_text()))
        digest = checkpoint.file_hash(run / "best.pt")
        if found and all(one.get("checkpoint_sha256") == digest for one in found.values()):
            return
    except (OSError, ValueError):
        pass
    metacv("evaluate", f"checkpoint={quoted(str(run))}", *protocol, f"hydra.run.dir={quoted(str(run / name))}")


def keep(run: Path, reference: Path) -> None:
    """Copies what is shown; result.json comes last, so that a folder that has it is whole."""
    reference.mkdir(parents=True, exist_ok=True)
    (reference / "result.json").unlink(missing_ok=True)
    for name, as_kept in (("best.pt", "best.pt"), ("metrics.jsonl", "metrics.jsonl"), ("result.json", "train.json")):
        shutil.copy(run / name, reference / as_kept)
    config = checkpoint.load(reference / "best.pt")["config"]
    (reference / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    for name, as_kept in (("common", "common.json"), ("test", "result.json")):
        result = json.loads((run / name / "result.json").read_text())
        for found in by_norm(result).values():
            found["checkpoint"] = os.path.relpath(reference / "best.pt", ROOT)
        write_bytes_atomically(reference / as_kept, (json.dumps(result, indent=2) + "\n").encode())


def metacv(*words: str) -> None:
    """Runs a command; a signal to this program is left to the command, which saves before it ends."""
    child = subprocess.Popen([sys.executable, "-m", "metacv", *words])
    before = {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None)}  # a Ctrl-C reaches the child by itself
    for number in (signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, lambda number, _: child.send_signal(number))
    code = child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if code < 0 or code > 128:
        sys.exit(code if code > 0 else 128 - code)
    if code:
        raise Failed(f"metacv {words[0]} ended with an error")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
