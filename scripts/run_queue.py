"""Works through a list of experiments in the background, and goes on with what was interrupted, here or elsewhere.

    nohup python scripts/run_queue.py QUEUE --hours 8 --unfinished outputs/unfinished &

Each line of the file QUEUE has the words of a call of reproduce.py, such as

    omniglot/relationnet_5w1s -- steps=60000 schedule.step_size=12000
    omniglot/maml_20w1s --name omniglot/maml_20w1s_cosine -- schedule=cosine

Runs start in this order, two at a time, with one thread each and at the lowest priority. When the time is over, or on
Ctrl-C or SIGTERM, they save and stop, and what they need to go on is copied to the folder of --unfinished. The same
command starts from there where a run's own folder is missing.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from results_table import ROOT

from metacv.errors import UserError
from metacv.run import load_state
from metacv.text import duration, plural

STATE = ("last.pt", "best.pt", "metrics.jsonl")  # of a run that can go on
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SECONDS_TO_SAVE = 300


@dataclass
class Job:
    """A line of the queue."""

    words: list[str]
    process: subprocess.Popen[bytes] | None = None
    state: str = "not started"  # running, done, failed or stopped

    @property
    def name(self) -> str:
        """The folder of the run."""
        own = self.words[: self.words.index("--")] if "--" in self.words else self.words
        return own[own.index("--name") + 1] if "--name" in own else own[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queue", type=Path, metavar="QUEUE")
    parser.add_argument("--hours", type=float, default=float("inf"), help="default: until all is done")
    parser.add_argument("--at-once", type=int, default=2, help="runs at a time (2)")
    parser.add_argument("--runs", type=Path, default=ROOT / "outputs", help="folder of the runs")
    parser.add_argument("--unfinished", type=Path, help="folder for the state of runs that are not done")
    given, others = parser.parse_known_args()  # others are for reproduce.py
    lines = given.queue.read_text().splitlines()
    jobs = [Job(shlex.split(line)) for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if twice := {job.name for job in jobs if [own.name for own in jobs].count(job.name) > 1}:
        sys.exit(f"run_queue: {given.queue} has {min(twice)} twice: give one of them another --name")
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: stopped.append(number))
    end = time.monotonic() + 3600 * given.hours
    for job in jobs:
        bring_back(given.runs / job.name, given.unfinished / job.name if given.unfinished else None)
    while not stopped and time.monotonic() < end and any(job.state in ("not started", "running") for job in jobs):
        for job in jobs:
            if job.state == "running":
                look_at(job)
        free = given.at_once - sum(job.state == "running" for job in jobs)
        # One at a time: Linux refuses to set the priority of a second session at once.
        for job in [job for job in jobs if job.state == "not started"][: min(free, 1)]:
            start(job, given.runs, others)
        time.sleep(0.2)
    stop([job for job in jobs if job.state == "running"])
    if given.unfinished:
        for job in jobs:
            put_aside(job, given.runs / job.name, given.unfinished / job.name)
    print(*(f"{job.state}: {job.name}{progress(given.runs / job.name, job)}" for job in jobs), sep="\n")
    sys.exit(1 if any(job.state == "failed" for job in jobs) else 0)


def start(job: Job, runs: Path, others: list[str]) -> None:
    cut = job.words.index("--") if "--" in job.words else len(job.words)
    words = [*job.words[:cut], "--runs", str(runs), *others, *job.words[cut:]]
    log = log_of(runs / job.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        job.process = subprocess.Popen(
            ["nice", "-n", "19", sys.executable, str(ROOT / "scripts/reproduce.py"), *words],
            env=os.environ | ONE_THREAD,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches it through `stop` alone
        )
    with suppress(OSError):  # Linux divides the processor between sessions first, and `nice` acts within one
        Path(f"/proc/{job.process.pid}/autogroup").write_text("19")
    job.state = "running"
    print(f"started: {job.name}, log in {log}", flush=True)


def log_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def look_at(job: Job) -> None:
    assert job.process is not None
    if (code := job.process.poll()) is not None:
        job.state = "done" if code == 0 else "stopped" if code < 0 or code > 128 else "failed"
        print(f"{job.state}: {job.name}", flush=True)


def stop(jobs: list[Job]) -> None:
    """Ask the runs to save and stop, and wait until they have."""
    for job in jobs:
        assert job.process is not None
        job.process.send_signal(signal.SIGTERM)
    for job in jobs:
        assert job.process is not None
        try:
            job.process.wait(SECONDS_TO_SAVE)
        except subprocess.TimeoutExpired:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()
        job.state = "done" if job.process.returncode == 0 else "stopped"


def bring_back(run: Path, aside: Path | None) -> None:
    """Let a run go on that another machine has begun, if its folder here holds none."""
    if aside and (aside / "last.pt").exists() and not (run / "last.pt").exists():
        copy_state(aside, run)


def put_aside(job: Job, run: Path, aside: Path) -> None:
    """Keep the state of a run that is not done, and remove that of one that is."""
    if job.state == "done":
        shutil.rmtree(aside, ignore_errors=True)
    elif (run / "last.pt").exists():
        copy_state(run, aside)


def copy_state(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in filter(Path.exists, (source / name for name in STATE)):
        shutil.copy(path, target / path.name)


def progress(run: Path, job: Job) -> str:
    """How far an unfinished run is."""
    try:
        last = load_state(run / "last.pt")
    except UserError:
        return ""
    if job.state == "done":
        return f", {duration(float(last.content['seconds']))} of training"
    return f", at step {last.step} of {plural(last.config.steps, 'step')}"


if __name__ == "__main__":
    main()
