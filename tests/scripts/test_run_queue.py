"""run_queue.py: runs experiments in order, sets unfinished runs aside at the time limit, and resumes them later."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import run_queue

# In place of reproduce.py: `long` needs two calls, of which the first runs until it is stopped; `bad` fails.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path
name, runs = sys.argv[1], Path(sys.argv[sys.argv.index("--runs") + 1])
run = runs / (sys.argv[sys.argv.index("--name") + 1] if "--name" in sys.argv else name)
run.mkdir(parents=True, exist_ok=True)
group = Path("/proc/self/autogroup")
def session_nice():
    return group.read_text().split()[-1] if os.access(group, os.W_OK) else "19"
for _ in range(500):  # it is set after the start
    if session_nice() != "19":
        time.sleep(0.01)
with (runs / "calls").open("a") as file:
    nice = os.nice(0), session_nice()
    print(run.name, os.environ["OMP_NUM_THREADS"], *nice, *sys.argv[sys.argv.index("--runs") + 2 :], file=file)
def stop(*_):
    time.sleep(0.3)
    (run / "last.pt").write_text(name)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if name == "bad":
    sys.exit("bad")
if name == "long" and not (run / "last.pt").exists():
    time.sleep(60)
"""


@pytest.fixture
def queue(tmp_path, monkeypatch, capsys):
    """queue(LINES, WORD...) -> (exit code, last lines of the output)"""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/reproduce.py").write_text(STAND_IN)
    monkeypatch.setattr(run_queue, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(lines: list[str], *words: str) -> tuple[object, list[str]]:
        Path("queue").write_text("\n".join(["# a list", "", *lines]))
        monkeypatch.setattr(sys, "argv", ["run_queue.py", "queue", "--runs", "runs", *words])
        with pytest.raises(SystemExit) as stop:
            run_queue.main()
        return stop.value.code, capsys.readouterr().out.splitlines()[-len(lines) :]

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def calls() -> list[str]:
    return Path("runs/calls").read_text().splitlines()


def test_experiments_run_in_order_with_one_thread_at_the_lowest_priority_and_a_failure_stops_no_other(queue):
    lines = ["one -- steps=2", "bad", "one --name two -- steps=3"]
    assert queue(lines, "--at-once", "1") == (1, ["done: one", "failed: bad", "done: two"])
    assert calls() == ["one 1 19 19 -- steps=2", "bad 1 19 19", "two 1 19 19 -- steps=3"]
    assert "bad" in Path("runs/bad.log").read_text()


def test_unknown_options_are_passed_to_every_experiment(queue):
    assert queue(["one -- steps=2"], "--reference", "kept")[0] == 0
    assert calls() == ["one 1 19 19 --reference kept -- steps=2"]


@pytest.mark.slow
def test_unfinished_runs_are_set_aside_at_the_time_limit_and_resume_elsewhere(queue):
    words = ("--at-once", "2", "--unfinished", "aside")
    code, lines = queue(["long", "one", "long --name other"], *words, "--hours", str(4 / 3600))
    assert (code, lines) == (0, ["stopped: long", "done: one", "stopped: other"])
    assert Path("aside/long/last.pt").read_text() == "long"
    Path("runs").rename("lost")
    code, lines = queue(["long", "one", "long --name other"], *words)
    assert (code, lines) == (0, ["done: long", "done: one", "done: other"])
    assert not Path("aside/long").exists()


def test_a_run_set_aside_does_not_replace_an_existing_run(queue):
    for folder in ("runs", "aside"):
        Path(folder, "long").mkdir(parents=True)
        Path(folder, "long/last.pt").write_text(folder)
    assert queue(["long"], "--unfinished", "aside")[0] == 0
    assert Path("runs/long/last.pt").read_text() == "runs"


def test_a_signal_stops_the_runs_when_they_have_saved(queue):
    def interrupt() -> None:
        while not Path("runs/calls").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    assert queue(["long"]) == (0, ["stopped: long"])
    assert Path("runs/long/last.pt").exists()


def test_two_lines_with_one_folder_are_refused(queue):
    code, _ = queue(["one", "one -- steps=3"])
    assert code == "run_queue: queue has one twice: give one of them another --name"
