"""From an experiment in configs/experiment to its folder in outputs/reference: trains, evaluates on test under the
paper's protocol and under the common one, and keeps checkpoint, config, metrics and results.

    python scripts/reproduce.py                                   every experiment, one after another
    python scripts/reproduce.py omniglot/protonet_5w1s omniglot/maml_5w1s        these
    python scripts/reproduce.py omniglot/maml_5w1s -- steps=5000  with other settings, here a smaller budget
    python scripts/reproduce.py omniglot/maml_5w1s --name omniglot/mean_5w1s -- algo.inner_loss=mean

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

from omegaconf import OmegaConf
from results_table import EXPERIMENTS, REFERENCE, ROOT, Kept, by_norm

from metacv import MetacvError, checkpoint
from metacv.cli import quoted
from metacv.files import write_bytes_atomically
from metacv.run import only_run_in

# The same tasks for every method: no experiment trains or selects on these classes.
COMMON = ["query=15", "norm=inductive", "episodes=2000", "dataset.test_rotation=none"]
# Memory that glibc gives back to the system after each step is paid for again, page by page, in the next.
ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


class Failed(Exception):
    """A command of metacv's ended in an error, and has said so."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="default: all")
    parser.add_argument("--name", help="of one experiment's folders, when its settings are changed")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs", help="where the runs are")
    parser.add_argument("--reference", type=Path, default=ROOT / REFERENCE, help="where results go")
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    given, overrides = parser.parse_args(words[:cut]), words[cut + 1 :]
    for name in given.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"there is no experiment {name}; one of: {', '.join(EXPERIMENTS)}")
    if given.name and len(given.experiments) != 1:
        parser.error("--name goes with one experiment")
    failed = []
    for name in given.experiments or EXPERIMENTS:
        folder = given.name or name
        print(f"== {folder}", flush=True)
        try:
            reproduce(name, given.runs / folder, given.reference / folder, overrides)
        except (Failed, MetacvError, OSError) as error:
            print(f"reproduce: {folder}: {error}", file=sys.stderr)
            failed.append(folder)
    if failed:
        sys.exit(f"reproduce: failed: {', '.join(failed)}")


def reproduce(experiment: str, run: Path, reference: Path, overrides: list[str]) -> None:
    (run / "test").mkdir(parents=True, exist_ok=True)
    with only_run_in(run / "test"):
        asked = [f"experiment={experiment}", *overrides]
        if (run / "last.pt").exists():
            check_same(asked, run / "last.pt")
            asked.append("resume=true")
        metacv("train", *asked, f"hydra.run.dir={quoted(str(run))}")
        check_longest(run, reference)
        # Reptile's paper reports both ways of batch norm.
        evaluate(run, "test", ["norm=both"] if "/reptile" in experiment else [])
        evaluate(run, "common", COMMON)
        keep(run, reference)


def check_same(asked: list[str], last: Path) -> None:
    """A run goes on with the settings that it has: those asked for must not be fewer."""
    trained = {word.split("=")[0]: word for word in checkpoint.load(last, checkpoint.STATE)["overrides"]}
    names = {word.split("=")[0] for word in asked}
    if forgotten := [word for name, word in trained.items() if name not in names]:
        raise MetacvError(f"{last.parent} was begun with {' '.join(forgotten)}: say so again, or give another --name")


def check_longest(run: Path, reference: Path) -> None:
    """A trial does not take the place of a longer run."""
    kept, steps = Kept(reference), json.loads((run / "result.json").read_text())["steps"]
    if kept and kept.train["steps"] > steps:
        raise MetacvError(f"{reference} keeps a longer run, of {kept.train['steps']} steps: give another --reference")


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
    child = subprocess.Popen([sys.executable, "-m", "metacv", *words], env=os.environ | ENVIRONMENT)
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
