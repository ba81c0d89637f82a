"""Terminal output: errors and warnings in one line, progress bars, and silence on ranks other than 0."""

import atexit
import contextlib
import errno
import gc
import io
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from metacv.errors import UserError
from metacv.text import printable, short
from metacv.words import nearest, settings


def prepare_process() -> None:
    """Make settings of the process that commands need, before torch is imported."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads do not use up a core that another process needs
    atexit.register(gc.freeze)  # or Python looks for garbage in all of torch at the end, which takes a second
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # some terminals cannot encode ±


def world_size() -> int:
    """Return the number of processes that torchrun started for this run."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


@contextlib.contextmanager
def silent_unless_rank_zero() -> Iterator[str | None]:
    """Suppress output on every rank but 0, and yield a temporary folder for the run there; None on rank 0."""
    if rank() == 0:
        yield None
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield folder


def progress_bar(total: int, unit: str, label: str = "", start: int = 0) -> tqdm:
    """Return a progress bar, with the remaining time at the mean speed so far; disabled without a terminal.

    Parallel runs of a sweep have none, because their bars would overwrite each other.
    """
    columns, rows = shutil.get_terminal_size()  # 80x24 where a terminal says 0x0
    return tqdm(
        total=total,
        initial=start,
        desc=label or None,
        leave=False,
        disable=None if alone() else True,
        ncols=columns,
        nrows=rows,
        smoothing=0,
        bar_format=f"{{desc}}{{bar}} {{n_fmt}} of {{total_fmt}} {unit}s, {{remaining}} left{{postfix}}",
    )


def alone() -> bool:
    """Whether no other run of a sweep writes to the same output: parallel runs are child processes."""
    return multiprocessing.parent_process() is None


def say(text: str) -> None:
    """Print a line above the progress bar, if any, and flush it, also into a pipe or a file."""
    tqdm.write(text)
    sys.stdout.flush()


def warn(text: str) -> None:
    """Print a warning in one line to stderr, above the progress bar, if any."""
    tqdm.write(f"metacv: warning: {printable(text)}", file=sys.stderr)


def error_line(error: Exception, words: Sequence[str] = ()) -> str:
    """Return an error as one line for the user, without internals of Hydra; `words` are those of the command line."""
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key or error.key} is missing"
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else ""
        lines = f"{error}\n{cause}".splitlines()
        noise = ("full_key:", "object_type=", "reference_type=", "To append to", "provider=", "Config search path")
        kept = dict.fromkeys(" ".join(line.split()) for line in lines if not line.strip().startswith(noise))
        text = " ".join(line for line in kept if line)
        if found := re.search(r"not find 'hydra/(?:launcher|sweeper)/\w*?(joblib|slurm|ray|optuna)'", text):
            return f"the extra {found[1]} is not installed; pip install 'metacv[{found[1]}]' installs it"
        if unknown := re.match(r"Could not override '(.+?)'\..*is not in struct", text):
            name, known = unknown[1], settings()
            if name in known:
                return f"{name}: there is no such setting of this command, or of what it chooses"
            return f"{name}: there is no such setting{nearest(name, known, most=1, cutoff=0.8)}"
        if isinstance(error, InterpolationResolutionError) or "Error resolving interpolation" in text:
            text = text.replace('KeyError raised while resolving interpolation: "', "").rstrip('"')
            missing = (re.findall("'(.+?)'", text) or [""])[0]
            word = next((word for word in words if "${" in word and missing in word), getattr(error, "full_key", None))
            return f"{word}: {text}" if word else text
        return text
    if isinstance(error, OSError) and error.strerror:
        if not error.filename and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # not of a named file
            return f"the output cannot be written: {error.strerror}"
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text[:200]} (HYDRA_FULL_ERROR=1 shows the traceback)"


def report_error(error: Exception, words: Sequence[str] = ()) -> None:
    """Print an error in one line. Ranks other than 0 print only errors that rank 0 does not have."""
    line = f"metacv: {short(printable(error_line(error, words)))}"
    if rank() == 0:
        print(line, file=sys.stderr)
    elif line.endswith("traceback)") or isinstance(error, OSError):
        print(line, file=sys.__stderr__)
