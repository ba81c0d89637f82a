"""`processes=N`: start the processes of a training run on this machine, as torchrun would."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from metacv.errors import UserError
from metacv.terminal import world_size

GRACE = 60  # seconds, also to save after a signal
STARTER = "METACV_STARTED_BY"  # id of the process that started this one


def processes_to_start(words: Sequence[str]) -> int:
    """Return the value of `processes` in the words of `train`; 1 within processes that are started already."""
    values = [word.partition("=")[2] for word in words if word.startswith("processes=")]
    if not values or world_size() > 1:
        return 1
    if not values[-1].isdecimal() or not 1 <= int(values[-1]) <= 1000:
        raise UserError(f"processes={values[-1]}: must be a whole number from 1 to 1000")
    return int(values[-1])


def train_in_processes(words: Sequence[str]) -> int:
    """Run `metacv train WORDS` in processes that share the cores; return the first exit code that is not 0."""
    count = processes_to_start(words)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shared = {"OMP_NUM_THREADS": str(max(1, cores // count))} | os.environ
    shared |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        STARTER: str(os.getpid()),
    }
    command = [sys.executable, "-m", "metacv", "train", *words]
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: Any) -> None:
        for child in children:
            child.send_signal(number)

    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        # In sessions of their own, so that Ctrl-C reaches them once, from here.
        children.append(subprocess.Popen(command, env=shared | own, start_new_session=True))
    # A signal before this ends this process, which the children notice (`end_with_starter`).
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & {*dir(signal)}:
        signal.signal(getattr(signal, name), pass_on)
    while None in (now := [child.poll() for child in children]) and not any(now):
        time.sleep(0.1)
    deadline = time.monotonic() + GRACE
    codes = [ended(child, deadline) for child in children]
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def ended(child: subprocess.Popen[bytes], deadline: float) -> int:
    """Return the exit code, after one of the processes ended with an error or all ended. The others notice the error
    and end too, unless they still wait for that process to connect."""
    try:
        return child.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        print("metacv: a process was killed, and the others do not end; stopping them", file=sys.stderr)
        child.kill()
        return child.wait()


def end_with_starter() -> None:
    """Stop this process, as a signal does, as soon as the process that started it for `processes=N` has been killed.

    Not on Windows, where the parent may be a launcher of Python.
    """

    def watch() -> None:
        while os.getppid() == starter:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    if (starter := int(os.environ.pop(STARTER, "0"))) and os.name != "nt":
        threading.Thread(target=watch, daemon=True).start()
