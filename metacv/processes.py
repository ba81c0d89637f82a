"""`processes=N`: start the processes of a training run on this machine, as torchrun would."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from metacv.errors import UserError
from metacv.terminal import world_size


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
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    command = [sys.executable, "-m", "metacv", "train", *words]
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count))
    children = [subprocess.Popen(command, env=shared | own) for own in ranks]

    def pass_on(number: int, _: Any) -> None:
        for child in children:
            child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the children without help
    codes = [child.wait() for child in children]
    return next((code if code > 0 else 128 - code for code in codes if code), 0)
